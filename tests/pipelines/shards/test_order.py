import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.shards.order import SampleOrder, feistel

shapes = st.lists(st.integers(0, 60), min_size=1, max_size=20).filter(sum)


def make(shards, lanes=4, window=3, seed=0, digest="d"):
    return SampleOrder(shards, lanes=lanes, window=window, seed=seed, digest=digest)


@given(shards=shapes, lanes=st.integers(1, 12), window=st.integers(1, 6), epoch=st.integers(0, 3))
def test_every_epoch_holds_every_sample_exactly_once(shards, lanes, window, epoch):
    order = make(shards, lanes, window)
    found = order.locate(np.arange(epoch * order.total, (epoch + 1) * order.total))
    expected = {(shard, index) for shard, count in enumerate(shards) for index in range(count)}
    assert set(zip(found.shards.tolist(), found.indices.tolist(), strict=True)) == expected


@given(shards=shapes, lanes=st.integers(1, 12), start=st.integers(0, 500), size=st.integers(1, 40), data=st.data())
def test_ranks_share_a_batch_without_gap_or_overlap_whatever_their_number(shards, lanes, start, size, data):
    order = make(shards, lanes)
    world = data.draw(st.integers(1, size))
    pieces = [order.piece(start, size, rank, world) for rank in range(world)]
    counts = [len(piece.ordinals) for piece in pieces]
    assert max(counts) - min(counts) <= 1
    whole = order.locate(np.arange(start, start + size))
    for name in ("ordinals", "shards", "indices"):
        joined = np.concatenate([getattr(piece, name) for piece in pieces])
        by_ordinal = np.argsort(np.concatenate([piece.ordinals for piece in pieces]))
        assert np.array_equal(joined[by_ordinal], getattr(whole, name))


@given(
    shards=st.lists(st.integers(0, 40), min_size=1, max_size=120).filter(sum),
    lanes=st.integers(1, 100),
    start=st.integers(0, 10_000),
    size=st.integers(1, 300),
    data=st.data(),
)
def test_a_rank_finds_its_piece_alone_as_it_lies_in_the_whole_batch(shards, lanes, start, size, data):
    """By arithmetic where a piece has few lanes, by the whole batch where it has many or lanes end all the time."""
    order = make(shards, lanes)
    world = data.draw(st.integers(1, size))
    whole = order.batch(start, size)
    pieces = [order.piece(start, size, rank, world) for rank in range(world)]
    for name in ("ordinals", "shards", "indices"):
        assert np.array_equal(np.concatenate([getattr(p, name) for p in pieces]), getattr(whole, name))


def test_a_piece_among_thousands_of_ranks_is_arithmetic():
    order = make([100] * 4096, lanes=2048)
    stretches = order._stretches(10_000, 8192)
    assert len(stretches) == 1
    assert len(order._piece_ordinals(10_000, 8192, slice(40, 48))) == 8
    assert order._piece_ordinals(10_000, 8192, slice(0, 8192)) is None


@given(n=st.lists(st.integers(0, 5000), min_size=1, max_size=20))
def test_a_sample_is_found_without_its_neighbours(n):
    order = make([10, 20, 30, 5])
    ordinals = np.array(n)
    together = order.locate(ordinals)
    alone = [order.locate(ordinals[i : i + 1]) for i in range(len(n))]
    assert together.shards.tolist() == [int(a.shards[0]) for a in alone]
    assert together.indices.tolist() == [int(a.indices[0]) for a in alone]


def test_seed_epoch_and_dataset_each_change_the_order():
    n = np.arange(300)
    base = make([100, 100, 100])

    def same(a, b):
        return np.array_equal(a.shards, b.shards) and np.array_equal(a.indices, b.indices)

    assert same(base.locate(n), make([100, 100, 100]).locate(n))
    assert not same(base.locate(n), make([100, 100, 100], seed=1).locate(n))
    assert not same(base.locate(n), make([100, 100, 100], digest="other").locate(n))
    assert not same(base.locate(n), base.locate(n + 300))


def test_a_rank_reads_few_shards_at_a_time():
    order = make([100] * 32, lanes=8, window=2)
    for rank in range(4):
        shards = {int(s) for start in range(0, 1600, 64) for s in order.piece(start, 64, rank, 4).shards}
        assert len(shards) <= 2 * 2  # its two lanes, one window of two shards each


def test_more_ranks_than_images_and_empty_data_are_refused():
    with pytest.raises(ValueError, match="9 ranks cannot share a batch of 8"):
        make([100]).piece(0, 8, 0, 9)
    with pytest.raises(ValueError, match="no samples"):
        make([0, 0])
    with pytest.raises(ValueError, match="must be >= 1"):
        make([5], lanes=0)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**63 - 1))
def test_feistel_permutes_any_range(size, key):
    x = np.arange(size)
    assert sorted(feistel(x, np.full(size, size), key).tolist()) == x.tolist()


def test_the_shuffle_mixes_as_a_permutation_does():
    x = np.arange(10_000)
    shuffled = feistel(x, np.full(10_000, 10_000), key=7)
    assert abs(np.corrcoef(x, shuffled)[0, 1]) < 0.05
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.05


@given(
    shards=shapes,
    lanes=st.integers(1, 12),
    window=st.integers(1, 6),
    seed=st.integers(0, 3),
    stop=st.integers(1, 900),
    data=st.data(),
)
def test_every_time_that_a_sample_was_read_is_found_again(shards, lanes, window, seed, stop, data):
    order = make(shards, lanes, window, seed)
    samples = [(shard, index) for shard, count in enumerate(shards) for index in range(count)]
    asked = data.draw(st.lists(st.sampled_from(samples), max_size=8, unique=True))
    read = order.locate(np.arange(stop))
    log = list(zip(read.shards.tolist(), read.indices.tolist(), strict=True))
    which, ordinals = order.occurrences(*np.array(asked, dtype=np.int64).reshape(-1, 2).T, stop)
    found = [(n, asked[i]) for i, n in zip(which.tolist(), ordinals.tolist(), strict=True)]
    assert found == [(n, sample) for n, sample in enumerate(log) if sample in asked]


@given(n=st.lists(st.integers(0, 10**12), min_size=1, max_size=50), seed=st.integers(0, 2**40))
@settings(deadline=None)
def test_samples_of_very_large_datasets_are_found_again(n, seed):
    order = make([10**6, 3 * 10**6, 999_999, 0, 10**5] * 40, lanes=16, window=8, seed=seed)
    for ordinal in n:
        found = order.locate(np.array([ordinal]))
        assert order.ordinals(found.shards, found.indices, ordinal // order.total).tolist() == [ordinal]
