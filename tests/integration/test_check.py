"""Foreign tars on a real S3: indexed by ranged reads, checked, one shard damaged, left out; in threads and by Ray."""

from __future__ import annotations

import io
import os
import re

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipelines import stack
from pipelines.shards.index import read_dataset
from pipelines.stack import StackState
from pipelines.storage import Storage
from tests.integration.conftest import Shell

pytestmark = pytest.mark.integration


def shard(folder, part):
    path = folder / f"part-{part}.tar"
    rng = np.random.default_rng(part)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for i in range(40):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(picture, "png")
            writer.write({"__key__": f"{part}/{i:03d}", "png": picture.getvalue(), "cls": str(i % 4).encode()})
    return path


def test_foreign_tars_on_s3_are_indexed_checked_and_quarantined(shell: Shell, s3: Storage, tmp_path):
    uri = "s3://ddpm/datasets/foreign"
    paths = [shard(tmp_path, part) for part in range(6)]
    for path in paths:
        s3.upload(path, f"{uri}/{path.name}")
    indexed = shell.ok("index", uri, "--split", "test=part-5*", "--split", "train=part-*", "--json").answer
    assert indexed["samples"] == {"train": 200, "test": 40}
    assert shell.ok("check", uri, "--json").answer["clean"] is True

    data = bytearray(paths[2].read_bytes())
    data[len(data) // 2] ^= 4
    s3.write(f"{uri}/part-2.tar", bytes(data))
    s3.delete(f"{uri}/part-4.tar")
    done = shell("check", uri, "--quarantine", "--json")
    assert done.code == 1
    whole = {(p["shard"], p["kind"]) for p in done.answer["problems"] if p["sample"] is None}
    assert {("part-2.tar", "bytes"), ("part-4.tar", "missing")} <= whole
    assert done.answer["quarantine"]["excluded"] == 2
    assert s3.exists(f"{uri}/quarantine.json")


SPLITS = ("--split", "test=part-5*", "--split", "train=part-*")


@pytest.fixture
def tars(s3: Storage, tmp_path) -> str:
    """The address of tars of another tool."""
    uri = f"s3://ddpm/datasets/{tmp_path.name}"
    for part in range(6):
        s3.upload(shard(tmp_path, part), f"{uri}/part-{part}.tar")
    return uri


def test_a_named_cluster_reads_the_tars_and_finds_what_threads_find(
    tars: str, shell: Shell, s3: Storage, local_stack: StackState
):
    named = {"RAY_ADDRESS": str(local_stack.ray_address), **stack.ray_environment(local_stack.home)}
    cluster = Shell(shell.folder, shell.environment | named)
    by_ray, by_threads = (
        f"6 tars, .* MiB, as Ray tasks on {len(os.sched_getaffinity(0))} CPUs",
        "thread.* of this process",
    )
    there = cluster.ok("index", tars, *SPLITS, "--json")
    assert re.search(by_ray, there.err)
    sidecars = {e.uri: s3.read(e.uri) for e in s3.list(tars) if e.uri.endswith(".index.json")}
    here = shell.ok("index", tars, *SPLITS, "--replace", "--json")
    assert re.search(by_threads, here.err)
    assert there.answer == here.answer
    assert {uri: s3.read(uri) for uri in sidecars} == sidecars

    data = bytearray(s3.read(f"{tars}/part-3.tar"))
    s3.write(f"{tars}/part-3.tar", bytes(data[: len(data) // 2]))
    wrong = cluster("check", tars, "--json")
    assert re.search(by_ray, wrong.err)
    assert (wrong.code, shell("check", tars, "--json").answer) == (1, wrong.answer)
    chosen = cluster("check", tars, "--threads", "1", "--json")
    assert re.search("by 1 thread of this process", chosen.err)
    assert chosen.answer == wrong.answer

    refused = cluster("index", tars, *SPLITS, "--replace")
    assert (refused.code, "so no dataset.json was written" in refused.err) == (1, True)
    again = cluster.ok("index", tars, *SPLITS, "--replace", "--quarantine", "--json")
    assert "6 of 6 tars were read before" in again.err
    assert {found["shard"] for found in again.answer["quarantine"]["excluded"]} == {"part-3.tar"}
    assert not [entry.uri for entry in s3.list(tars) if "-progress/" in entry.uri]


def test_an_index_and_a_check_are_launched_on_a_cluster(tars: str, shell: Shell, s3: Storage):
    done = shell.ok("launch", "--json", "index", tars, *SPLITS, "--classes", "a,b,c,d")
    name = tars.rpartition("/")[2]
    assert done.answer == {"id": f"{name}-index", "submitted": True, "status": "SUCCEEDED"}
    assert "as Ray tasks on" in done.err
    assert read_dataset(tars, s3).classes == ("a", "b", "c", "d")
    checked = shell.ok("launch", "--json", "check", tars)
    assert checked.answer == {"id": f"{name}-check", "submitted": True, "status": "SUCCEEDED"}
    assert "every byte and every sample is as recorded" in checked.err
