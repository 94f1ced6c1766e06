"""Ingest from S3 to S3: objects that change without growing are noticed, and a named cluster writes the shards."""

from __future__ import annotations

import os
import re

import pytest

from pipelines import stack
from pipelines.shards.ingest.sources import source_digest
from pipelines.shards.ingest.write import ingest
from pipelines.stack import StackState
from pipelines.storage import Storage
from tests.integration.conftest import Shell
from tests.pipelines.shards.ingest.sources import pictures

pytestmark = pytest.mark.integration

SOURCE = "s3://ddpm/sources/photos"
SETTINGS = ["data.num_classes=3", "data.image_size=8", "data.shard_samples=7"]


@pytest.fixture(scope="module")
def photos(s3: Storage) -> dict[str, bytes]:
    files = pictures()
    for name, data in files.items():
        s3.write(f"{SOURCE}/{name}", data)
    return files


def test_an_object_of_the_same_size_with_other_bytes_is_another_source(photos, s3: Storage):
    to = "s3://ddpm/datasets/etag"
    options = {"image_size": 8, "channels": 3, "shard_samples": 7}
    before = source_digest(SOURCE, s3)
    first = ingest(SOURCE, to, s3, **options)
    assert source_digest(SOURCE, s3) == before
    s3.write(f"{SOURCE}/cat/03.png", photos["cat/03.png"])  # stored again, the same bytes
    assert source_digest(SOURCE, s3) == before
    changed = bytearray(photos["cat/03.png"])
    changed[-20] ^= 1
    s3.write(f"{SOURCE}/cat/03.png", bytes(changed))
    try:
        assert source_digest(SOURCE, s3) != before
        again = ingest(SOURCE, to, s3, **options)
        shards = sum(map(len, again.dataset.splits.values()))
        assert again.reused_shards == shards - 1
        assert [bad.origin for bad in again.bad] == ["cat/03.png"]
        assert again.dataset.digest != first.dataset.digest
    finally:
        s3.write(f"{SOURCE}/cat/03.png", photos["cat/03.png"])


def test_a_named_cluster_writes_the_shards_and_threads_do_without(photos, shell: Shell, local_stack: StackState):
    here = shell.ok("ingest", SOURCE, "--to", "s3://ddpm/datasets/threads", *SETTINGS, "--json")
    assert re.search(r"\d threads? of this process", here.err)
    assert local_stack.ray_address is not None
    named = {"RAY_ADDRESS": local_stack.ray_address, **stack.ray_environment(local_stack.home)}
    cluster = Shell(shell.folder, shell.environment | named)
    there = cluster.ok("ingest", SOURCE, "--to", "s3://ddpm/datasets/tasks", *SETTINGS, "--json")
    assert f"{len(photos)} images as Ray tasks on {len(os.sched_getaffinity(0))} CPUs" in there.err
    assert there.answer["digest"] == here.answer["digest"]
    assert sum(there.answer["samples"].values()) == len(photos)
