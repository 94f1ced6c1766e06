import hashlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.shards.fetch import FetchStats, ShardCache, ShardCorruptError, ShardFetcher, fits
from pipelines.shards.index import ShardInfo
from pipelines.storage import Storage, StorageError, TransientStorageError

DATA = random.Random(0).randbytes(100_000)
SHARD = ShardInfo("a.tar", 1, len(DATA), hashlib.sha256(DATA).hexdigest())


@dataclass(frozen=True)
class Flaky(Storage):
    """A store whose connections break after some bytes: real stores do so when they like."""

    breaks: tuple[int, ...] = ()
    asked: list[tuple[int, int]] = field(default_factory=list, compare=False)

    def stream(self, uri, start, stop, chunk=1 << 20) -> Iterator[bytes]:
        number = len(self.asked)
        self.asked.append((start, stop))
        left = self.breaks[number] if number < len(self.breaks) else None
        for part in super().stream(uri, start, stop, 1000):
            if left is not None and len(part) > left:
                yield part[:left]
                raise TransientStorageError("the connection broke")
            left = None if left is None else left - len(part)
            yield part


@pytest.fixture
def uri(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(DATA)
    return f"file://{tmp_path}/data"


def eventually(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


span = st.integers(0, len(DATA) - 1).flatmap(lambda a: st.tuples(st.just(a), st.integers(a + 1, len(DATA))))


@given(spans=st.lists(span, min_size=1, max_size=8), block_bytes=st.sampled_from([512, 4096, 200_000]))
def test_spans_read_by_blocks_are_the_shards_bytes(tmp_path_factory, spans, block_bytes):
    folder = tmp_path_factory.mktemp("spans")
    (folder / "a.tar").write_bytes(DATA)
    fetcher = ShardFetcher(f"file://{folder}", Storage(), None, block_bytes=block_bytes)
    assert fetcher.read(SHARD, spans) == [DATA[a:b] for a, b in spans]
    fetcher.close()


def test_neighbouring_blocks_are_one_request_and_known_ones_none(uri):
    store = Flaky()
    fetcher = ShardFetcher(uri, store, None, block_bytes=1000)
    fetcher.read(SHARD, [(500, 3500), (3600, 3700), (9000, 9001)])
    assert sorted(store.asked) == [(0, 4000), (9000, 10_000)]
    fetcher.read(SHARD, [(0, 5000)])
    assert sorted(store.asked) == [(0, 4000), (4000, 5000), (9000, 10_000)]
    assert fetcher.stats.bytes == 6000
    assert fetcher.stats.requests == 3


def test_blocks_in_memory_are_bounded(uri):
    fetcher = ShardFetcher(uri, Storage(), None, block_bytes=1000, memory_bytes=5000)
    for start in range(0, 100_000, 10_000):
        assert fetcher.read(SHARD, [(start, start + 10_000)]) == [DATA[start : start + 10_000]]
        assert len(fetcher._blocks) <= 5


def test_a_shard_follows_into_the_cache_and_is_mapped_from_then_on(uri, tmp_path):
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    fetcher = ShardFetcher(uri, Storage(), cache, block_bytes=1000)
    assert fetcher.read(SHARD, [(10, 20)]) == [DATA[10:20]]
    eventually(lambda: cache.find(SHARD) is not None)
    assert fetcher.read(SHARD, [(50_000, 50_010)]) == [DATA[50_000:50_010]]
    assert fetcher.stats.cached_reads >= 1  # the first read too, where the shard was faster
    assert fetcher.stats.cached_reads + fetcher.stats.block_reads == 2
    assert fetcher.stats.whole_shards == 1
    (tmp_path / "data" / "a.tar").unlink()  # the store is not asked any more
    assert ShardFetcher(uri, Storage(), cache).read(SHARD, [(0, 9)]) == [DATA[:9]]


@pytest.mark.parametrize("whole", [False, True])
def test_a_broken_connection_is_resumed_from_the_byte_that_it_reached(uri, tmp_path, whole):
    store = Flaky(breaks=(30_500, 0, 20_000))
    if whole:
        path = ShardCache(tmp_path / "cache", 1 << 20).fetch(uri, SHARD, store, FetchStats())
        assert path.read_bytes() == DATA
    else:
        fetcher = ShardFetcher(uri, store, None, block_bytes=len(DATA))
        assert fetcher.read(SHARD, [(0, len(DATA))]) == [DATA]
    assert [start for start, _ in store.asked] == [0, 30_500, 30_500, 50_500]


def test_a_store_that_stays_away_is_an_error_when_patience_ends(uri):
    with pytest.raises(TransientStorageError, match="broke"):
        Flaky(breaks=(0,) * 100).fetch(f"{uri}/a.tar", 0, 10, len, patience_s=0.5)


def test_a_shard_that_is_cut_short_or_gone_is_named(uri, tmp_path):
    (tmp_path / "data" / "a.tar").write_bytes(DATA[:60_000])
    fetcher = ShardFetcher(uri, Storage(), None, block_bytes=1000)
    assert fetcher.read(SHARD, [(0, 10)]) == [DATA[:10]]
    with pytest.raises(StorageError, match=r"a\.tar ends at byte 60000, 61000 were expected"):
        fetcher.read(SHARD, [(60_500, 60_600)])
    (tmp_path / "data" / "a.tar").unlink()
    with pytest.raises(StorageError, match="nothing is stored there"):
        fetcher.read(SHARD, [(90_000, 90_001)])


def test_a_failed_block_is_asked_for_again(uri, tmp_path):
    (tmp_path / "data" / "a.tar").rename(tmp_path / "away")
    fetcher = ShardFetcher(uri, Storage(), None)
    with pytest.raises(StorageError):
        fetcher.read(SHARD, [(0, 10)])
    (tmp_path / "away").rename(tmp_path / "data" / "a.tar")
    assert fetcher.read(SHARD, [(0, 10)]) == [DATA[:10]]


def test_a_shard_that_fails_its_checksum_twice_stops_the_reader_by_name(uri, tmp_path):
    (tmp_path / "data" / "a.tar").write_bytes(DATA[:500] + b"!" + DATA[501:])
    fetcher = ShardFetcher(uri, Storage(), ShardCache(tmp_path / "cache", 1 << 20))

    def read():
        try:
            fetcher.read(SHARD, [(0, 10)])
        except ShardCorruptError as error:
            return error
        return None

    errors = []
    eventually(lambda: errors.append(read()) or errors[-1] is not None)
    assert "a.tar has SHA-256" in str(errors[-1])
    assert "on two downloads" in str(errors[-1])
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_processes_of_a_node_bring_a_shard_in_once(uri, tmp_path):
    """Locks of two caches on one folder exclude each other as those of two processes do."""
    stores = [Flaky(), Flaky(), Flaky()]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{SHARD.sha256}.part").write_bytes(b"left by a process that was killed")
    caches = [ShardCache(tmp_path / "cache", 1 << 20) for _ in stores]
    threads = [
        threading.Thread(target=cache.fetch, args=(uri, SHARD, store, FetchStats()))
        for cache, store in zip(caches, stores, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(store.asked) for store in stores) == 1
    assert caches[0].find(SHARD).read_bytes() == DATA


def test_ranged_reading_is_for_shards_in_use_that_do_not_fit():
    shards = [SHARD] * 100
    assert fits(shards, lanes=4, window=2, limit_bytes=16 * len(DATA))
    assert not fits(shards, lanes=4, window=2, limit_bytes=16 * len(DATA) - 1)
    assert fits(shards[:3], lanes=4, window=2, limit_bytes=3 * len(DATA))
