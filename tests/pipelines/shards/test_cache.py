"""A node's cache takes no more of the disk than its limit, whoever reads from it and whoever is killed."""

import fcntl
import hashlib
import io
import json
import os
import random
import signal
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipelines.shards import cache as shard_cache
from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.cache import ShardCache
from pipelines.shards.fetch import ShardFetcher
from pipelines.shards.index import Member, ShardInfo, read_dataset
from pipelines.shards.stream import StreamSettings
from pipelines.shards.torch_dataset import ShardDataset
from pipelines.shards.working_set import WorkingSet
from pipelines.storage import Storage, StorageError
from tests.forked import FORKING

LIMIT = 4 << 20
SHARDS, SAMPLES, EPOCHS, RANKS, BATCH = 20, 36, 2, 3, 48


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """Twenty shards, of which eight are in use at a time and just fit."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"train-{shard:02d}.tar", "w") as tar:
            for index in range(SAMPLES):
                buffer = io.BytesIO()
                np.save(buffer, rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
                info = tarfile.TarInfo(f"{shard:02d}-{index:03d}.npy")
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return index_tars(f"file://{folder}", Storage()).dataset.uri


def read_rank(uri: str, cache: Path, rank: int, notes: Path) -> None:
    """Note the digest of every sample of this rank over some epochs."""
    settings = StreamSettings(lanes=2, window=2, seed=3, cache_dir=cache, cache_bytes=LIMIT)
    source = ShardDataset(
        read_dataset(uri, Storage()), "train", Storage(), settings, batch_size=BATCH, rank=rank, world_size=RANKS
    )
    with notes.open("w") as file:
        for sample in source:
            if sample["__ordinal__"] >= EPOCHS * SHARDS * SAMPLES:
                break
            print(json.dumps([sample["__key__"], hashlib.sha256(sample["npy"]).hexdigest()]), file=file, flush=True)
            time.sleep(0.003)  # a step of training


def occupied(cache: Path, pids: list[int]) -> int | None:
    """Bytes that the cache takes of the disk: its files, and deleted ones that a process has open or mapped.

    None where they changed while they were counted: what is deleted and what comes in its place would count both.
    """
    before = inodes_of(cache, pids)
    return sum(before.values()) if before == inodes_of(cache, pids) else None


def inodes_of(cache: Path, pids: list[int]) -> dict[int, int]:
    """Bytes by inode, as they are found one after another."""
    inodes = {}
    for path in cache.iterdir():
        try:
            inodes[path.stat().st_ino] = path.stat().st_size
        except FileNotFoundError:
            continue
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                span, _, _, _, inode, *name = line.split(maxsplit=5)
                if name and name[0].startswith(str(cache)):
                    first, last = (int(part, 16) for part in span.split("-"))
                    inodes.setdefault(int(inode), last - first)
            for link in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    if os.readlink(link).startswith(str(cache)):
                        inodes.setdefault(link.stat().st_ino, link.stat().st_size)
                except FileNotFoundError:
                    continue
        except (FileNotFoundError, ProcessLookupError):
            continue
    return inodes


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what is mapped from Linux's /proc")
def test_processes_that_share_a_cache_keep_its_limit_on_the_disk_and_read_every_sample(uri, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    notes = [tmp_path / str(rank) for rank in range(RANKS)]
    ranks = [FORKING.Process(target=read_rank, args=(uri, cache, rank, notes[rank])) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    peak, looks = 0, 0
    deadline = time.monotonic() + 120
    while any(process.is_alive() for process in ranks):
        assert time.monotonic() < deadline, "the ranks are stuck"
        found = occupied(cache, [process.pid for process in ranks])  # type: ignore[misc]
        if found is not None:
            peak, looks = max(peak, found), looks + 1
    assert [process.exitcode for process in ranks] == [0] * RANKS

    shards = read_dataset(uri, Storage()).shards("train")
    assert sum(shard.bytes for shard in shards) > 2 * LIMIT  # else there is nothing to delete
    assert looks > 20
    assert LIMIT / 2 < peak <= LIMIT + max(shard.bytes for shard in shards)
    stored = {}
    for path in Path(uri.removeprefix("file://")).glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                stored[member.name.removesuffix(".npy")] = hashlib.sha256(tar.extractfile(member).read()).hexdigest()
    read = Counter(tuple(json.loads(line)) for note in notes for line in note.read_text().splitlines())
    assert read == Counter(dict.fromkeys(stored.items(), EPOCHS))
    assert not list(cache.glob("*.lock"))
    print(f"peak {peak / 2**20:.2f} MiB of {LIMIT / 2**20:.0f} in {looks} looks")


def shard(number: int, size: int) -> tuple[ShardInfo, bytes]:
    data = random.Random(number).randbytes(size)
    return ShardInfo(f"{number}.tar", 1, size, hashlib.sha256(data).hexdigest()), data


def stored(folder: Path, count: int, size: int) -> list[ShardInfo]:
    folder.mkdir()
    infos = []
    for number in range(count):
        info, data = shard(number, size)
        (folder / info.name).write_bytes(data)
        infos.append(info)
    return infos


def used(cache: ShardCache, infos: list[ShardInfo]) -> None:
    """As if they had been used a second apart."""
    for second, info in enumerate(infos):
        os.utime(cache.path(info), (second, second))


def test_room_is_made_before_a_shard_is_fetched_and_not_after(tmp_path):
    shards = stored(tmp_path / "data", 3, 1000)
    cache = ShardCache(tmp_path / "cache", 2500)
    fetcher = ShardFetcher(f"file://{tmp_path}/data", Storage(), cache)
    fetcher.require(shards[:2])
    used(cache, shards[:2])
    partial = cache.claim(shards[2], 100)
    assert {path.name for path in cache.folder.iterdir() if path.stat().st_size} == {
        cache.path(shards[1]).name,  # the least recently used one is gone
        cache.partial_path(shards[2]).name,
    }
    partial.close()
    assert [path.suffix for path in cache.folder.iterdir() if path.stat().st_size] == [".tar"]


def test_shards_that_were_required_can_be_deleted_at_once(tmp_path, monkeypatch):
    """Their fetcher holds none of them any longer: else one that was used later would be deleted in its place."""
    shards = stored(tmp_path / "data", 2, 1000)
    cache = ShardCache(tmp_path / "cache", 2500)
    replace = Path.replace

    def linger(path: Path, target: Path) -> Path:
        renamed = replace(path, target)
        time.sleep(0.2 if target == cache.path(shards[0]) else 0.6)
        return renamed

    monkeypatch.setattr(Path, "replace", linger)
    ShardFetcher(f"file://{tmp_path}/data", Storage(), cache).require(shards)
    assert all(cache.path(info).exists() for info in shards)
    ShardCache(cache.folder, 500)
    assert not any(cache.path(info).exists() for info in shards)


def test_a_shard_that_is_completed_while_room_is_made_counts_once(tmp_path, monkeypatch):
    shards = stored(tmp_path / "data", 2, 1000)
    cache, list_sizes = ShardCache(tmp_path / "cache", 2500), shard_cache._sizes
    partial = cache.claim(shards[0], 1000)
    partial.put(0, (tmp_path / "data" / shards[0].name).read_bytes())

    def completed_meanwhile(folder: Path, endings: tuple[str, ...], known: dict[Path, int]):
        found = list_sizes(folder, endings, known)
        if endings == (".part",) and cache.find(shards[0]) is None:
            assert partial.admit()
        return found

    monkeypatch.setattr(shard_cache, "_sizes", completed_meanwhile)
    assert cache.claim(shards[1], 1000) is not None
    assert cache.find(shards[0]) is not None


def test_a_cache_full_of_partial_shards_has_no_room_and_deletes_nothing_for_it(tmp_path, caplog):
    shards = stored(tmp_path / "data", 4, 1000)
    cache = ShardCache(tmp_path / "cache", 2500)
    fetcher = ShardFetcher(f"file://{tmp_path}/data", Storage(), cache)
    fetcher.require(shards[:1])
    held = cache.claim(shards[1], 100)
    second = cache.claim(shards[2], 100)
    with pytest.raises(StorageError, match=r"no room for 1,000 bytes of 3\.tar .* 2,500 bytes are taken .* raise data"):
        cache.claim(shards[3], 100)
    second.close()
    # A reader does not wait for room, which might wait for the reader.
    first = cache.claim(shards[0], 100)
    data = shard(3, 1000)[1]
    assert bytes(fetcher.read([(shards[3], [Member(5, 20, zlib.crc32(data[5:25]))])])[0][0]) == data[5:25]
    assert "shards are read by ranges: no room" in caplog.text
    held.close()
    first.close()


def hold(folder: str, info: ShardInfo, ready) -> None:
    partial = ShardCache(Path(folder), 10_000).claim(info, 100)
    assert partial is not None
    ready.set()
    signal.pause()


def test_what_a_killed_process_has_left_is_removed_and_what_a_living_one_fetches_is_not(tmp_path):
    shards = stored(tmp_path / "data", 2, 1000)
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / f"{shards[0].sha256}.lock").touch()  # as releases before this one left them
    ready = FORKING.Event()
    process = FORKING.Process(target=hold, args=(str(folder), shards[0], ready))
    process.start()
    try:
        assert ready.wait(60)
        cache = ShardCache(folder, 10_000)
        assert cache.is_claimed(shards[0])
        assert cache.claim(shards[0], 100) is None
    finally:
        process.kill()
        process.join()
    assert cache.partial_path(shards[0]).exists()
    ShardCache(folder, 10_000)
    assert {path.name for path in folder.iterdir()} == {"room"}


def test_a_shard_that_is_being_read_is_not_deleted(tmp_path):
    shards = stored(tmp_path / "data", 2, 1000)
    cache = ShardCache(tmp_path / "cache", 1500)
    ShardFetcher(f"file://{tmp_path}/data", Storage(), cache).require(shards[:1])
    with cache.path(shards[0]).open("rb") as reading:
        fcntl.flock(reading, fcntl.LOCK_SH)
        with pytest.raises(StorageError, match="no room"):
            cache.claim(shards[1], 100)
        assert cache.find(shards[0]) is not None
    assert cache.claim(shards[1], 100) is not None
    assert cache.find(shards[0]) is None


def test_a_lower_limit_holds_from_the_next_start_on(tmp_path):
    shards = stored(tmp_path / "data", 4, 1000)
    cache = ShardCache(tmp_path / "cache", 10_000)
    ShardFetcher(f"file://{tmp_path}/data", Storage(), cache).require(shards)
    used(cache, shards)
    lower = ShardCache(tmp_path / "cache", 2000)
    assert [lower.find(info) is not None for info in shards] == [False, False, True, True]


def test_reading_by_ranges_caches_no_shard_and_keeps_an_earlier_cache_to_the_limit(uri, tmp_path):
    dataset = read_dataset(uri, Storage())
    shards = dataset.shards("train")

    def opened(limit: int) -> ShardFetcher:
        return ShardFetcher.opened(uri, Storage(), tmp_path / "cache", limit, WorkingSet.of([(4, shards)], 4, 1))

    assert opened(shards[0].bytes).cache is None
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["room"]  # which is for indexes, too
    opened(LIMIT).require(shards[:4])
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 4
    assert opened(shards[0].bytes).cache is None
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
