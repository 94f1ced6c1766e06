"""What an epoch costs in bytes on N nodes with a cache each: little more than the dataset once, whatever the ranks."""

import io
import re
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.order import SampleOrder
from pipelines.shards.stream import StreamSettings, open_stream
from pipelines.storage import Storage


@dataclass(frozen=True)
class Node:
    """Shards that a node needs in an epoch.

    Attributes:
        body: while all lanes live.
        tail: only from the first lane's end on, when the live lanes are spread over the ranks again.
    """

    body: frozenset[int]
    tail: frozenset[int]


def tail_start(order: SampleOrder, epoch: int = 0) -> int:
    """The epoch's first sample with a lane less alive; its end where all lanes end together."""
    segments = order._plan(epoch).segment_start
    return epoch * order.total + (int(segments[1]) if len(segments) > 1 else order.total)


def plan(order: SampleOrder, batch_size: int, nodes: int, ranks: int, epoch: int = 0) -> list[Node]:
    """Per node the shards that the pieces of its ranks lie in, which are spans of the batch (see test_order.py)."""
    world = nodes * ranks
    first, first_end, end = epoch * order.total, tail_start(order, epoch), (epoch + 1) * order.total
    body: list[set[int]] = [set() for _ in range(nodes)]
    tail: list[set[int]] = [set() for _ in range(nodes)]
    for start in range(first // batch_size * batch_size, end, batch_size):
        batch = order.batch(start, batch_size)
        of_epoch = (first <= batch.ordinals) & (batch.ordinals < end)
        where = body if start + batch_size <= first_end or first_end == end else tail
        for rank in range(world):
            piece = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
            where[rank // ranks] |= set(batch.shards[piece][of_epoch[piece]].tolist())
    return [Node(frozenset(b), frozenset(t - b)) for b, t in zip(body, tail, strict=True)]


def fetched(nodes: list[Node], sizes: list[int]) -> tuple[int, int]:
    """(body, tail) in bytes over all nodes, each shard once per node."""
    return tuple(sum(sizes[s] for node in nodes for s in getattr(node, part)) for part in ("body", "tail"))


@given(
    per_lane=st.integers(1, 4),
    samples=st.integers(5, 30),
    lanes=st.sampled_from([4, 6, 8, 12]),
    window=st.integers(1, 4),
    nodes=st.integers(1, 5),
    ranks=st.integers(1, 4),
    epoch=st.integers(0, 2),
)
def test_equal_shards_cost_the_dataset_and_a_lane_more_per_further_node(
    per_lane, samples, lanes, window, nodes, ranks, epoch
):
    shards = per_lane * lanes
    order = SampleOrder([samples] * shards, lanes=lanes, window=window, seed=1, digest="d")
    body, tail = fetched(plan(order, 5 * lanes, nodes, ranks, epoch), [1] * shards)
    assert tail == 0
    assert body * lanes <= shards * (lanes + nodes - 1)


@given(
    sizes=st.lists(st.integers(1, 50), min_size=8, max_size=40),
    lanes=st.sampled_from([4, 6, 8]),
    window=st.integers(1, 4),
    nodes=st.integers(1, 5),
    ranks=st.integers(1, 3),
)
def test_ragged_shards_cost_a_tail_more(sizes, lanes, window, nodes, ranks):
    """At least a shard for every lane; with fewer, lanes do not divide the batch and their edges wander."""
    order = SampleOrder(sizes, lanes=lanes, window=window, seed=1, digest="d")
    body, tail = fetched(plan(order, 5 * lanes, nodes, ranks), sizes)
    assert body <= sum(sizes) * (1 + (nodes - 1) / lanes) + (nodes - 1) * max(sizes)
    first = tail_start(order) // (5 * lanes) * 5 * lanes
    late = set(order.locate(np.arange(first, order.total)).shards.tolist())
    assert tail <= nodes * sum(sizes[shard] for shard in late)


TABLE = re.findall(
    r"^\| ([\d,]+), (\d+), (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
    (Path(__file__).parents[3] / "docs" / "datasets.md").read_text(),
    re.MULTILINE,
)


def test_the_page_has_the_table_that_it_says_it_has():
    assert len(TABLE) == 4


@pytest.mark.heavy
@pytest.mark.parametrize("line", TABLE, ids=lambda line: "-".join(line[:3]))
def test_the_table_of_the_page_on_datasets_is_of_the_order_of_samples(line):
    shards, lanes, window = (int(number.replace(",", "")) for number in line[:3])
    sizes = [100] * (shards - 1) + [50]
    order = SampleOrder(sizes, lanes=lanes, window=window, seed=0, digest="d")
    found = [sum(fetched(plan(order, 8 * lanes, nodes, 1), sizes)) / sum(sizes) for nodes in (2, 4, 8)]
    assert [f"{times:.2f}" for times in found] == list(line[3:])


SIZES = [100] * 22 + [70, 30]
"""Samples of 12 KiB: 23 shards' worth, so that lanes end apart."""


@dataclass(frozen=True)
class Counting(Storage):
    """Files that note what is asked of every tar: (name, start, stop) of each request."""

    requests: list[tuple[str, int, int]] = field(default_factory=list, compare=False)

    def fetch(self, uri, start, stop, sink, **options):
        if uri.endswith(".tar"):
            self.requests.append((uri.rpartition("/")[2], start, stop))
        return super().fetch(uri, start, stop, sink, **options)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    random = np.random.default_rng(0)
    for shard, size in enumerate(SIZES):
        with tarfile.open(folder / f"train-{shard:02d}.tar", "w") as tar:
            for index in range(size):
                buffer = io.BytesIO()
                np.save(buffer, random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
                info = tarfile.TarInfo(f"{shard:02d}-{index:03d}.npy")
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return index_tars(f"file://{folder}", Storage()).dataset


@pytest.mark.parametrize("nodes, ranks", [(1, 1), (2, 3), (3, 2), (4, 1)])
def test_each_node_fetches_a_shard_whole_once_whatever_its_ranks(dataset, tmp_path, capsys, nodes, ranks):
    """Six ranks do not divide eight lanes. A rank alone on its node fetches no byte twice; others read
    ranges of a shard that one of them brings in."""
    lanes, batch_size, storage = 8, 40, Counting()
    opened = []
    for node in range(nodes):
        settings = StreamSettings(lanes, 2, 0, tmp_path / str(node), 10**9)
        opened += [open_stream(dataset, "train", storage, settings) for _ in range(ranks)]
    order, keys = opened[0][1], set()
    for start in range(0, order.total, batch_size):
        size = min(batch_size, order.total - start)
        for rank, (reader, _) in enumerate(opened):
            keys |= {sample["__key__"] for sample in reader.samples(order.piece(start, size, rank, nodes * ranks))}
    assert len(keys) == order.total == sum(SIZES)

    sizes = [shard.bytes for shard in dataset.shards("train")]
    needed = plan(order, batch_size, nodes, ranks)
    wanted = sum(len(node.body) + len(node.tail) for node in needed)
    deadline = time.monotonic() + 60
    while (whole := sum(reader.fetcher.stats.whole_shards for reader, _ in opened)) < wanted:
        assert time.monotonic() < deadline, f"{whole} of {wanted} shards arrived"
        time.sleep(0.01)
    time.sleep(0.1)
    assert sum(reader.fetcher.stats.whole_shards for reader, _ in opened) == wanted
    for reader, _ in opened:
        reader.close()
    body, tail = fetched(needed, sizes)
    every = sum(stop - start for _, start, stop in storage.requests)
    assert body <= sum(sizes) * (1 + (nodes - 1) / lanes) + (nodes - 1) * max(sizes)
    assert sum(sizes) <= body + tail <= every
    again = every - body - tail
    assert again == 0 if ranks == 1 else again < 0.25 * sum(sizes)
    shares = {"body": body, "tail": tail, "read by ranges besides": again}
    said = ", ".join(f"{name} {count / sum(sizes):.3f}" for name, count in shares.items())
    with capsys.disabled():
        print(f"\n{nodes} nodes x {ranks} ranks, of the dataset: {said}; {len(storage.requests)} GETs", end=" ")
