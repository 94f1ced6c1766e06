"""The shards that the workers of a node read at a time, and whether they fit into its cache.

Every global batch, sorted by lane, is cut into consecutive pieces, and the ranks of a node have consecutive pieces. So
a lane belongs to one node, or at its edge to two, and the cache of a node needs its own lanes only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipelines.shards.index import Dataset, ShardInfo, ShardTable
from pipelines.shards.mixture import Schedule, by_stretch, shared_lanes
from pipelines.shards.order import span_of

LOOKED_AT = 64
"""Batches of a stretch of a mixture in which the samples of each source are counted: they vary by a few."""


def ranks_of_node(rank: int, world_size: int) -> range:
    """Return the ranks on the node of a rank, which Ray Train and torchrun number node by node; all where neither says.

    They set the environment variables LOCAL_RANK and LOCAL_WORLD_SIZE.
    """
    local, count = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    ranks = range(rank - local, rank - local + count)
    return ranks if 0 <= ranks.start <= rank < ranks.stop <= world_size else range(world_size)


@dataclass(frozen=True)
class NodePiece:
    """The part of every global batch that the ranks of a node read.

    Attributes:
        batch_size: size of the global batch.
        span: its positions in the sorted batch.
    """

    batch_size: int
    span: slice

    @classmethod
    def of(cls, batch_size: int, ranks: range, world_size: int) -> NodePiece:
        """Return the piece of consecutive ranks."""
        first, last = (span_of(batch_size, rank, world_size) for rank in (ranks[0], ranks[-1]))
        return cls(batch_size, slice(first.start, last.stop))


@dataclass(frozen=True)
class WorkingSet:
    """The shards that a node reads at a time.

    Attributes:
        lanes: of which the node reads.
        all_lanes: of the run that have shards.
        window: shards of a lane that are read together.
        bytes: size of twice as many shards as the lanes' windows have, because the next ones are fetched while the last
            ones are read; of mean size, and not more than there are.
    """

    lanes: int
    all_lanes: int
    window: int
    bytes: float

    @classmethod
    def of(cls, read: Sequence[tuple[int, Sequence[ShardInfo]]], all_lanes: int, window: int) -> WorkingSet:
        """Return the working set of so many lanes of each of several lists of shards."""
        size = 0.0
        for lanes, shards in read:
            mean = int(ShardTable.of(shards).sizes.sum()) / max(len(shards), 1)
            size += min(2 * lanes * window, len(shards)) * mean
        return cls(sum(lanes for lanes, _ in read), all_lanes, window, size)

    def fits(self, cache_bytes: int) -> bool:
        """Return whether it fits into a node's cache.

        If it did not, every shard would be evicted before it is read completely, and fetched again; then requests for
        the bytes of single samples are cheaper.
        """
        return self.bytes <= cache_bytes

    def choice(self, cache_bytes: int) -> str:
        """Return a line that says whether shards are read as a whole or by ranges, why, and what changes it."""
        there, used = cache_bytes / 2**30, f"{self.bytes / 2**30:,.2f} GiB"
        if self.bytes < 2**30:
            used = f"{self.bytes / 2**20:,.1f} MiB"
        lanes = f"{self.lanes:,} of {self.all_lanes:,} lanes, with windows of {self.window:,}"
        why = f"{lanes} and the next ones, take {used}"
        if self.fits(cache_bytes):
            return f"whole shards are cached on this node: {why} of data.cache_gib={there:,.2f}"
        return (
            f"shards are read by ranges, a request for almost every sample, and nothing is cached: on this node {why}, "
            f"more than data.cache_gib={there:,.2f}; raise that, or begin a run with fewer data.lanes or a smaller "
            "data.window, for whole shards"
        )


def working_set(dataset: Dataset, split: str, lanes: int, window: int, piece: NodePiece | None = None) -> WorkingSet:
    """Return the shards of a split that the ranks of a node read at a time.

    Args:
        lanes: of the run.
        piece: of the node; None where it reads whole batches.

    Raises:
        ValueError: weights of a mixture are for so short a stretch that they cannot be met.
    """
    shards = dataset.shards(split)
    if not shards.sources:
        live = min(lanes, len(shards))
        own = len(lanes_of(piece.batch_size, live, piece.span)) if piece and live else live
        return WorkingSet.of([(own, shards)], live, window)
    numbers = [shards.of_source(source) for source in dataset.sources]
    of_sources = [shards.take(each, shards.samples[each]) for each in numbers]
    weights = by_stretch([source.weights for source in dataset.sources])
    shared = zip(shared_lanes(lanes, weights), of_sources, strict=True)
    each_live = [min(count, len(each)) for count, each in shared]
    each_own = lanes_of_mixture(Schedule(weights), each_live, piece) if piece else each_live
    return WorkingSet.of(list(zip(each_own, of_sources, strict=True)), sum(each_live), window)


def lanes_of(size: int, lanes: int, span: slice) -> range:
    """Return the lanes that positions of sorted batches lie in, while all lanes have samples.

    A batch has every lane `size // lanes` times, and `size % lanes` consecutive ones once more. Where that is not 0,
    which ones these are differs from batch to batch, and with them the edges of the span.

    Args:
        size: of the batches.
        lanes: that have samples.
        span: positions, at least one.
    """
    each, more = divmod(size, lanes)
    upto = np.arange(1, lanes + 1)  # of the first lane, of the first two, ...
    most = each * upto + np.minimum(more, upto)
    least = each * upto + np.maximum(0, more - (lanes - upto))
    first = int(np.searchsorted(most, span.start, side="right"))
    last = int(np.searchsorted(least, span.stop - 1, side="right"))
    return range(first, last + 1)


def lanes_of_mixture(schedule: Schedule, lanes: Sequence[int], piece: NodePiece) -> list[int]:
    """Return how many lanes of each source of a mixture a piece of sorted batches lies in, in any of its stretches.

    Args:
        lanes: of each source that have samples.
    """
    found: list[set[int]] = [set() for _ in lanes]
    for start in schedule.starts:
        edges = [schedule.counts(start + number * piece.batch_size) for number in range(LOOKED_AT + 1)]
        for counts in {tuple((after - before).tolist()) for before, after in pairwise(edges)}:
            first = 0  # sample of the batch that comes from this source
            for own, live, count in zip(found, lanes, counts, strict=True):
                span = slice(max(piece.span.start - first, 0), min(piece.span.stop - first, count))
                if live and span.start < span.stop:
                    own.update(lanes_of(count, live, span))
                first += count
    return [len(own) for own in found]
