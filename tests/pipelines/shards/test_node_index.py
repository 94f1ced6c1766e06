"""The index of a node: one copy for its processes, that of the store to the bit, and made again where it is wrong."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.shards.cache import ShardCache
from pipelines.shards.columns import WIDE_COLUMN, Texts
from pipelines.shards.index import Member, ShardIndex, ShardInfo
from pipelines.shards.node_index import OPEN, UNUSED, NodeIndex, packed, unpacked
from pipelines.shards.source import ShardCorruptError, ShardSource
from pipelines.storage import Storage, layout
from tests.forked import FORKING

RANKS = 8


def made(folder: Path, number: int = 0, samples: int = 5) -> tuple[ShardInfo, ShardIndex]:
    """A shard without bytes, and the index beside it."""
    folder.mkdir(exist_ok=True)
    members = [{"png": Member(512 * n, n + number, n), "cls": Member(512 * n + 300, 1, 7)} for n in range(samples)]
    index = ShardIndex.of([f"{number}-{n}" for n in range(samples)], members)
    name = f"train-{number}.tar"
    (folder / layout.index_name(name)).write_text(index.to_json())
    return ShardInfo(name, samples, 10_240, hashlib.sha256(name.encode()).hexdigest()), index


def source_of(folder: Path) -> ShardSource:
    return ShardSource(f"file://{folder}", Storage())


def read_rank(folder: Path, cache: Path, shards: list[ShardInfo], pipe) -> None:
    """Read indexes as a rank, and tell how many came from the store, and which files are mapped."""
    asked: list[str] = []

    class Source(ShardSource):
        def read_sidecar(self, shard: ShardInfo) -> bytes:
            asked.append(shard.name)
            return super().read_sidecar(shard)

    node, source = NodeIndex(ShardCache(cache, 1 << 20)), Source(f"file://{folder}", Storage())
    pipe.recv()
    found = node.get(shards, source)
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".index" in line}
    pipe.send((len(asked), mapped, [index.to_json() for index in found]))
    pipe.recv()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what is mapped from Linux's /proc")
def test_eight_processes_read_each_sidecar_once_and_map_the_same_files(tmp_path):
    shards, indexes = zip(*(made(tmp_path / "data", number) for number in range(6)), strict=True)
    pipes = [multiprocessing.Pipe() for _ in range(RANKS)]
    ranks = [
        FORKING.Process(target=read_rank, args=(tmp_path / "data", tmp_path / "cache", list(shards), there))
        for _, there in pipes
    ]
    for process in ranks:
        process.start()
    for here, _ in pipes:
        here.send("go")
    found = [here.recv() for here, _ in pipes]
    for here, _ in pipes:
        here.send("end")
    for process in ranks:
        process.join()
    assert sum(asked for asked, _, _ in found) == len(shards)
    paths = {str(tmp_path / "cache" / f"{shard.sha256}.index") for shard in shards}
    assert all(mapped == paths for _, mapped, _ in found)
    assert all(texts == [index.to_json() for index in indexes] for _, _, texts in found)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {Path(path).name for path in paths} | {"room"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: bytes(len(data)),
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    ],
    ids=["cut", "cut in its digest", "empty", "zeros", "a bit"],
)
def test_a_damaged_copy_is_made_again(damage, tmp_path, caplog):
    shard, index = made(tmp_path / "data")
    cache, source = ShardCache(tmp_path / "cache", 1 << 20), source_of(tmp_path / "data")
    NodeIndex(cache).read(shard, source)
    path = cache.index_path(shard)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert NodeIndex(cache).read(shard, source) == index
    assert path.read_bytes() == whole
    assert "is damaged, on this node's disk" in caplog.text


def test_the_copy_of_another_shard_or_number_of_samples_is_not_taken(tmp_path):
    (shard, index), (other, _) = made(tmp_path / "data"), made(tmp_path / "data", 1)
    cache, source = ShardCache(tmp_path / "cache", 1 << 20), source_of(tmp_path / "data")
    NodeIndex(cache).read(other, source)
    cache.index_path(other).rename(cache.index_path(shard))
    assert NodeIndex(cache).read(shard, source) == index
    fewer = ShardInfo(shard.name, shard.samples - 1, shard.bytes, shard.sha256)
    with pytest.raises(ShardCorruptError, match="lists 5 samples"):
        NodeIndex(cache).read(fewer, source)


def test_what_did_not_fit_its_bytes_is_forgotten_so_that_a_mended_sidecar_is_read(tmp_path):
    shard, _ = made(tmp_path / "data")
    cache, source = ShardCache(tmp_path / "cache", 1 << 20), source_of(tmp_path / "data")
    node = NodeIndex(cache)
    node.get([shard], source)
    _, mended = made(tmp_path / "data")
    mended.columns["png"]["crc32"] += 1
    (tmp_path / "data" / layout.index_name(shard.name)).write_text(mended.to_json())
    assert node.get([shard], source) != [mended]
    node.forget([shard])
    assert node.get([shard], source) == [mended]


@pytest.mark.parametrize("limit", [None, 0, 100])
def test_without_a_cache_or_room_in_it_a_process_keeps_its_own(limit, tmp_path):
    shard, index = made(tmp_path / "data")
    cache = None if limit is None else ShardCache(tmp_path / "cache", limit)
    assert NodeIndex(cache).read(shard, source_of(tmp_path / "data")) == index
    assert not list(tmp_path.glob("cache/*index*"))


def test_indexes_that_are_not_in_use_make_room_and_stay_within_the_limit(tmp_path):
    made_ones = [made(tmp_path / "data", number) for number in range(40)]
    size = len(packed(made_ones[0][1], made_ones[0][0]))
    cache, source = ShardCache(tmp_path / "cache", 10 * size), source_of(tmp_path / "data")
    kept = NodeIndex(cache).read(made_ones[0][0], source)
    for shard, index in made_ones[1:]:
        assert NodeIndex(cache).read(shard, source) == index
        there = [path.stat().st_size for path in (tmp_path / "cache").glob("*.index")]
        assert sum(there) <= 10 * size
    assert len(there) > 5
    assert cache.index_path(made_ones[0][0]).exists()  # it is in use
    assert kept == made_ones[0][1]


def test_indexes_are_closed_when_their_windows_have_ended(tmp_path):
    shards = [made(tmp_path / "data", number)[0] for number in range(3)]
    node, source = NodeIndex(ShardCache(tmp_path / "cache", 1 << 20)), source_of(tmp_path / "data")

    def open_files() -> set[str]:
        links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        return {Path(link).stem for link in links if link.endswith(".index")}

    node.get(shards, source)
    for _ in range(UNUSED - 1):
        node.get(shards[:1], source)
    assert open_files() == {shard.sha256 for shard in shards}
    node.get(shards[:1], source)
    assert open_files() == {shards[0].sha256}
    assert UNUSED < OPEN


texts = st.text(st.characters(), max_size=6)
numbers = st.integers(0, 2**32 - 1)
narrow = st.builds(Member, st.integers(1, 2**32 - 1).map(lambda block: 512 * block), numbers, numbers)
members = narrow | st.builds(Member, st.integers(0, 2**62), st.integers(0, 2**33), numbers)


@given(st.lists(st.tuples(texts, st.dictionaries(st.sampled_from(["png", "cls", "emb.npy"]), members)), max_size=8))
def test_an_index_is_the_same_in_its_file_and_in_its_sidecar(samples):
    index = ShardIndex.of([key for key, _ in samples], [each for _, each in samples])
    shard = ShardInfo("a.tar", len(index), 1, "ab")
    again = unpacked(packed(index, shard), shard)
    assert again == index == ShardIndex.from_json(index.to_json())
    assert again.to_json() == index.to_json()
    assert [again.members(i) for i in range(len(again))] == [
        dict(sorted(each.items(), key=lambda item: item[1].offset)) for _, each in samples
    ]


def test_a_member_of_more_than_4_gib_takes_a_wider_column():
    index = ShardIndex.of(["a", "b"], [{"npy": Member(0, 2**32, 1)}, {}])
    assert index.columns["npy"].dtype == WIDE_COLUMN
    assert index.members(0) == {"npy": Member(0, 2**32, 1)}
    assert index.members(1) == {}


@given(st.lists(texts))
def test_texts_are_those_that_they_were_made_of(given_texts):
    found = Texts.of(given_texts)
    assert list(found) == given_texts
    assert found[1:] == tuple(given_texts[1:])
    assert found == Texts.of(iter(given_texts))
    with pytest.raises(IndexError):
        found[len(given_texts)]
    assert np.array_equal(found.ends[:1], [0])
