"""Mixtures: which of several sources sample n of the endless stream comes from, and which of its samples that is.

Each source has a share of the stream, its weight over the sum of the weights. For every n, the first n samples hold
within one of n x share samples of every source: the sources take turns by the earliest deadline, which meets both
quotas (Tijdeman 1980, the chairman assignment problem; Baruah et al. 1996). Shares are fractions with a small
denominator, so the turns repeat, and one period of them is a table: the source of n, which of that source's samples it
is (rank), and where that source's k-th sample is (select) are each one look-up. Pure NumPy, no I/O.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from pipelines.shards.order import Ints, Located, SampleOrder, locate_all, span_of

DENOMINATOR = 100_000
"""Largest denominator of the shares of sources: weights that have no common one that small are rounded to it."""


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Return whole numbers in proportion to weights, such as (7, 2, 1) for (0.7, 0.2, 0.1).

    They are exact if their sum is then at most `DENOMINATOR`. Otherwise their sum is `DENOMINATOR`, and each is rounded
    up or down (the largest remainders are rounded up), but to no less than 1.

    Args:
        weights: all > 0 and finite; decimal numbers are taken as they are written.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    common = math.gcd(*whole)
    whole = [weight // common for weight in whole]
    return tuple(whole) if sum(whole) <= DENOMINATOR else _rounded([Fraction(w, sum(whole)) for w in whole])


def by_stretch(weights: Sequence[Mapping[int, float]]) -> dict[int, list[float]]:
    """Return first ordinal -> weight of each source from there on.

    Args:
        weights: of each source, first ordinal -> its weight from there on; the first one is 0.
    """
    starts = sorted({start for each in weights for start in each})
    return {start: [each[max(n for n in each if n <= start)] for each in weights] for start in starts}


def shared_lanes(lanes: int, weights: Mapping[int, Sequence[float]]) -> list[int]:
    """Return how many of a stream's lanes each source gets: by its largest share, and at least one.

    So a batch touches about as many shards as one of a single dataset, and a lane is read as fast in each source.

    Args:
        weights: first ordinal -> weight of each source from there on.
    """
    shares = zip(*([weight / sum(each) for weight in each] for each in weights.values()), strict=True)
    return [max(1, round(lanes * max(share))) for share in shares]


def _rounded(shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Return whole numbers >= 1 with the sum `DENOMINATOR`, nearest to it times shares."""
    wanted = [share * DENOMINATOR for share in shares]
    found = [max(1, math.floor(each)) for each in wanted]
    missing = DENOMINATOR - sum(found)
    for _ in range(abs(missing)):
        short = [each - there for each, there in zip(wanted, found, strict=True)]
        if missing > 0:
            found[short.index(max(short))] += 1
        else:  # many were raised to 1
            found[found.index(max(found))] -= 1
    return tuple(found)


def take_turns(counts: Sequence[int]) -> Ints:
    """Return which source has each of sum(counts) turns, so that source i has counts[i] of them, evenly spread.

    After m turns every source has had more than m x share - 1 and fewer than m x share + 1, where its share is
    counts[i] / sum(counts). So its turn j may not come before floor(j / share), nor after ceil((j + 1) / share) - 1. Of
    those whose turn may come, that with the earliest deadline is chosen; ties go to the first source. All deadlines are
    met because the shares of a turn sum up to 1, so that no span of turns has more deadlines than turns.

    Returns:
        int64 [sum(counts)].
    """
    total = sum(counts)
    turns = np.empty(total, dtype=np.int64)
    given = [0] * len(counts)
    opening: list[list[int]] = [[] for _ in range(total)]  # sources whose next turn may come from here on
    opening[0] = [source for source, count in enumerate(counts) if count > 0]
    waiting: list[tuple[int, int]] = []  # deadline and source
    for m in range(total):
        for source in opening[m]:
            heapq.heappush(waiting, (-(-(given[source] + 1) * total // counts[source]), source))
        deadline, source = heapq.heappop(waiting)
        assert deadline > m
        turns[m] = source
        given[source] += 1
        if given[source] < counts[source]:
            opening[max(given[source] * total // counts[source], m + 1)].append(source)
    return turns


@dataclass(frozen=True)
class _Stretch:
    """Ordinals from `start` on in which turns repeat.

    Attributes:
        start: first ordinal.
        before: number of samples of each source before it.
        counts: turns of each source in a period.
    """

    start: int
    before: Ints
    counts: tuple[int, ...]

    @property
    def period(self) -> int:
        """The number of turns in a period."""
        return sum(self.counts)

    @cached_property
    def turns(self) -> Ints:
        """The source of each turn of a period."""
        return take_turns(self.counts)

    @cached_property
    def places(self) -> list[Ints]:
        """The turns of each source within a period, in order."""
        return [np.flatnonzero(self.turns == source) for source in range(len(self.counts))]

    @cached_property
    def ranks(self) -> Ints:
        """How many turns of the same source each turn of a period comes after."""
        found = np.empty(self.period, dtype=np.int64)
        for places in self.places:
            found[places] = np.arange(len(places))
        return found


class Schedule:
    """Which source each ordinal of the stream belongs to, and which sample of that source it is.

    Let S(n) be the sum of a source's shares over the first n samples. These hold more than S(n) - 1 and fewer than
    S(n) + 1 of its samples where weights never change. However often they change, it is more than S(n) - 2 and fewer
    than S(n) + 2, and where they change, within 1 of S(n) again.

    Args:
        weights: first ordinal -> weight of each source from there on; the first one is 0.

    Attributes:
        starts: the first ordinals of stretches with weights of their own.

    Raises:
        ValueError: weights are for so short a stretch that they cannot be met.
    """

    def __init__(self, weights: Mapping[int, Sequence[float]]) -> None:
        starts = sorted(weights)
        assert starts[0] == 0, "the first weights are those from ordinal 0 on"
        self.sources = len(weights[0])
        self._stretches: list[_Stretch] = []
        exact, before = [Fraction(0)] * self.sources, np.zeros(self.sources, dtype=np.int64)
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            counts = whole_weights(weights[start])
            if stop is None:
                self._stretches.append(_Stretch(start, before, counts))
                break
            period, length = sum(counts), stop - start
            if length < period:
                raise ValueError(
                    f"the weights {', '.join(f'{w:g}' for w in weights[start])} are for samples {start:,} to {stop:,} "
                    f"only, and take {period:,} samples until they are met: use weights with fewer digits, or a longer "
                    "stretch"
                )
            exact = [each + Fraction(length * count, period) for each, count in zip(exact, counts, strict=True)]
            after = _nearest(exact)
            whole = length // period - 1  # the last period takes the rest, and ends with the counts that are nearest
            if whole:
                self._stretches.append(_Stretch(start, before, counts))
            middle = before + whole * np.array(counts)
            rest = tuple((after - middle).tolist())
            self._stretches.append(_Stretch(start + whole * period, middle, rest))
            before = after
        self.starts = starts
        self._starts = np.array([stretch.start for stretch in self._stretches], dtype=np.int64)
        self._before = np.stack([stretch.before for stretch in self._stretches])

    def counts(self, n: int) -> Ints:
        """Return how many of the first n samples come from each source, int64 [sources]."""
        stretch = self._stretches[int(np.searchsorted(self._starts, n, side="right")) - 1]
        periods, turn = divmod(n - stretch.start, stretch.period)
        within = [np.searchsorted(places, turn) for places in stretch.places]
        return stretch.before + periods * np.array(stretch.counts) + np.array(within)

    def locate(self, ordinals: Ints) -> tuple[Ints, Ints]:
        """Return the source of each sample, and which sample of that source's own stream it is (rank); int64 [n]."""
        sources, ranks = np.empty_like(ordinals), np.empty_like(ordinals)
        number = np.searchsorted(self._starts, ordinals, side="right") - 1
        for each in np.unique(number):
            stretch, chosen = self._stretches[each], number == each
            periods, turn = np.divmod(ordinals[chosen] - stretch.start, stretch.period)
            sources[chosen] = source = stretch.turns[turn]
            ranks[chosen] = stretch.before[source] + periods * np.array(stretch.counts)[source] + stretch.ranks[turn]
        return sources, ranks

    def ordinals(self, source: int, ranks: Ints) -> Ints:
        """Return the ordinals of samples of a source's own stream (select), int64 [n]; the inverse of `locate`."""
        found = np.empty_like(ranks)
        number = np.searchsorted(self._before[:, source], ranks, side="right") - 1
        for each in np.unique(number):
            stretch, chosen = self._stretches[each], number == each
            periods, at = np.divmod(ranks[chosen] - stretch.before[source], stretch.counts[source])
            found[chosen] = stretch.start + periods * stretch.period + stretch.places[source][at]
        return found


def _nearest(exact: Sequence[Fraction]) -> Ints:
    """Return whole numbers with the same sum as numbers whose sum is whole, each rounded up or down."""
    floors = [math.floor(each) for each in exact]
    up = sorted(range(len(exact)), key=lambda i: (floors[i] - exact[i], i))[: int(sum(exact)) - sum(floors)]
    return np.array([floor + (i in up) for i, floor in enumerate(floors)], dtype=np.int64)


class MixtureOrder:
    """The order of the endless stream of several sources; it has the interface of `SampleOrder`.

    A sample belongs to a source by the schedule, and is then the next one of that source's own stream, which goes
    through its epochs at its own pace. Shards are numbered through: those of the second source come after those of the
    first.

    Args:
        orders: of the sources.
        schedule: whose turn it is.
    """

    def __init__(self, orders: Sequence[SampleOrder], schedule: Schedule) -> None:
        assert len(orders) == schedule.sources
        self.orders, self.schedule = tuple(orders), schedule
        self._first = np.cumsum([0, *(len(order.shard_samples) for order in orders)])

    def locate(self, ordinals: Ints) -> Located:
        """Return shards and indices of the samples with these ordinals, int64 [n]."""
        sources, ranks = self.schedule.locate(ordinals)
        shards, indices = np.empty_like(ordinals), np.empty_like(ordinals)
        places = {source: np.flatnonzero(sources == source) for source in np.unique(sources)}
        found = locate_all([(self.orders[source], ranks[at]) for source, at in places.items()])
        for (source, at), own in zip(places.items(), found, strict=True):
            shards[at], indices[at] = own.shards + self._first[source], own.indices
        return Located(ordinals, shards, indices)

    def occurrences(self, shards: Ints, indices: Ints, stop: int) -> tuple[Ints, Ints]:
        """Return every time that samples come among the first `stop` of the stream; see `SampleOrder.occurrences`."""
        seen = self.schedule.counts(stop)
        source_of = np.searchsorted(self._first, shards, side="right") - 1
        which, ordinals = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for source in np.unique(source_of):
            chosen = np.flatnonzero(source_of == source)
            own = shards[chosen] - self._first[source]
            of_chosen, ranks = self.orders[source].occurrences(own, indices[chosen], int(seen[source]))
            which.append(chosen[of_chosen])
            ordinals.append(self.schedule.ordinals(int(source), ranks))
        order = np.argsort(np.concatenate(ordinals))
        return np.concatenate(which)[order], np.concatenate(ordinals)[order]

    def batch(self, start: int, size: int) -> Located:
        """Return samples start .. start + size - 1, sorted by (source, lane, ordinal)."""
        return self.part(start, size, slice(0, size))

    def piece(self, start: int, size: int, rank: int, world_size: int) -> Located:
        """Return the part of a global batch that belongs to one rank; sizes differ by at most one.

        Raises:
            ValueError: there are more ranks than samples in the batch.
        """
        return self.part(start, size, span_of(size, rank, world_size))

    def part(self, start: int, size: int, span: slice) -> Located:
        """Return the samples at these positions of a sorted batch.

        The samples of a batch that come from one source follow each other in its own stream, so that a rank computes
        those of the few sources that it reads from.
        """
        first, last = self.schedule.counts(start), self.schedule.counts(start + size)
        ranks: dict[int, Ints] = {}
        before = 0  # samples of the batch that come from earlier sources
        for source, (begin, count) in enumerate(zip(first.tolist(), (last - first).tolist(), strict=True)):
            own = slice(max(span.start - before, 0), min(span.stop - before, count))
            if own.start < own.stop:
                ranks[source] = self.orders[source].sorted_ordinals(begin, count, own)
            before += count
        found = locate_all([(self.orders[source], own) for source, own in ranks.items()])
        return Located(
            np.concatenate([self.schedule.ordinals(source, own) for source, own in ranks.items()]),
            np.concatenate([own.shards + self._first[source] for source, own in zip(ranks, found, strict=True)]),
            np.concatenate([own.indices for own in found]),
        )
