from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.shards.mixture import DENOMINATOR, MixtureOrder, Schedule, shared_lanes, take_turns, whole_weights
from pipelines.shards.order import SampleOrder

weights_of = st.floats(1e-3, 1e3).map(lambda weight: float(f"{weight:.3g}"))
plain_weights = st.lists(st.integers(1, 40).map(float), min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(sum)


@st.composite
def stretches(draw, most=4):
    """First ordinal -> weights of one to seven sources, each stretch at least as long as its period."""
    sources = draw(st.integers(1, 7))
    found, start = {}, 0
    for _ in range(draw(st.integers(1, most))):
        found[start] = draw(st.lists(st.integers(1, 12).map(float), min_size=sources, max_size=sources))
        start += sum(whole_weights(found[start])) + draw(st.integers(0, 200))
    return found


def shares(weights):
    whole = whole_weights(weights)
    return [Fraction(w, sum(whole)) for w in whole]


def prefix_sums(weights, n):
    """The sum of the shares over the first n samples, for each source."""
    starts = sorted(weights)
    sums = [Fraction(0)] * len(weights[0])
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        length = max(0, min(stop, n) - start)
        sums = [each + length * share for each, share in zip(sums, shares(weights[start]), strict=True)]
    return sums


def mixture(shapes, weights, lanes=3, window=2):
    orders = [
        SampleOrder(shape, lanes=lanes, window=window, seed=0, digest=str(number))
        for number, shape in enumerate(shapes)
    ]
    return MixtureOrder(orders, Schedule(weights))


def test_weights_are_taken_as_they_are_written():
    assert whole_weights([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert whole_weights([3, 2, 1]) == (3, 2, 1)
    assert whole_weights([5.0]) == (1,)
    assert whole_weights([1e-3, 1e3]) == (1, 99_999)


@given(weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30))
def test_any_weights_become_whole_numbers_within_the_stated_denominator(weights):
    whole = whole_weights(weights)
    assert min(whole) >= 1
    assert sum(whole) <= DENOMINATOR
    raised = sum(weight / sum(weights) * DENOMINATOR < 1 for weight in weights)
    for found, weight in zip(whole, weights, strict=True):
        exact = weight / sum(weights)
        assert abs(found / sum(whole) - exact) <= (1 + raised) / DENOMINATOR + 1e-12


@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum))
def test_every_prefix_of_the_turns_holds_each_source_within_one_of_its_share(counts):
    turns, total = take_turns(counts), sum(counts)
    held = np.cumsum(turns[:, None] == np.arange(len(counts)), axis=0)
    assert held[-1].tolist() == counts
    exact = np.arange(1, total + 1)[:, None] * np.array(counts)  # times the total, in whole numbers
    assert np.abs(held * total - exact).max() < total


@given(weights=st.lists(weights_of, min_size=1, max_size=6), n=st.integers(0, 10**12))
def test_every_prefix_of_the_stream_holds_each_source_within_one_of_its_share(weights, n):
    counts = Schedule({0: weights}).counts(n)
    assert counts.sum() == n
    for count, exact in zip(counts.tolist(), prefix_sums({0: weights}, n), strict=True):
        assert abs(count - exact) < 1


@given(weights=stretches(), data=st.data())
def test_after_changes_of_weights_every_prefix_is_within_two_of_the_sum_over_the_stretches(weights, data):
    schedule = Schedule(weights)
    around = [start + shift for start in weights for shift in (-1, 0, 1) if start + shift >= 0]
    ns = data.draw(st.lists(st.integers(0, max(weights) + 500), max_size=10))
    for n in [*around, *ns]:
        counts = schedule.counts(n)
        assert counts.sum() == n
        for count, exact in zip(counts.tolist(), prefix_sums(weights, n), strict=True):
            assert abs(count - exact) < (1 if n in weights else 2)
    sources, _ = schedule.locate(np.arange(max(weights) + 100))
    held = np.cumsum(sources[:, None] == np.arange(len(weights[0])), axis=0)
    for n in range(1, len(held), 7):
        assert held[n - 1].tolist() == schedule.counts(n).tolist()


@given(weights=stretches(), first=st.sampled_from([0, 10**6, 10**12]), shift=st.integers(0, 1000))
def test_rank_and_select_are_inverses_at_any_distance(weights, first, shift):
    schedule = Schedule(weights)
    ordinals = np.arange(first + shift, first + shift + 50)
    sources, ranks = schedule.locate(ordinals)
    before = schedule.counts(first + shift)
    for source in range(len(weights[0])):
        chosen = sources == source
        assert ranks[chosen].tolist() == list(range(before[source], before[source] + chosen.sum()))
        assert schedule.ordinals(source, ranks[chosen]).tolist() == ordinals[chosen].tolist()


@given(weights=st.lists(weights_of, min_size=2, max_size=5), rank=st.integers(10**12, 10**12 + 10**6))
def test_the_sample_of_a_source_is_found_exactly_at_a_trillion(weights, rank):
    schedule = Schedule({0: weights})
    for source in range(len(weights)):
        ordinals = schedule.ordinals(source, np.arange(rank, rank + 20))
        assert (np.diff(ordinals) > 0).all()
        sources, ranks = schedule.locate(ordinals)
        assert set(sources.tolist()) == {source}
        assert ranks.tolist() == list(range(rank, rank + 20))


@given(shape=shapes, lanes=st.integers(1, 7), window=st.integers(1, 4), epoch=st.sampled_from([0, 2, 10**10]))
def test_the_order_is_inverted_sample_by_sample_in_any_epoch(shape, lanes, window, epoch):
    order = SampleOrder(shape, lanes=lanes, window=window, seed=3, digest="d")
    ordinals = np.arange(epoch * order.total, (epoch + 1) * order.total)
    found = order.locate(ordinals)
    assert order.ordinals(found.shards, found.indices, epoch).tolist() == ordinals.tolist()


@given(data=st.data(), weights=plain_weights)
def test_each_source_gives_each_of_its_samples_once_in_each_of_its_epochs(data, weights):
    shapes_ = [data.draw(shapes) for _ in weights]
    order = mixture(shapes_, {0: weights})
    first = np.cumsum([0, *map(len, shapes_)])
    for source, shape in enumerate(shapes_):
        total = sum(shape)
        for epoch in (0, 1, 3):
            ordinals = order.schedule.ordinals(source, np.arange(epoch * total, (epoch + 1) * total))
            found = order.locate(ordinals)
            expected = {(first[source] + shard, i) for shard, count in enumerate(shape) for i in range(count)}
            assert set(zip(found.shards.tolist(), found.indices.tolist(), strict=True)) == expected


@pytest.mark.parametrize("world", [1, 3, 8])
@given(data=st.data(), weights=stretches(), start=st.integers(0, 10_000), size=st.integers(8, 60))
def test_the_pieces_of_all_ranks_are_together_the_batch(world, data, weights, start, size):
    order = mixture([data.draw(shapes) for _ in weights[0]], weights, lanes=data.draw(st.integers(1, 9)))
    whole = order.batch(start, size)
    pieces = [order.piece(start, size, rank, world) for rank in range(world)]
    counts = [len(piece.ordinals) for piece in pieces]
    assert max(counts) - min(counts) <= 1
    located = order.locate(np.arange(start, start + size))
    by_ordinal = np.argsort(whole.ordinals)
    for name in ("ordinals", "shards", "indices"):
        assert np.array_equal(np.concatenate([getattr(piece, name) for piece in pieces]), getattr(whole, name))
        assert np.array_equal(getattr(whole, name)[by_ordinal], getattr(located, name))


@given(weights=plain_weights, start=st.integers(0, 10**12), size=st.integers(1, 10_000))
def test_every_batch_holds_each_source_within_two_of_its_share(weights, start, size):
    schedule = Schedule({0: weights})
    held = schedule.counts(start + size) - schedule.counts(start)
    for count, share in zip(held.tolist(), shares(weights), strict=True):
        assert abs(count - size * share) < 2


@given(weights=stretches(), lanes=st.integers(1, 64))
def test_sources_share_the_lanes_by_their_largest_share_and_each_has_one(weights, lanes):
    found = shared_lanes(lanes, weights)
    assert len(found) == len(weights[0])
    for source, own in enumerate(found):
        largest = max(each[source] / sum(each) for each in weights.values())
        assert max(1, lanes * largest - 0.5) <= own + 1e-9
        assert own <= max(1, lanes * largest + 0.5)


def test_a_mixture_of_one_is_in_the_order_of_that_source():
    order = mixture([[10, 20, 5]], {0: [2.0]})
    alone = SampleOrder([10, 20, 5], lanes=3, window=2, seed=0, digest="0")
    ours, theirs = order.batch(24, 16), alone.batch(24, 16)
    for name in ("ordinals", "shards", "indices"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))


def test_no_sample_of_a_mixture_may_be_asked_for():
    assert len(mixture([[10], [5]], {0: [1.0, 1.0]}).locate(np.arange(0)).shards) == 0


def test_weights_that_a_stretch_is_too_short_for_are_refused():
    with pytest.raises(ValueError, match=r"0\.123, 0\.877 are for samples 0 to 10 only, and take 1,000 samples"):
        Schedule({0: [0.123, 0.877], 10: [1.0, 1.0]})


def test_more_ranks_than_images_are_refused():
    with pytest.raises(ValueError, match="9 ranks cannot share a batch of 8"):
        mixture([[10], [10]], {0: [1.0, 1.0]}).piece(0, 8, 0, 9)


@given(weights=stretches(), stop=st.integers(0, 600), data=st.data())
def test_every_time_that_a_sample_of_a_mixture_was_read_is_found_again(weights, stop, data):
    own = data.draw(st.lists(shapes, min_size=len(weights[0]), max_size=len(weights[0])))
    order = mixture(own, weights)
    samples = [(shard, index) for shard, count in enumerate(chain.from_iterable(own)) for index in range(count)]
    asked = data.draw(st.lists(st.sampled_from(samples), max_size=8, unique=True))
    read = order.locate(np.arange(stop))
    log = list(zip(read.shards.tolist(), read.indices.tolist(), strict=True))
    which, ordinals = order.occurrences(*np.array(asked, dtype=np.int64).reshape(-1, 2).T, stop)
    found = [(n, asked[i]) for i, n in zip(which.tolist(), ordinals.tolist(), strict=True)]
    assert found == [(n, sample) for n, sample in enumerate(log) if sample in asked]
