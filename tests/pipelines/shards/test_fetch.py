import errno
import fcntl
import hashlib
import itertools
import os
import random
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.shards import cache as cache_module
from pipelines.shards import fetch
from pipelines.shards.cache import ShardCache
from pipelines.shards.fetch import ShardFetcher, coalesce
from pipelines.shards.index import Member, ShardInfo
from pipelines.shards.source import ShardCorruptError, ShardShortError
from pipelines.shards.working_set import WorkingSet
from pipelines.storage import Storage, StorageError, TransientStorageError

DATA = random.Random(0).randbytes(100_000)
SHARD = ShardInfo("a.tar", 1, len(DATA), hashlib.sha256(DATA).hexdigest())
ONE = WorkingSet.of([(1, [SHARD])], 1, 1)


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


class Garbling(Storage):
    """A store that flips a bit of its first answers."""

    left: list[int]

    def __init__(self, times):
        super().__init__()
        object.__setattr__(self, "left", [times])

    def stream(self, uri, start, stop, chunk=1 << 20) -> Iterator[bytes]:
        for part in super().stream(uri, start, stop, chunk):
            self.left[0] -= 1
            yield bytes([part[0] ^ 1]) + part[1:] if self.left[0] >= 0 else part


@dataclass(frozen=True)
class Meanwhile(Storage):
    """A store during whose answers something happens."""

    happens: Callable[[], object] = field(default=lambda: None, compare=False)

    def stream(self, uri, start, stop, chunk=1 << 20) -> Iterator[bytes]:
        self.happens()
        yield from super().stream(uri, start, stop, chunk)


@dataclass(frozen=True)
class Withholding(Storage):
    """A store that answers for one shard only once it may."""

    may: threading.Event = field(default_factory=threading.Event, compare=False)

    def stream(self, uri, start, stop, chunk=1 << 20) -> Iterator[bytes]:
        assert not uri.endswith("b.tar") or self.may.wait(20)
        yield from super().stream(uri, start, stop, chunk)


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


def get(fetcher, *spans):
    """The bytes of spans, asked for as members of the shard."""
    members = [Member(a, b - a, zlib.crc32(DATA[a:b])) for a, b in spans]
    return [bytes(data) for data in fetcher.read([(SHARD, members)])[0]]


@given(spans=st.lists(span, min_size=1, max_size=8), block_bytes=st.sampled_from([512, 4096, 200_000]))
def test_members_are_the_shards_bytes_by_ranges_by_blocks_and_from_the_cache(tmp_path_factory, spans, block_bytes):
    folder = tmp_path_factory.mktemp("spans")
    (folder / "a.tar").write_bytes(DATA)
    for cache in (None, ShardCache(folder / "cache", 1 << 20)):
        fetcher = ShardFetcher(f"file://{folder}", Storage(), cache, block_bytes=block_bytes)
        assert get(fetcher, *spans) == [DATA[a:b] for a, b in spans]
        fetcher.require([SHARD])
        assert get(fetcher, *spans) == [DATA[a:b] for a, b in spans]
        fetcher.close()


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 50)), min_size=1, max_size=20), st.integers(0, 60))
def test_spans_hold_every_member_once_and_lie_apart_by_more_than_the_gap(places, gap):
    spans = coalesce([Member(a, n, 0) for a, n in places], gap)
    for a, n in places:
        assert sum(start <= a and a + n <= stop for start, stop in spans) >= 1
    assert all(start - stop > gap for (_, stop), (start, _) in itertools.pairwise(spans))
    assert sum(stop - start for start, stop in spans) <= sum(n + gap for _, n in places)


def test_neighbours_are_one_request(uri):
    store = Flaky()
    get(ShardFetcher(uri, store, None), (500, 3500), (3600, 3700), (90_000, 90_001))
    assert sorted(store.asked) == [(500, 3700), (90_000, 90_001)]


def test_blocks_near_each_other_are_one_request_on_their_way_into_the_cache(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "JOIN_BYTES", 3000)
    monkeypatch.setattr(ShardFetcher, "_fill", lambda self, partial: None)
    store = Flaky()
    fetcher = ShardFetcher(uri, store, ShardCache(tmp_path / "cache", 1 << 20), block_bytes=1000)
    get(fetcher, (500, 900), (4100, 4200), (9000, 9001), (99_000, 99_010))
    assert sorted(store.asked) == [(0, 5000), (9000, 10_000), (99_000, 100_000)]
    store.asked.clear()
    get(fetcher, (2000, 2010), (7000, 7010), (11_500, 11_510))  # one is there, and what lies between the others is, too
    assert sorted(store.asked) == [(7000, 8000), (11_000, 12_000)]


@given(st.lists(st.tuples(st.sets(st.integers(0, 63), min_size=1), st.integers(0, 8)), min_size=1, max_size=6))
def test_each_block_is_promised_once_and_joined_over_short_gaps_that_nobody_fetches(tmp_path_factory, asked):
    partial = ShardCache(tmp_path_factory.mktemp("cache"), 1 << 20).claim(replace(SHARD, bytes=64_000), 1000)
    fetched: set[int] = set()
    for numbers, gap in asked:
        wanted = sorted(numbers)
        futures, missing = partial.promise(wanted, gap)
        assert len(futures) == len(wanted)
        assert missing == sorted(set(missing))
        assert not fetched & set(missing)
        assert set(wanted) <= fetched | set(missing)
        new = [n for n in wanted if n not in fetched]
        for a, b in itertools.pairwise(new):
            between = set(range(a + 1, b))
            joined = len(between) <= gap and not between & fetched
            assert between & set(missing) == (between if joined else set())
        assert set(missing) - set(new) <= {n for a, b in itertools.pairwise(new) for n in range(a, b)}
        fetched |= set(missing)
    partial.close()


def test_no_byte_of_a_shard_is_fetched_twice_on_its_way_into_the_cache(uri, tmp_path):
    store = Flaky()
    fetcher = ShardFetcher(uri, store, ShardCache(tmp_path / "cache", 1 << 20), block_bytes=1000)
    get(fetcher, (500, 3500), (9000, 9001), (99_000, 99_010))
    fetcher.require([SHARD])
    covered = sorted(store.asked)
    assert covered[0][0] == 0
    assert covered[-1][1] == len(DATA)
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(covered))
    assert fetcher.stats.bytes == len(DATA)
    assert fetcher.stats.requests == len(covered)


def test_bytes_that_are_wrong_once_are_read_again_and_wrong_twice_are_an_error(uri, tmp_path):
    fetcher = ShardFetcher(uri, Garbling(times=1), None)
    assert get(fetcher, (10, 20), (50_000, 50_100)) == [DATA[10:20], DATA[50_000:50_100]]
    with pytest.raises(ShardCorruptError, match=r"a.tar: bytes 10 to 20 do not have the CRC .* on two reads"):
        get(ShardFetcher(uri, Garbling(times=9), None), (10, 20))
    # On the way into the cache: the block is fetched again before the whole is held to its checksum.
    fetcher = ShardFetcher(uri, Garbling(times=1), ShardCache(tmp_path / "cache", 1 << 20), block_bytes=1000)
    assert get(fetcher, (10, 20)) == [DATA[10:20]]
    fetcher.require([SHARD])
    assert fetcher.cache.find(SHARD).read_bytes() == DATA


def test_a_disk_without_room_is_named_and_reading_goes_on_by_ranges(uri, tmp_path, caplog):
    huge = replace(SHARD, bytes=1 << 60)
    cache = ShardCache(tmp_path / "cache", 1 << 62)
    with pytest.raises(StorageError, match=r"no room for 1,152.* bytes of a.tar .* set data.cache_dir to another disk"):
        cache.claim(huge, 1 << 50)
    fetcher = ShardFetcher(uri, Storage(), cache)
    for _ in range(2):
        assert bytes(fetcher.read([(huge, [Member(3, 5, zlib.crc32(DATA[3:8]))])])[0][0]) == DATA[3:8]
    assert [r.message.startswith("shards are read by ranges: no room for") for r in caplog.records] == [True]


def test_a_closed_fetcher_leaves_nothing_half_done(uri, tmp_path):
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    fetcher = ShardFetcher(uri, Flaky(breaks=(0,) * 10_000), cache, block_bytes=1000)
    waiting = fetcher._begin(SHARD, [Member(0, 10, 0)])
    fetcher.close()
    with pytest.raises((StorageError, CancelledError)):
        waiting()
    eventually(lambda: not list((tmp_path / "cache").glob("*.part")))
    assert cache.claim(SHARD, 1000) is not None


def test_a_shard_follows_into_the_cache_and_is_read_from_there(uri, tmp_path):
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    fetcher = ShardFetcher(uri, Storage(), cache, block_bytes=1000)
    assert get(fetcher, (10, 20)) == [DATA[10:20]]
    eventually(lambda: fetcher.stats.whole_shards == 1)  # which is counted after the file is in its place
    assert cache.find(SHARD) is not None
    assert get(fetcher, (50_000, 50_010)) == [DATA[50_000:50_010]]
    assert fetcher.stats.cached_reads >= 1  # the first read too, where the shard was faster
    assert fetcher.stats.cached_reads + fetcher.stats.block_reads == 2
    assert fetcher.stats.whole_shards == 1
    (tmp_path / "data" / "a.tar").unlink()  # the store is not asked any more
    assert get(ShardFetcher(uri, Storage(), cache), (0, 9)) == [DATA[:9]]


def test_a_shard_is_verified_and_completed_once_no_reader_waits_for_bytes(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "YIELD_S", 60.0)
    other = DATA[::-1]
    (tmp_path / "data" / "b.tar").write_bytes(other)
    later = ShardInfo("b.tar", 1, len(other), hashlib.sha256(other).hexdigest())
    cache, store = ShardCache(tmp_path / "cache", 1 << 20), Withholding()
    fetcher = ShardFetcher(uri, store, cache, block_bytes=len(DATA))
    wanted = [(SHARD, [Member(5, 4, zlib.crc32(DATA[5:9]))]), (later, [Member(5, 4, zlib.crc32(other[5:9]))])]
    reader = threading.Thread(target=fetcher.read, args=(wanted,))
    reader.start()
    eventually(lambda: SHARD.sha256 in fetcher._partial and 0 in fetcher._partial[SHARD.sha256].blocks)
    fetcher._partial[SHARD.sha256].blocks[0].result(20)
    time.sleep(0.1)
    assert cache.find(SHARD) is None
    store.may.set()
    reader.join()
    eventually(lambda: cache.find(SHARD) is not None and cache.find(later) is not None)


def test_what_a_fetcher_keeps_of_a_shard_goes_when_it_is_in_the_cache(uri, tmp_path):
    fetcher = ShardFetcher(uri, Storage(), ShardCache(tmp_path / "cache", 1 << 20), block_bytes=1000)
    fetcher.require([SHARD])
    eventually(lambda: not fetcher._partial)
    assert get(fetcher, (5, 9)) == [DATA[5:9]]


def test_a_copy_that_lost_its_bytes_is_fetched_again(uri, tmp_path, caplog):
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    ShardFetcher(uri, Storage(), cache).require([SHARD])
    with cache.path(SHARD).open("r+b") as file:
        file.write(bytes(2000))  # as after a loss of power
    fetcher = ShardFetcher(uri, Storage(), cache)
    assert get(fetcher, (3000, 3010), (1000, 1010)) == [DATA[3000:3010], DATA[1000:1010]]
    assert "is damaged, on this node's disk: it is fetched again" in caplog.text
    fetcher.require([SHARD])
    assert cache.find(SHARD).read_bytes() == DATA


def test_reading_goes_on_by_ranges_where_the_cache_cannot_be_used(uri, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    fetcher = ShardFetcher.opened(uri, Storage(), tmp_path / "file" / "cache", 1 << 20, ONE)
    assert "cannot be used" in caplog.text
    assert get(fetcher, (5, 9)) == [DATA[5:9]]
    later = ShardFetcher(uri, Storage(), ShardCache(tmp_path / "cache", 1 << 20))
    shutil.rmtree(tmp_path / "cache")  # somebody tidies up while the training runs
    assert get(later, (5, 9)) == [DATA[5:9]]


@pytest.fixture(params=["gone", "a file"])
def losing(request, uri, tmp_path):
    """Return a fetcher whose cache folder is lost as soon as the first bytes of a shard are on their way."""
    folder = tmp_path / "cache"

    def lose():
        shutil.rmtree(folder, ignore_errors=True)
        if request.param == "a file":  # so that not even the partial file can be deleted
            folder.write_bytes(b"")

    return ShardFetcher(uri, Meanwhile(happens=lose), ShardCache(folder, 1 << 20), block_bytes=1000)


def test_a_cache_folder_that_is_lost_while_a_shard_is_fetched_ends_no_reader(losing, caplog):
    waiting = losing._begin(SHARD, [Member(5, 4, zlib.crc32(DATA[5:9]))])
    assert isinstance(losing._partial[SHARD.sha256].done.exception(timeout=20), OSError)
    assert [bytes(data) for data in waiting()] == [DATA[5:9]]
    assert get(losing, (10, 20)) == [DATA[10:20]]
    assert get(losing, (50_000, 50_010)) == [DATA[50_000:50_010]]
    assert [r.message.startswith("shards are read by ranges: ") for r in caplog.records] == [True]


def test_nobody_waits_for_shards_in_a_cache_folder_that_is_lost(losing):
    losing.require([SHARD])
    assert losing.cache.find(SHARD) is None
    assert get(losing, (5, 9)) == [DATA[5:9]]


@pytest.mark.parametrize("call", ["pread", "utime"])
def test_a_copy_that_the_disk_does_not_give_is_read_from_the_store(uri, tmp_path, monkeypatch, call):
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    ShardFetcher(uri, Storage(), cache).require([SHARD])

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    assert cache.read(SHARD, [Member(5, 4, zlib.crc32(DATA[5:9]))]) is None
    assert get(ShardFetcher(uri, Storage(), cache), (5, 9)) == [DATA[5:9]]


def test_a_cache_folder_is_opened_once(tmp_path, monkeypatch):
    opened = []

    def refuse(folder, limit_bytes):
        opened.append(folder)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fetch, "ShardCache", refuse)
    assert ShardFetcher.opened("file:///data", Storage(), tmp_path, 1 << 20, ONE).cache is None
    assert opened == [tmp_path]


@pytest.mark.parametrize("whole", [False, True])
def test_a_broken_connection_is_resumed_from_the_byte_that_it_reached(uri, tmp_path, whole):
    store = Flaky(breaks=(30_500, 0, 20_000))
    if whole:
        cache = ShardCache(tmp_path / "cache", 1 << 20)
        ShardFetcher(uri, store, cache, block_bytes=len(DATA)).require([SHARD])
        assert cache.path(SHARD).read_bytes() == DATA
    else:
        fetcher = ShardFetcher(uri, store, None, block_bytes=len(DATA))
        assert get(fetcher, (0, len(DATA))) == [DATA]
    assert [start for start, _ in store.asked] == [0, 30_500, 30_500, 50_500]


def test_a_store_that_stays_away_is_an_error_when_patience_ends(uri):
    with pytest.raises(TransientStorageError, match="broke"):
        Flaky(breaks=(0,) * 100).fetch(f"{uri}/a.tar", 0, 10, len, patience_s=0.5)


def test_a_shard_that_is_cut_short_or_gone_is_named(uri, tmp_path):
    (tmp_path / "data" / "a.tar").write_bytes(DATA[:60_000])
    fetcher = ShardFetcher(uri, Storage(), None, block_bytes=1000)
    assert get(fetcher, (0, 10)) == [DATA[:10]]
    cut = r"a\.tar is cut short: it has 60,000 bytes, the index says 100,000: .*`ddpm check file:.*/data` "
    with pytest.raises(ShardShortError, match=cut):
        get(fetcher, (59_500, 60_600))
    with pytest.raises(ShardShortError, match=cut):
        get(fetcher, (90_000, 90_001))
    (tmp_path / "data" / "a.tar").unlink()
    with pytest.raises(StorageError, match="nothing is stored there"):
        get(fetcher, (90_000, 90_001))


def test_the_reader_of_what_is_left_of_a_shard_learns_that_it_is_cut(uri, tmp_path):
    """Its own bytes are there: the background request finds that others are not."""
    (tmp_path / "data" / "a.tar").write_bytes(DATA[:60_000])
    fetcher = ShardFetcher(uri, Storage(), ShardCache(tmp_path / "cache", 1 << 20), block_bytes=1000)
    errors = []

    def read():
        try:
            assert get(fetcher, (0, 10)) == [DATA[:10]]
        except ShardCorruptError as error:
            errors.append(str(error))
        return errors

    eventually(read)
    assert "is cut short: it has 60,000 bytes" in errors[0]
    with pytest.raises(ShardShortError, match="--quarantine it is left out"):
        fetcher.require([SHARD])
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"room"}


def test_a_failed_block_is_asked_for_again(uri, tmp_path):
    (tmp_path / "data" / "a.tar").rename(tmp_path / "away")
    fetcher = ShardFetcher(uri, Storage(), None)
    with pytest.raises(StorageError):
        get(fetcher, (0, 10))
    (tmp_path / "away").rename(tmp_path / "data" / "a.tar")
    assert get(fetcher, (0, 10)) == [DATA[:10]]


def test_a_shard_that_fails_its_checksum_twice_stops_the_reader_by_name(uri, tmp_path):
    (tmp_path / "data" / "a.tar").write_bytes(DATA[:500] + b"!" + DATA[501:])
    fetcher = ShardFetcher(uri, Storage(), ShardCache(tmp_path / "cache", 1 << 20))

    def read():
        try:
            get(fetcher, (0, 10))
        except ShardCorruptError as error:
            return error
        return None

    errors = []

    def refused():
        errors.append(read())
        return errors[-1] is not None

    eventually(refused)
    assert "a.tar has SHA-256" in str(errors[-1])
    assert "on two downloads" in str(errors[-1])
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_processes_of_a_node_bring_a_shard_in_once(uri, tmp_path):
    """Locks of two caches on one folder exclude each other as those of two processes do."""
    stores = [Flaky(), Flaky(), Flaky()]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{SHARD.sha256}.part").write_bytes(b"left by a process that was killed")
    caches = [ShardCache(tmp_path / "cache", 1 << 20) for _ in stores]
    assert not list((tmp_path / "cache").glob("*.part"))
    threads = [
        threading.Thread(target=ShardFetcher(uri, store, cache).require, args=([SHARD],))
        for cache, store in zip(caches, stores, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(store.asked) for store in stores) == 1
    assert caches[0].find(SHARD).read_bytes() == DATA


def test_a_fetch_of_another_process_that_is_stopped_is_not_waited_for(uri, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fetch, "STALLED_S", 0.3)
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    stopped = cache.claim(SHARD, 1000)  # and never gets on: a lock of a file is that of whoever has opened it
    assert stopped is not None
    fetcher = ShardFetcher(uri, Storage(), ShardCache(tmp_path / "cache", 1 << 30))
    fetcher.require([SHARD])
    assert cache.find(SHARD) is None
    assert "has written nothing for 0 s: it is read without it" in caplog.text
    stopped.give_up(StorageError("it is over"))
    fetcher.close()


def test_a_process_that_was_stopped_while_it_made_room_is_not_waited_for(uri, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "cache"
    before = ShardCache(folder, 1 << 30)
    monkeypatch.setattr(cache_module, "STALLED_S", 0.2)
    with (folder / "room").open("a") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)  # and never lets go: a lock of a file is that of whoever has opened it
        with pytest.raises(StorageError, match=r"has held .*/room for 0 s .* set data\.cache_dir"):
            before.claim(SHARD, 1000)
        fetcher = ShardFetcher(uri, Storage(), ShardCache(folder, 1 << 30))
        fetcher.require([SHARD])
        assert before.find(SHARD) is None
        assert "shards are read by ranges: another process has held" in caplog.text
    fetcher.close()
    assert before.claim(SHARD, 1000) is not None
