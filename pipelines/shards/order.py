"""The order of samples: a pure function from an ordinal n of the endless stream to the sample at that position.

In each epoch the shards are permuted and dealt to K lanes; round r takes one sample of every lane that is longer than
r. Inside a lane, the samples of a window of consecutive shards are permuted by a keyed Feistel network. The order does
not depend on the number of workers, and any position is computed directly. Pure NumPy, no I/O.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
DEALT = 4096
"""Shards that are dealt to lanes at a time."""
FEW = 16
"""Largest number of lanes and stretches of a batch that are handled one by one; above, the whole batch is located."""


@dataclass(frozen=True)
class Located:
    """Samples of the stream: the ordinal, the shard and the index within the shard of each, int64 [n]."""

    ordinals: Ints
    shards: Ints
    indices: Ints


@dataclass(frozen=True)
class _EpochPlan:
    """How one epoch is laid out.

    A segment is a range of rounds in which the same lanes still have samples (are live).
    """

    lane_shards: Ints  # shard numbers, lane after lane
    lane_of: Ints  # index of each lane's first entry in lane_shards, [K + 1]
    ends: Ints  # running sample count over lane_shards, with a leading 0
    lengths: Ints  # samples per lane, longest first
    segment_start: Ints  # first ordinal of each segment within the epoch
    segment_round: Ints  # first round of each segment
    segment_live: Ints  # number of live lanes in each segment
    key: int


@dataclass(frozen=True)
class _Unshuffled:
    """Samples of one epoch, before their windows are shuffled; int64 [n] each.

    Attributes:
        chosen: which of the samples that were asked for.
        plan: of the epoch.
        within: position in the window.
        begin: first position of the window in the concatenated lanes.
        size: samples of the window.
        key: of the window.
    """

    chosen: Ints
    plan: _EpochPlan
    within: Ints
    begin: Ints
    size: Ints
    key: Ints


class SampleOrder:
    """The order of the endless stream of one dataset split.

    Args:
        shard_samples: number of samples of each shard, all >= 0, at least one sample in total.
        lanes: number of lanes K; lanes beyond the number of shards stay empty.
        window: consecutive shards of a lane that are shuffled together.
        seed: seed of the run.
        digest: digest of the dataset (and of its quarantine), so that another dataset gets another order.
    """

    def __init__(self, shard_samples: Ints | list[int], *, lanes: int, window: int, seed: int, digest: str) -> None:
        self.shard_samples = np.asarray(shard_samples, dtype=np.int64)
        self.total = int(self.shard_samples.sum())
        if self.total < 1:
            raise ValueError("the split has no samples")
        if lanes < 1 or window < 1:
            raise ValueError(f"lanes and window must be >= 1, got {lanes} and {window}")
        self.lanes, self.window, self.seed, self.digest = lanes, window, seed, digest
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    def locate(self, ordinals: Ints) -> Located:
        """Return shards and indices of the samples with these ordinals, int64 [n]."""
        return locate_all([(self, ordinals)])[0]

    def batch(self, start: int, size: int) -> Located:
        """Return samples start .. start + size - 1, sorted by (lane, ordinal), so that a piece spans few lanes."""
        return self.part(start, size, slice(0, size))

    def piece(self, start: int, size: int, rank: int, world_size: int) -> Located:
        """Return the part of a global batch that belongs to one rank; sizes differ by at most one.

        Raises:
            ValueError: there are more ranks than samples in the batch.
        """
        return self.part(start, size, span_of(size, rank, world_size))

    def part(self, start: int, size: int, span: slice) -> Located:
        """Return the samples at these positions of a sorted batch, as `batch` has them."""
        return self.locate(self.sorted_ordinals(start, size, span))

    def sorted_ordinals(self, start: int, size: int, span: slice) -> Ints:
        """Return the ordinals at these positions of a sorted batch, as `batch` has them."""
        found = self._piece_ordinals(start, size, span)
        if found is None:
            ordinals = np.arange(start, start + size, dtype=np.int64)
            lanes = np.empty_like(ordinals)
            for chosen, plan, m in self._by_epoch(ordinals):
                lanes[chosen], _ = _lane_and_round(plan, m)
            found = ordinals[np.lexsort((ordinals, lanes))][span]
        return found

    def ordinals(self, shards: Ints, indices: Ints, epoch: int) -> Ints:
        """Return the ordinals at which an epoch has samples of the split, the inverse of `locate`, int64 [n].

        Args:
            shards: of the samples, int64 [n].
            indices: of the samples within their shards, int64 [n].
        """
        plan = self._plan(epoch)
        slot = np.argsort(plan.lane_shards)[shards]
        lane = np.searchsorted(plan.lane_of, slot, side="right") - 1
        first, begin, end = self._window(plan, lane, slot)
        position = begin + unfeistel(plan.ends[slot] + indices - begin, end - begin, plan.key ^ (first * 2 + 1))
        round_ = position - plan.ends[plan.lane_of[lane]]
        segment = np.searchsorted(plan.segment_round, round_, side="right") - 1
        within = (round_ - plan.segment_round[segment]) * plan.segment_live[segment] + lane
        return epoch * self.total + plan.segment_start[segment] + within

    def occurrences(self, shards: Ints, indices: Ints, stop: int) -> tuple[Ints, Ints]:
        """Return every time that samples come among the first `stop` of the stream.

        Args:
            shards: of the samples, int64 [n].
            indices: of the samples within their shards, int64 [n].

        Returns:
            (which of the samples, at which ordinal), int64 [m] each, in order of the ordinals.
        """
        epochs = -(-stop // self.total)
        every = [self.ordinals(shards, indices, epoch) for epoch in range(epochs)]
        ordinals = np.concatenate([np.zeros(0, np.int64), *every])
        which = np.tile(np.arange(len(shards)), epochs)
        order = np.argsort(ordinals)
        order = order[ordinals[order] < stop]
        return which[order], ordinals[order]

    def _piece_ordinals(self, start: int, size: int, span: slice) -> Ints | None:
        """Return the ordinals at positions `span` of a sorted batch, without locating the rest of the batch.

        While the same L lanes are live, each of them has every L-th ordinal, so the number of the batch's samples in
        each lane is arithmetic, and one rank of thousands computes its own few lanes only. None where the span covers
        so many lanes or stretches that locating the whole batch is cheaper.
        """
        stretches = self._stretches(start, size)
        if stretches is None:
            return None
        lanes = np.arange(self.lanes)
        offsets, counts = [], []
        for _, count, live, phase in stretches:
            offset = (lanes - phase) % live
            offsets.append(offset)
            counts.append(np.where(lanes < live, np.maximum(0, -(-(count - offset) // live)), 0))
        ends = np.cumsum(np.sum(counts, axis=0))
        first, last = np.searchsorted(ends, [span.start, span.stop - 1], side="right")
        if last - first >= FEW:
            return None
        parts = [
            begin + offset[lane] + live * np.arange(count[lane])
            for lane in range(first, last + 1)
            for (begin, _, live, _), offset, count in zip(stretches, offsets, counts, strict=True)
        ]
        before = int(ends[first - 1]) if first else 0
        return np.concatenate(parts)[span.start - before : span.stop - before]

    def _stretches(self, start: int, size: int) -> list[tuple[int, int, int, int]] | None:
        """Divide a batch where lanes end.

        Returns:
            (first ordinal, count, live lanes, lane of the first sample) of each stretch; None for more than `FEW`.
        """
        stretches: list[tuple[int, int, int, int]] = []
        at, stop = start, start + size
        while at < stop:
            if len(stretches) == FEW:
                return None
            epoch, m = divmod(at, self.total)
            plan = self._plan(epoch)
            segment = int(np.searchsorted(plan.segment_start, m, side="right")) - 1
            later = segment + 1 < len(plan.segment_start)
            end = int(plan.segment_start[segment + 1]) if later else self.total
            count, live = min(end - m, stop - at), int(plan.segment_live[segment])
            stretches.append((at, count, live, (m - int(plan.segment_start[segment])) % live))
            at += count
        return stretches

    def _make_plan(self, epoch: int) -> _EpochPlan:
        key = int.from_bytes(hashlib.sha256(f"{self.digest}/{self.seed}/{epoch}".encode()).digest()[:16], "little")
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(self.shard_samples))
        dealt = np.empty_like(order)  # the lane of each shard, in this order
        heap = [(0, lane) for lane in range(self.lanes)]
        for first in range(0, len(order), DEALT):  # not all at once: objects take more memory than the plan itself
            for number, samples in enumerate(self.shard_samples[order[first : first + DEALT]].tolist(), first):
                length, dealt[number] = heap[0]
                heapq.heapreplace(heap, (length + samples, int(dealt[number])))
        lengths = np.zeros(self.lanes, np.int64)
        np.add.at(lengths, dealt, self.shard_samples[order])
        by_length = np.argsort(-lengths, kind="stable")
        lengths = lengths[by_length]
        lane_shards = order[np.argsort(np.argsort(by_length)[dealt], kind="stable")]
        counts = np.bincount(dealt, minlength=self.lanes)[by_length]

        # Between two distinct lane lengths the same lanes are live: these rounds are a segment.
        distinct = np.unique(lengths[lengths > 0])
        rounds = np.concatenate([[0], distinct[:-1]])
        live = np.array([(lengths >= d).sum() for d in distinct], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum((distinct - rounds) * live)[:-1]])
        return _EpochPlan(
            lane_shards,
            np.concatenate([[0], np.cumsum(counts)]),
            np.concatenate([[0], np.cumsum(self.shard_samples[lane_shards])]),
            lengths,
            starts,
            rounds,
            live,
            key & (2**63 - 1),
        )

    def _by_epoch(self, ordinals: Ints) -> Iterator[tuple[Ints, _EpochPlan, Ints]]:
        """Yield (indices of the ordinals of an epoch, its plan, their numbers within it) for each epoch among them."""
        epochs = ordinals // self.total
        for epoch in np.unique(epochs):
            chosen = np.flatnonzero(epochs == epoch)
            yield chosen, self._plan(int(epoch)), ordinals[chosen] % self.total

    def unshuffled(self, ordinals: Ints) -> Iterator[_Unshuffled]:
        """Yield where samples would be if their windows were in the order of the lanes, epoch by epoch."""
        for chosen, plan, m in self._by_epoch(ordinals):
            lane, round_ = _lane_and_round(plan, m)
            position = plan.ends[plan.lane_of[lane]] + round_  # within the concatenated lanes
            slot = np.searchsorted(plan.ends, position, side="right") - 1
            first, begin, end = self._window(plan, lane, slot)
            yield _Unshuffled(chosen, plan, position - begin, begin, end - begin, plan.key ^ (first * 2 + 1))

    def _window(self, plan: _EpochPlan, lane: Ints, slot: Ints) -> tuple[Ints, Ints, Ints]:
        """Return (first slot, first sample, end) of the windows in which slots of the concatenated lanes lie."""
        lane_first = plan.lane_of[lane]
        first = lane_first + (slot - lane_first) // self.window * self.window
        last = np.minimum(first + self.window, plan.lane_of[lane + 1])
        return first, plan.ends[first], plan.ends[last]


def _lane_and_round(plan: _EpochPlan, m: Ints) -> tuple[Ints, Ints]:
    """Return the lane and the round of the epoch's samples m in [0, total)."""
    segment = np.searchsorted(plan.segment_start, m, side="right") - 1
    within = m - plan.segment_start[segment]
    return within % plan.segment_live[segment], plan.segment_round[segment] + within // plan.segment_live[segment]


def locate_all(asked: Sequence[tuple[SampleOrder, Ints]]) -> list[Located]:
    """Return shards and indices of samples of several orders, given by their ordinals, int64 [n] each.

    The windows of all of them are shuffled in one go, which takes hardly longer than for one order.
    """
    parts = [(number, part) for number, (order, ordinals) in enumerate(asked) for part in order.unshuffled(ordinals)]
    found = [Located(ordinals, np.empty_like(ordinals), np.empty_like(ordinals)) for _, ordinals in asked]
    if not parts:  # none was asked for
        return found
    columns = (np.concatenate([getattr(part, name) for _, part in parts]) for name in ("within", "size", "key"))
    shuffled, at = feistel(*columns), 0
    for number, part in parts:
        plan, position = part.plan, part.begin + shuffled[at : at + len(part.begin)]
        slot = np.searchsorted(plan.ends, position, side="right") - 1
        found[number].shards[part.chosen] = plan.lane_shards[slot]
        found[number].indices[part.chosen] = position - plan.ends[slot]
        at += len(part.begin)
    return found


def span_of(size: int, rank: int, world_size: int) -> slice:
    """Return which positions of a sorted global batch belong to one rank; sizes differ by at most one.

    Raises:
        ValueError: there are more ranks than samples in the batch.
    """
    if world_size > size:
        raise ValueError(f"{world_size} ranks cannot share a batch of {size}: use fewer workers or a larger batch")
    return slice(rank * size // world_size, (rank + 1) * size // world_size)


def feistel(x: Ints, size: Ints, key: Ints | int) -> Ints:
    """Permute [0, size) by a key, element by element, with a balanced Feistel network and cycle-walking.

    The network permutes [0, 4^h) with 4^h >= size. A result >= size is put through it again until it is < size (Black &
    Rogaway 2002), which takes fewer than four rounds of cycle-walking on average.
    """

    def turn(left: Words, right: Words, low: Words, key: Words) -> tuple[Words, Words]:
        for round_key in _ROUND_KEYS:
            left, right = right, left ^ (_mix(right + key + round_key) & low)
        return left, right

    return _walk(x, size, key, turn)


def unfeistel(x: Ints, size: Ints, key: Ints | int) -> Ints:
    """Invert `feistel`."""

    def turn(left: Words, right: Words, low: Words, key: Words) -> tuple[Words, Words]:
        for round_key in reversed(_ROUND_KEYS):
            left, right = right ^ (_mix(left + key + round_key) & low), left
        return left, right

    return _walk(x, size, key, turn)


def _walk(
    x: Ints, size: Ints, key: Ints | int, turn: Callable[[Words, Words, Words, Words], tuple[Words, Words]]
) -> Ints:
    """Apply a permutation of [0, 4^h), given for halves of h bits, until every result is < size."""
    size = np.asarray(size, dtype=np.int64)
    bits = np.ceil(np.log2(np.maximum(size, 2))).astype(np.uint64)
    half = (bits + np.uint64(1)) // np.uint64(2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.broadcast_to(np.asarray(key).astype(np.uint64), size.shape)
    value = np.asarray(x, dtype=np.int64).astype(np.uint64)
    outside = np.ones(size.shape, dtype=bool)
    while outside.any():
        bits, low, now = half[outside], mask[outside], value[outside]
        left, right = turn(now >> bits, now & low, low, keys[outside])
        value[outside] = (left << bits) | right
        outside = value >= size.astype(np.uint64)
    return value.astype(np.int64)


_ROUND_KEYS = [np.uint64(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(6)]


def _mix(x: Words) -> Words:
    """Return the finalizer of SplitMix64 (Steele et al. 2014), in which every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
