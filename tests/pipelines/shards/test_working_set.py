"""The lanes that a node reads, counted in the order itself, and what they decide."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.shards.index import Dataset, MixtureSource, ShardInfo
from pipelines.shards.mixture import MixtureOrder, Schedule, shared_lanes
from pipelines.shards.order import SampleOrder, span_of
from pipelines.shards.stream import StreamSettings
from pipelines.shards.torch_dataset import ShardDataset, StreamDataset
from pipelines.shards.working_set import NodePiece, WorkingSet, lanes_of, lanes_of_mixture, ranks_of_node, working_set
from pipelines.storage import Storage


def nodes_of(sizes: list[int]) -> list[range]:
    """Consecutive ranks, so many on each node."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [range(a, b) for a, b in pairwise(ends)]


def lanes_read(order: SampleOrder, start: int, size: int, span: slice) -> set[int]:
    """The lanes of positions of a sorted batch, by the order itself: lanes of equal shards are the ordinals in turn."""
    return {int(n) % order.lanes for n in order.sorted_ordinals(start, size, span)}


@given(
    lanes=st.integers(1, 24),
    size=st.integers(24, 100),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
)
@example(lanes=16, size=24, sizes=[1, 1, 1, 1, 1])  # lane 7 of 4 to 10 is unread
def test_the_lanes_of_a_node_reach_from_the_first_to_the_last_that_its_ranks_read_in_some_batch(lanes, size, sizes):
    order = SampleOrder([lanes * size] * lanes, lanes=lanes, window=1, seed=0, digest="d")
    world = sum(sizes)
    covered: set[int] = set()
    for ranks in nodes_of(sizes):
        piece = NodePiece.of(size, ranks, world)
        read: set[int] = set()
        for start in range(0, lanes * size, size):  # after so many batches the edges are where they began
            of_ranks = [lanes_read(order, start, size, span_of(size, rank, world)) for rank in ranks]
            assert set().union(*of_ranks) == lanes_read(order, start, size, piece.span)
            read = read.union(*of_ranks)
        found = lanes_of(size, lanes, piece.span)
        # One between them may stay unread, where batches begin at few of the lanes.
        assert found == range(min(read), max(read) + 1)
        covered |= read
    assert covered == set(range(lanes))


@given(each=st.integers(1, 6), lanes=st.integers(1, 64), sizes=st.lists(st.integers(1, 8), min_size=1, max_size=12))
def test_where_lanes_divide_the_batch_nodes_have_together_a_lane_more_for_each_edge_at_most(each, lanes, sizes):
    size, world = each * lanes, sum(sizes)
    if world > size:
        return
    found = [lanes_of(size, lanes, NodePiece.of(size, ranks, world).span) for ranks in nodes_of(sizes)]
    assert found[0].start == 0
    assert found[-1].stop == lanes
    assert all(b.start in (a.stop - 1, a.stop) for a, b in pairwise(found))
    assert lanes <= sum(map(len, found)) <= lanes + len(sizes) - 1


@given(
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    lanes=st.integers(4, 12),
    each=st.integers(2, 8),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
)
def test_the_lanes_of_a_node_in_a_mixture_hold_all_that_it_reads_and_few_others(weights, lanes, each, sizes):
    size, world = each * lanes, sum(sizes)
    if world > size:
        return
    shares = {0: [float(weight) for weight in weights]}
    own = shared_lanes(lanes, shares)
    orders = [SampleOrder([10_000] * k, lanes=k, window=1, seed=0, digest=f"{i}") for i, k in enumerate(own)]
    order = MixtureOrder(orders, Schedule(shares))
    first = np.cumsum([0, *own])  # with one shard in a lane, shards are lanes
    for ranks in nodes_of(sizes):
        piece = NodePiece.of(size, ranks, world)
        read: set[int] = set()
        for start in range(0, 60 * size, size):
            read |= set(order.part(start, size, piece.span).shards.tolist())
        found = lanes_of_mixture(order.schedule, own, piece)
        counted = [sum(a <= shard < b for shard in read) for a, b in pairwise(first.tolist())]
        assert all(f >= c for f, c in zip(found, counted, strict=True))
        assert sum(found) <= sum(counted) + 2 * len(own)
        assert all(f <= k for f, k in zip(found, own, strict=True))


def make_dataset(count: int, size: int = 100, sources: tuple[MixtureSource, ...] = ()) -> Dataset:
    each = sources or (None,)
    shards = tuple(
        ShardInfo(f"train-{i:06d}.tar", 10, size, f"{i}-{source and source.name}", *([source] if source else []))
        for source in each
        for i in range(count)
    )
    return Dataset("file:///data", {"train": shards, "test": ()}, (), 1, 8, (0.0,), (1.0,), "d", sources=sources)


def test_a_node_needs_room_for_twice_the_windows_of_its_own_lanes():
    dataset = make_dataset(10_000)
    whole = working_set(dataset, "train", 64, 4)
    assert whole == WorkingSet(64, 64, 4, 2 * 64 * 4 * 100)
    of_node = [working_set(dataset, "train", 64, 4, NodePiece.of(512, ranks, 64)) for ranks in nodes_of([8] * 8)]
    assert of_node == [WorkingSet(8, 64, 4, 2 * 8 * 4 * 100)] * 8
    assert [each.fits(2 * 8 * 4 * 100) for each in (whole, of_node[0])] == [False, True]
    assert not of_node[0].fits(2 * 8 * 4 * 100 - 1)


def test_no_more_room_is_needed_than_all_shards_take():
    assert working_set(make_dataset(3), "train", 8, 4) == WorkingSet(3, 3, 4, 300)
    assert working_set(make_dataset(3), "test", 8, 4) == WorkingSet(0, 0, 4, 0)
    assert working_set(make_dataset(3), "test", 8, 4, NodePiece.of(8, range(1), 1)).lanes == 0


@pytest.mark.parametrize("nodes, ways", [(1, ["ranges"]), (8, ["whole shards"] * 8)])
def test_the_choice_is_a_line_with_its_numbers_and_the_setting_that_changes_it(nodes, ways):
    gib = 1 << 30
    dataset = make_dataset(10_000, size=gib // 10)
    for ranks, way in zip(nodes_of([64 // nodes] * nodes), ways, strict=True):
        used = working_set(dataset, "train", 64, 4, NodePiece.of(512, ranks, 64))
        line = used.choice(20 * gib)
        assert way in line.split(":")[0]
        assert "data.cache_gib=20" in line
        assert f"{64 // nodes} of 64 lanes" in line
        assert f"{6.4 * 8 / nodes:.2f} GiB" in line
        assert ("raise that, or begin a run with fewer data.lanes" in line) == (nodes == 1)


def test_of_a_mixture_each_source_counts_with_the_size_of_its_own_shards():
    large, small = (MixtureSource(name, f"file:///{name}", name, {0: 1.0}, ()) for name in ("large", "small"))
    plain = make_dataset(100, sources=(large, small))
    shards = tuple(
        ShardInfo(s.name, s.samples, 1_000 if s.source == large else 10, s.sha256, s.source)
        for s in plain.shards("train")
    )
    dataset = Dataset(*(plain.uri, {"train": shards}, (), 1, 8, (0.0,), (1.0,), "d"), sources=(large, small))
    assert working_set(dataset, "train", 8, 2) == WorkingSet(8, 8, 2, 2 * 2 * (4 * 1_000 + 4 * 10))
    first, second = (working_set(dataset, "train", 8, 2, NodePiece.of(64, range(n, n + 1), 2)) for n in (0, 1))
    assert (first.lanes, second.lanes) == (4, 4)  # a batch is sorted by source first
    assert (first.bytes, second.bytes) == (2 * 2 * 4 * 1_000, 2 * 2 * 4 * 10)


@pytest.fixture
def node(monkeypatch):
    def set_node(local: int | None, count: int | None) -> None:
        for name, value in (("LOCAL_RANK", local), ("LOCAL_WORLD_SIZE", count)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, str(value))

    return set_node


@pytest.mark.parametrize(
    "rank, local, count, world, ranks",
    [
        (5, 1, 4, 8, range(4, 8)),
        (0, 0, 4, 8, range(4)),
        (6, 1, 2, 7, range(5, 7)),  # nodes of several sizes
        (5, None, None, 8, range(8)),  # nobody says
        (0, 3, 4, 1, range(1)),  # said to a larger group of processes
        (3, 0, 8, 4, range(4)),
    ],
)
def test_the_ranks_of_a_node_are_those_beside_a_rank_and_all_where_nobody_says(node, rank, local, count, world, ranks):
    node(local, count)
    assert ranks_of_node(rank, world) == ranks


@pytest.mark.parametrize("kind", [ShardDataset, StreamDataset])
def test_in_a_loop_of_your_own_the_lanes_of_the_node_decide_too(node, tmp_path, monkeypatch, kind):
    opened: list[NodePiece] = []

    def note(*arguments, piece):
        opened.append(piece)
        raise InterruptedError

    monkeypatch.setattr(f"{kind.__module__}.open_stream", note)
    node(1, 2)
    settings = StreamSettings(lanes=8, window=2, seed=0, cache_dir=tmp_path, cache_bytes=1)
    source = kind(make_dataset(10), "train", Storage(), settings, batch_size=64, rank=3, world_size=8)
    with pytest.raises(InterruptedError):
        next(iter(source))
    assert opened == [NodePiece(64, slice(16, 32))]
