"""Shards from the real store over connections that break."""

from __future__ import annotations

import hashlib
import random
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.shards.cache import ShardCache
from pipelines.shards.fetch import ShardFetcher
from pipelines.shards.index import Member, ShardInfo
from pipelines.storage import Storage, StorageError
from tests.integration.proxy import Proxy

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


def through(proxy: Proxy, storage: Storage) -> Storage:
    return replace(storage, endpoint_url=proxy.url)


def test_a_shard_arrives_over_connections_that_are_cut_and_no_byte_is_asked_for_twice(stored, tmp_path: Path):
    assert stored.endpoint_url is not None
    with Proxy(stored.endpoint_url, cut_after=1 << 20) as proxy:
        cache = ShardCache(tmp_path, 1 << 30)
        fetcher = ShardFetcher(URI, through(proxy, stored), cache)
        fetcher.require([SHARD])
        assert cache.path(SHARD).read_bytes() == DATA
        assert fetcher.stats.requests >= 6
        # What was on its way when a connection broke is lost with it, and no more.
        assert proxy.relayed < 1.3 * len(DATA)


def test_blocks_come_through_an_outage_of_seconds(stored):
    assert stored.endpoint_url is not None
    with Proxy(stored.endpoint_url) as proxy:
        fetcher = ShardFetcher(URI, through(proxy, stored), None)
        assert get(fetcher, 0, 10) == DATA[:10]
        proxy.down = True
        proxy.break_all()
        threading.Timer(4, lambda: setattr(proxy, "down", False)).start()
        began = time.monotonic()
        assert get(fetcher, 3 << 20, 5 << 20) == DATA[3 << 20 : 5 << 20]
        assert 3 < time.monotonic() - began < 60


def test_a_mistake_is_not_waited_for(stored):
    began = time.monotonic()
    with pytest.raises(StorageError, match="nothing is stored there"):
        get(ShardFetcher(f"{URI}/nowhere", stored, None), 0, 10)
    with pytest.raises(StorageError, match="the bucket does not exist"):
        get(ShardFetcher("s3://no-such-bucket-here", stored, None), 0, 10)
    assert time.monotonic() - began < 5
