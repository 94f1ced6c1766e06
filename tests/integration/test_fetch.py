"""Shards from the real store over connections that break."""

from __future__ import annotations

import hashlib
import random
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.shards.cache import ShardCache
from pipelines.shards.fetch import ShardFetcher
from pipelines.shards.index import Member, ShardInfo
from pipelines.shards.source import ShardShortError
from pipelines.storage import ShortObjectError, Storage, StorageError
from pipelines.training.goodput import measure
from pipelines.training.ledger import read_sessions
from tests.chaos.fault_proxy import Fault, FaultProxy
from tests.integration.conftest import Shell

pytestmark = pytest.mark.integration

DATA = random.Random(1).randbytes(6 << 20)
SHARD = ShardInfo("a.tar", 1, len(DATA), hashlib.sha256(DATA).hexdigest())
URI = "s3://ddpm/tests/fetch"


@pytest.fixture(scope="module")
def stored(s3: Storage) -> Storage:
    s3.write(f"{URI}/a.tar", DATA)
    return s3


def get(fetcher: ShardFetcher, start: int, stop: int) -> bytes:
    member = Member(start, stop - start, zlib.crc32(DATA[start:stop]))
    return bytes(fetcher.read([(SHARD, [member])])[0][0])


def through(proxy: FaultProxy, storage: Storage) -> Storage:
    return replace(storage, endpoint_url=proxy.url)


def test_a_shard_arrives_over_connections_that_are_cut_and_no_byte_is_asked_for_twice(stored, tmp_path: Path):
    assert stored.endpoint_url is not None
    with FaultProxy(stored.endpoint_url) as proxy:
        proxy.start(Fault("short_body", after=1 << 20))
        cache = ShardCache(tmp_path, 1 << 30)
        fetcher = ShardFetcher(URI, through(proxy, stored), cache)
        fetcher.require([SHARD])
        assert cache.path(SHARD).read_bytes() == DATA
        assert fetcher.stats.requests >= 6
        # What was on its way when a connection broke is lost with it, and no more.
        assert proxy.relayed < 1.3 * len(DATA)


def test_blocks_come_through_an_outage_of_seconds(stored):
    assert stored.endpoint_url is not None
    with FaultProxy(stored.endpoint_url) as proxy:
        fetcher = ShardFetcher(URI, through(proxy, stored), None)
        assert get(fetcher, 0, 10) == DATA[:10]
        proxy.start(Fault("refuse", seconds=4))
        began = time.monotonic()
        assert get(fetcher, 3 << 20, 5 << 20) == DATA[3 << 20 : 5 << 20]
        assert 3 < time.monotonic() - began < 60


def test_a_shard_that_is_cut_short_is_named(stored, tmp_path):
    """The store answers InvalidRange, or with fewer bytes than were asked for."""
    uri = "s3://ddpm/tests/cut"
    stored.write(f"{uri}/a.tar", DATA[: 3 << 20])
    began = time.monotonic()
    for start, stop in [(4 << 20, 5 << 20), ((3 << 20) - 10, (3 << 20) + 10)]:
        for cache in (None, ShardCache(tmp_path / f"{start}", 1 << 30)):
            with pytest.raises(ShardShortError, match=r"a\.tar is cut short: it has 3,145,728 bytes, the index"):
                get(ShardFetcher(uri, stored, cache), start, stop)
    with pytest.raises(ShortObjectError):
        stored.read(f"{uri}/a.tar", 4 << 20, 5 << 20)
    assert time.monotonic() - began < 10


def test_a_training_on_a_shard_that_is_cut_short_ends_at_once_and_names_it(shell: Shell, s3: Storage):
    uri = "s3://ddpm/datasets/cut"
    shell.ok("ingest", "digits", "--to", uri, "data.shard_bytes=100000", "--json")
    names = sorted(e.uri for e in s3.list(uri) if e.uri.endswith(".tar") and "/train-" in e.uri)
    data = s3.read(names[1])
    s3.write(names[1], data[: len(data) // 2])
    arguments = [f"data.uri={uri}", "name=cut", "tracking.grid_every=null", "checkpoint.every=640"]
    done = shell("train", "+experiment=digits", "images=12800", *arguments, "--json")
    assert done.code == 1
    found = f"{names[1]} is cut short: it has {len(data) // 2:,} bytes, the index says {len(data):,}: write it again; "
    assert f"{found}`ddpm check {uri}`" in " ".join(done.err.split())
    assert measure(read_sessions(s3, "s3://ddpm/runs/cut")).attempts == 1  # the workers were not started again
    checked = shell("check", uri, "--quarantine", "--json")
    assert {(p["shard"], p["kind"]) for p in checked.answer["problems"] if p["sample"] is None} == {
        (names[1].rpartition("/")[2], "truncated")
    }


def test_a_mistake_is_not_waited_for(stored):
    began = time.monotonic()
    with pytest.raises(StorageError, match="nothing is stored there"):
        get(ShardFetcher(f"{URI}/nowhere", stored, None), 0, 10)
    with pytest.raises(StorageError, match="the bucket does not exist"):
        get(ShardFetcher("s3://no-such-bucket-here", stored, None), 0, 10)
    assert time.monotonic() - began < 5
