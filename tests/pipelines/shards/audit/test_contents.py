"""The training-data summary is what a direct count of the tars gives, for data of any origin."""

import hashlib
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from pipelines.checkpoints.references import mixture_lineage
from pipelines.config import RegistryConfig, compose
from pipelines.shards.audit.contents import SourceContents, contents_rows, plain_contents, trained_contents
from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.audit.recorded import IN_THREADS
from pipelines.shards.erase import erase
from pipelines.shards.erased import ImageFile
from pipelines.shards.forgotten import Forgetting, quarantine_forgotten, record_forgetting
from pipelines.shards.index import ShardIndex, read_dataset
from pipelines.shards.ingest.write import ingest
from pipelines.shards.joined import read_data
from pipelines.shards.quarantine import (
    Problem,
    kept_samples,
    make_quarantine,
    read_quarantine,
    store_quarantine,
    stream_digest,
)
from pipelines.signing import Authority
from pipelines.storage import Storage, layout
from tests.pipelines.shards.ingest.sources import pictures, write_files
from tests.pipelines.shards.tars import picture, write_shard

STORAGE = Storage()
LICENCES = ("CC BY 4.0", "CC0", None, "")
HOSTS = ("a.example", "b.example", "c.example")


def lineage(uri):
    """What the lineage of a model says that is trained on a dataset as it is."""
    dataset = read_dataset(uri, STORAGE)
    return {"dataset_uri": uri, "stream_digest": stream_digest(dataset, read_quarantine(uri, STORAGE))}


def contents(uri) -> SourceContents:
    (found,) = trained_contents(lineage(uri), STORAGE, IN_THREADS)
    return found


def counted(uri):
    """Count the samples of the train split by opening its tars."""
    dataset, quarantine = read_dataset(uri, STORAGE), read_quarantine(uri, STORAGE)
    counts = {name: Counter() for name in ("classes", "licences", "hosts")}
    images = captions = 0
    files = []
    for shard in dataset.shards("train"):
        samples = {}
        with tarfile.open(Path(uri.removeprefix("file://")) / shard.name) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                samples.setdefault(key, {})[name] = tar.extractfile(member).read()
        index = ShardIndex.from_json(STORAGE.read(layout.index_name(shard.address(uri))))
        for key in kept_samples(shard.name, index, quarantine).keys:
            sample = samples[key]
            images += 1
            captions += bool(sample.get("txt"))
            label = int(sample["cls"]) if "cls" in sample else -1
            counts["classes"]["" if label < 0 else dataset.classes[label] if dataset.classes else str(label)] += 1
            about = json.loads(sample.get("json", b"{}"))
            counts["licences"].update([about["license"]] if about.get("license") else [])
            counts["hosts"].update([urlsplit(about["url"]).hostname] if "url" in about else [])
            files.append(hashlib.sha256(sample["png"]).digest())
    return {
        **{name: dict(count) for name, count in counts.items()},
        "images": images,
        "captions": captions,
        "copies": len(files) - len(set(files)),
    }


def assert_counted_directly(found: SourceContents):
    direct = counted(found.uri)
    assert found.images["train"] == direct.pop("images")
    assert {name: getattr(found, name) for name in direct} == direct


def entries(rng, numbers):
    for n in numbers:
        yield f"{n:04d}.png", picture(int(rng.integers(0, 40)))  # of forty pictures, so that there are copies
        if rng.random() < 0.9:
            label = int(rng.integers(0, 12))
            yield f"{n:04d}.cls", (f" {label}\n" if rng.random() < 0.1 else str(label)).encode()
        if rng.random() < 0.6:
            yield f"{n:04d}.txt", (b"" if rng.random() < 0.2 else b"a caption")
        if rng.random() < 0.8:
            about = {"url": f"https://{rng.choice(HOSTS)}/{n}.png"}
            licence = LICENCES[int(rng.integers(0, len(LICENCES)))]
            yield f"{n:04d}.json", json.dumps(about if licence is None else about | {"license": licence}).encode()


@pytest.fixture
def others(tmp_path):
    """Tars of another tool, of which some samples are in quarantine."""
    (tmp_path / "tars").mkdir()
    rng = np.random.default_rng(5)
    for shard in range(3):
        write_shard(tmp_path / f"tars/train-{shard}.tar", entries(rng, range(shard * 40, shard * 40 + 40)))
    made = index_tars(f"file://{tmp_path}/tars", STORAGE, quarantine=True).dataset
    out = [Problem("train-1.tar", i, f"{40 + i:04d}", "decode", "for a test") for i in (0, 3, 39)]
    store_quarantine(make_quarantine(made, out), made.uri, STORAGE)
    return made.uri


def test_tars_of_another_tool_are_counted_with_their_licences_and_hosts(others):
    found = contents(others)
    assert_counted_directly(found)
    assert (found.left_out, found.changed, found.near_duplicates) == ({"decode": 3}, False, None)
    assert found.copies > 0
    rows = dict(contents_rows(found))
    assert rows["images"].startswith(f"{found.images['train']:,} train")
    assert "CC BY 4.0 " in rows["licences"]
    assert rows["left out by quarantine"] == "decode 3"
    assert "a.example " in rows["from 3 hosts"]


def test_a_shard_that_is_in_quarantine_whole_holds_nothing(others):
    before = contents(others)
    made = read_dataset(others, STORAGE)
    store_quarantine(make_quarantine(made, [Problem("train-2.tar", None, None, "bytes", "gone")]), others, STORAGE)
    after = contents(others)
    assert after.images["train"] == before.images["train"] + 3 - 40


def test_an_ingested_dataset_is_counted_by_its_indices_and_names_its_near_duplicates(tmp_path):
    source = write_files(tmp_path / "source", pictures())
    first = next(path for path in sorted(source.rglob("*.png")))
    (first.parent / "again.png").write_bytes(first.read_bytes())
    uri = f"file://{tmp_path}/ds"
    ingest(str(source), uri, STORAGE, image_size=8, channels=3, shard_samples=4)
    found = contents(uri)
    assert_counted_directly(found)
    assert sum(found.classes.values()) == found.images["train"]
    assert found.near_duplicates is not None
    assert sum(found.images.values()) == sum(read_dataset(uri, STORAGE).samples(split) for split in found.images)


def test_counts_are_of_the_stream_that_was_trained_on_also_after_samples_were_taken_out_and_erased(others, home):
    trained = lineage(others)
    (before,) = trained_contents(trained, STORAGE, IN_THREADS)
    dataset = read_dataset(others, STORAGE)
    with tarfile.open(Path(others.removeprefix("file://")) / "train-0.tar") as tar:
        asked = tar.extractfile("0007.png").read()
    record_forgetting(Forgetting((ImageFile.of(asked),), "2026-01-01T00:00:00+00:00", ""), others, STORAGE)
    quarantine_forgotten(dataset, STORAGE)
    (after,) = trained_contents(trained, STORAGE, IN_THREADS)
    assert after == before

    now = contents(others)
    assert now.left_out["forgotten"] >= 1
    assert_counted_directly(now)
    out = [(p.shard, p.index, p.sample) for p in read_quarantine(others, STORAGE).excluded if p.kind == "forgotten"]
    authority = Authority.of(RegistryConfig(model="digits"))
    erase(others, out, STORAGE, authority, at="2026-01-01T00:00:00+00:00", notice=str)
    assert contents(others).erased == len(out)
    (after,) = trained_contents(trained, STORAGE, IN_THREADS)
    assert (after.changed, after.images) == (False, before.images)


def test_a_dataset_that_was_written_again_is_counted_as_it_is_and_says_so(others):
    (found,) = trained_contents(lineage(others) | {"stream_digest": "0" * 64}, STORAGE, IN_THREADS)
    assert found.changed
    assert "the dataset has changed since" in dict(contents_rows(found))["images"]
    assert replace(found, changed=False, digest="") == replace(contents(others), digest="")


def test_each_source_of_a_mixture_is_counted(others, tmp_path):
    (tmp_path / "flat").mkdir()
    flat_entries = [e for i in range(6) for e in ((f"{i}.png", picture(i, mode="RGB")), (f"{i}.cls", b"3"))]
    write_shard(tmp_path / "flat/train-0.tar", flat_entries)
    flat = index_tars(f"file://{tmp_path}/flat", STORAGE).dataset.uri
    uris = {"tars": others, "flat": flat}
    listed = ",".join(f"{{name:{name},uri:'{uri}',weight:{at}}}" for at, (name, uri) in enumerate(uris.items(), 1))
    config = compose([f"data.sources=[{listed}]", f"data.uri={others}", "data.channels=3", "data.image_size=8"])
    data, _ = read_data(config.data, STORAGE)
    found = trained_contents(
        {"dataset_uri": others, "stream_digest": "of the mixture"} | mixture_lineage(data), STORAGE, IN_THREADS
    )
    assert [(each.name, each.uri, each.changed) for each in found] == [(name, uri, False) for name, uri in uris.items()]
    for each in found:
        assert_counted_directly(each)
    assert [each.weights for each in found] == [{"0": 1.0}, {"0": 2.0}]


def test_a_tar_is_counted_once_and_again_where_its_quarantine_has_changed(others, monkeypatch):
    from pipelines.shards.audit import contents as module

    read = []
    counting = module.CountTar.__call__

    def noted(self, tar, advance):
        read.append(tar.name)
        return counting(self, tar, advance)

    monkeypatch.setattr(module.CountTar, "__call__", noted)
    first = contents(others)
    assert sorted(read) == ["train-0.tar", "train-1.tar", "train-2.tar"]
    assert contents(others) == first
    assert len(read) == 3
    made = read_dataset(others, STORAGE)
    kept = [Problem("train-1.tar", 0, "0040", "decode", "for a test")]
    store_quarantine(make_quarantine(made, kept), others, STORAGE)
    assert_counted_directly(contents(others))
    assert read[3:] == ["train-1.tar"]
    assert len(list(STORAGE.scan(f"{others}/{layout.CONTENTS}"))) >= 3


def test_contents_read_as_they_were_written(others):
    found = contents(others)
    (plain,) = json.loads(json.dumps(plain_contents([found])))
    assert SourceContents.from_plain(plain) == found
