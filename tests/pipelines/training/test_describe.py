"""What the page of a run says of it."""

from __future__ import annotations

import getpass
import os
import re
from dataclasses import replace

import pytest

from pipelines.config import ConfigError, compose
from pipelines.shards.index import Dataset, MixtureSource, ShardInfo
from pipelines.training.describe import goodput_page, goodput_text, training_text, user_name, workers_text
from pipelines.training.goodput import Attempt, Session, measure


def test_the_number_of_workers_is_one_or_a_range():
    fixed, elastic = (compose(["+experiment=digits", f"cluster.num_workers={n}"]) for n in ("3", "[1,4]"))
    assert (fixed.cluster.min_workers, fixed.cluster.max_workers) == (3, 3)
    assert (elastic.cluster.min_workers, elastic.cluster.max_workers) == (1, 4)
    assert (workers_text(fixed), workers_text(elastic)) == ("3 workers", "1 to 4 workers")
    assert fixed.identity() == elastic.identity()
    for wrong, why in (("[4,1]", "min <= max"), ("[1,200]", "exceeds batch_size"), ("0", "greater than 0")):
        with pytest.raises(ConfigError, match=why):
            compose(["+experiment=digits", f"cluster.num_workers={wrong}"])


def test_a_user_without_a_name_is_a_number(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    assert user_name() == "uid 12345"
    monkeypatch.setenv("USER", "ada")
    assert user_name() == "ada"


def test_the_goodput_is_a_sentence_and_a_table_with_every_part():
    first = Attempt(0, 100, 0, 1000, {"startup": 0.0, "step": 100.0})
    second = Attempt(110, 250, 600, 2000, {"startup": 0.0, "step": 140.0}, uploaded_bytes=3 << 20, upload_s=2.5)
    goodput = measure([Session(0, 250, (first, second))])
    assert goodput_text(goodput) == (
        "80.0%: 200 of 250 s with a driver were spent on steps that were kept, 400 images were computed twice."
    )
    rows = re.findall(
        r'<tr><th scope="row">(.*?)</th><td class="n">(.*?)</td><td>(.*?)</td></tr>', goodput_page(goodput)
    )
    assert rows == goodput.table()
    shown = {what: much for what, much, _ in rows}
    assert shown.keys() >= goodput.parts().keys()
    assert (shown["productive"], shown["recomputed"]) == ("200.0 s (80.0%)", "40.0 s (16.0%)")
    assert (shown["computed twice"], shown["uploads"]) == ("400 images", "3.0 MiB in 2.5 s")
    assert goodput.metrics() == {"train/goodput": pytest.approx(0.8)}


def test_the_page_names_the_network_and_the_data_of_a_training():
    shard = ShardInfo("train-000000.tar", 1438, 1, "")
    ten = Dataset("s3://ddpm/datasets/digits", {"train": (shard,)}, tuple("0123456789"), 1, 8, (0.0,), (1.0,), "d")
    config = compose(["+experiment=digits", "images=10240", "cluster.num_workers=2"])
    assert training_text(config, ten) == (
        "unet, v-prediction, cosine schedule, 10,240 images of `s3://ddpm/datasets/digits` (8x8, 10 classes; 1,438 "
        "different ones) in batches of 128 on 2 workers."
    )
    sources = (
        MixtureSource("a", "s3://b/a", "d", {0: 2.0}, ()),
        MixtureSource("b", "s3://b/b", "d", {0: 1.0, 500: 3.0}, ()),
    )
    mixed = training_text(config, replace(ten, sources=sources))
    assert "10,240 images of `s3://b/a` (weight 2), `s3://b/b` (weight 1, from sample 500 on 3) (8x8," in mixed
    classifier = compose(["+experiment=digits_classifier"])
    assert training_text(classifier, replace(ten, classes=())).startswith("a classifier of noisy images, cosine")
    assert "(8x8; 1,438" in training_text(config, replace(ten, classes=()))
