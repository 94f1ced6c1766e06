"""The stream is one stream: on any number of ranks, with any number of loader processes, killed anywhere, resumed on
another number of ranks."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.shards.order import SampleOrder
from pipelines.shards.stream import StreamSettings
from tests.pipelines.shards.ranks import Reading, run, write_shards

WORLDS = (1, 2, 3, 4, 7)


@given(
    shards=st.lists(st.integers(1, 1000), min_size=1, max_size=12),
    lanes=st.integers(1, 30),
    window=st.integers(1, 5),
    batch=st.integers(7, 90),
    legs=st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(1, 12)), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_any_chain_of_worlds_walks_the_same_stream(shards, lanes, window, batch, legs, seed):
    order = SampleOrder(shards, lanes=lanes, window=window, seed=seed, digest="d")
    number = 0
    for world, batches in legs:
        for _ in range(batches):
            pieces = [order.piece(number * batch, batch, rank, world) for rank in range(world)]
            whole = order.batch(number * batch, batch)
            for name in ("ordinals", "shards", "indices"):
                assert np.array_equal(np.concatenate([getattr(p, name) for p in pieces]), getattr(whole, name))
            assert sorted(whole.ordinals.tolist()) == list(range(number * batch, (number + 1) * batch))
            number += 1
    epoch = order.locate(np.arange(order.total))
    every = {(shard, index) for shard, count in enumerate(shards) for index in range(count)}
    assert set(zip(epoch.shards.tolist(), epoch.indices.tolist(), strict=True)) == every


CHAINS = {
    # sizes of the shards, lanes, batch size, (ranks, loader workers of each) until a kill, the last until the end
    "ragged": ([1, 1000, 3, 40, 17, 250, 2, 128, 5, 64, 31, 9], 8, 64, [(2, 3), (7, 0), (3, 1)]),
    "one shard": ([300], 4, 28, [(7, 0), (1, 2), (4, 0)]),
    "more ranks than shards": ([50, 1, 120], 4, 16, [(4, 1), (7, 0), (2, 2)]),
    "more lanes than shards": ([10, 70, 33, 5, 90], 16, 32, [(3, 0), (1, 3), (7, 1)]),
}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", CHAINS)
def test_processes_that_are_killed_and_resumed_see_the_stream_of_one_process(tmp_path, kind):
    sizes, lanes, batch_size, legs = CHAINS[kind]
    dataset = write_shards(tmp_path / "data", sizes)
    settings = StreamSettings(lanes, 2, 5, tmp_path / "cache", 10**8, threads=1, prefetch=2)
    reading = Reading(dataset.uri, settings, batch_size)
    total = sum(sizes)
    epochs = max(2, 120 * batch_size // total)  # enough for two kills on the way
    batches = -(-epochs * total // batch_size)
    alone = itertools.islice(reading.source(0, 1, 0), batches * batch_size)
    samples = [(sample["__ordinal__"], sample["__key__"]) for sample in alone]
    expected = {n: samples[n * batch_size : (n + 1) * batch_size] for n in range(batches)}
    chance = random.Random(kind)
    found, resumed_at = {}, []
    for leg, (world_size, loaders) in enumerate(legs):
        last = leg == len(legs) - 1
        start = len(found) * batch_size
        stop, notes = batches * batch_size, tmp_path / str(leg)
        seen = run(reading, world_size, loaders, start, stop, notes, None if last else chance)
        assert min(seen) == len(found)
        for parts in seen.values():
            counts = [len(part) for part in parts]
            assert max(counts) - min(counts) <= 1
        found |= {n: list(itertools.chain(*parts)) for n, parts in seen.items()}
        resumed_at.append(len(found))
    assert sorted(found) == list(range(batches))
    assert found == expected  # batch by batch, rank after rank
    by_ordinal = dict(itertools.chain(*found.values()))
    every = {f"{shard:03d}-{index:04d}" for shard, size in enumerate(sizes) for index in range(size)}
    for epoch in range(epochs):
        keys = [by_ordinal[n] for n in range(epoch * total, (epoch + 1) * total)]
        assert len(keys) == len(set(keys))
        assert set(keys) == every
    assert 0 < resumed_at[0] < resumed_at[1] < resumed_at[2] == batches
