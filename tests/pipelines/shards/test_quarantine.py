"""Readers leave out what a quarantine names, when they are given it; the order of samples follows."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.index import DatasetError, ShardIndex, make_dataset
from pipelines.shards.order import SampleOrder
from pipelines.shards.quarantine import (
    Problem,
    Quarantine,
    kept_places,
    kept_samples,
    kept_shards,
    make_quarantine,
    quarantine_of,
    read_quarantine,
    store_quarantine,
    stream_digest,
)
from pipelines.shards.read import read_split
from pipelines.storage import Storage
from tests.pipelines.shards.tars import picture, reader, write_shard

STORAGE = Storage()
PER_SHARD = 5


@pytest.fixture
def dataset(tmp_path):
    """Four shards of five flat pictures; pixel value = label = number of the sample."""
    for shard in range(4):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        entries = [[(f"{n:03d}.png", picture(n)), (f"{n:03d}.cls", str(n).encode())] for n in numbers]
        write_shard(tmp_path / f"train-{shard}.tar", [e for pair in entries for e in pair])
    return index_tars(f"file://{tmp_path}", STORAGE).dataset


def gone(shard, index=None):
    key = None if index is None else f"{shard * PER_SHARD + index:03d}"
    return Problem(f"train-{shard}.tar", index, key, "decode", "for a test")


EXCLUSIONS = st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, PER_SHARD - 1))), max_size=12)


@pytest.mark.parametrize(
    "left_out",
    [[], [(0, 0)], [(1, 4), (1, 0)], [(2, None)], [(0, None), (1, 3), (3, 2)], [(0, i) for i in range(PER_SHARD)]],
)
def test_exactly_what_the_quarantine_names_is_left_out(dataset, tmp_path, left_out):
    quarantine = make_quarantine(dataset, [gone(*pair) for pair in left_out])
    kept = reader(dataset, tmp_path, quarantine)
    missing = {s * PER_SHARD + i for s, at in left_out for i in (range(PER_SHARD) if at is None else [at])}
    wanted = [n for n in range(4 * PER_SHARD) if n not in missing]
    batch = read_split(kept)
    assert batch.labels.tolist() == wanted
    assert ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist() == wanted
    assert sum(s.samples for s in kept.shards) == len(wanted)
    assert read_split(reader(dataset, tmp_path)).labels.tolist() == list(range(4 * PER_SHARD))


def test_every_sample_that_is_left_comes_once_per_epoch_on_any_number_of_ranks(dataset, tmp_path):
    quarantine = make_quarantine(dataset, [gone(0), gone(2, 1), gone(3, 4)])

    def run(world):
        kept = reader(dataset, tmp_path, quarantine)
        counts = [s.samples for s in kept.shards]
        order = SampleOrder(counts, lanes=2, window=2, seed=0, digest=stream_digest(dataset, quarantine))
        found = {}
        for start in (0, sum(counts)):
            for rank in range(world):
                batch = kept.batch(order.piece(start, sum(counts), rank, world))
                found |= dict(zip(batch.ordinals.tolist(), batch.labels.tolist(), strict=True))
        return [found[n] for n in range(2 * sum(counts))]

    stream = run(1)
    left = sorted({*range(5, 20)} - {11, 19})
    assert sorted(stream[:13]) == sorted(stream[13:]) == left
    assert run(3) == stream


def test_a_quarantine_changes_the_stream_and_its_reasons_do_not(dataset):
    none = stream_digest(dataset, None)
    one = make_quarantine(dataset, [gone(0, 1)])
    reworded = make_quarantine(dataset, [dataclasses.replace(gone(0, 1), kind="bytes", reason="other words")])
    assert none == dataset.digest
    assert stream_digest(dataset, one) == stream_digest(dataset, reworded) != none
    assert stream_digest(dataset, make_quarantine(dataset, [gone(0, 2)])) != stream_digest(dataset, one)
    assert pickle.loads(pickle.dumps(one)).digest == one.digest


@given(EXCLUSIONS, st.randoms())
def test_the_order_and_repetition_of_problems_do_not_matter(pairs, random):
    dataset = make_dataset("file:///x", splits={"train": ()}, classes=(), channels=1, image_size=8, mean=(0,), std=(0,))
    dataset = dataclasses.replace(dataset, splits={"train": tuple(shard(n) for n in range(4))})
    problems = [gone(*pair) for pair in pairs]
    first = make_quarantine(dataset, problems)
    random.shuffle(problems)
    assert make_quarantine(dataset, problems + problems).digest == first.digest
    assert len({(p.shard, p.index) for p in first.excluded}) == len(first.excluded)
    whole = {s for s, at in pairs if at is None}
    left = {f"train-{s}.tar": 5 - len({at for z, at in pairs if z == s}) for s in range(4) if s not in whole}
    left = {name: count for name, count in left.items() if count}
    if left:
        assert {s.name: s.samples for s in kept_shards(dataset, "train", first)} == left
    else:
        with pytest.raises(DatasetError, match="the quarantine leaves no sample of file:///x's split 'train'"):
            kept_shards(dataset, "train", first)


def shard(number):
    from pipelines.shards.index import ShardInfo

    return ShardInfo(f"train-{number}.tar", PER_SHARD, 10240, "0" * 64)


def test_a_quarantine_of_another_dataset_or_another_sample_is_refused(dataset, tmp_path):
    other = Quarantine("f" * 64, (gone(0, 1),))
    with pytest.raises(DatasetError, match=r"the quarantine is of dataset ffffffffffff, .* write it again with"):
        reader(dataset, tmp_path, other)
    moved = Quarantine(dataset.digest, (dataclasses.replace(gone(0, 1), sample="004"),))
    with pytest.raises(
        DatasetError, match=r"leaves out sample 1 \('004'\) of train-0.tar, whose index has '001' there"
    ):
        read_split(reader(dataset, tmp_path, moved))
    index = ShardIndex.of(("a",), ({},))
    beyond = Quarantine("", (Problem("x.tar", 3, "b", "decode", ""),))
    with pytest.raises(DatasetError, match=r"leaves out sample 3 \('b'\) of x.tar, whose index has nothing there"):
        kept_samples("x.tar", index, beyond)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q: {**q, "schema_version": 2}, r"quarantine.json has version 2, this release reads 1"),
        (lambda q: {**q, "dataset_digest": "0" * 64}, r"does not match its own digest: it was edited or damaged"),
        (lambda q: {**q, "excluded": q["excluded"][:1]}, r"does not match its own digest"),
        (lambda q: {**q, "excluded": [{"shard": "x"}]}, r"quarantine.json is damaged: .*`ddpm check .* --quarantine`"),
        (lambda q: {"schema_version": 1}, r"quarantine.json is damaged: 'digest'"),
        (lambda q: [], r"quarantine.json is damaged"),
    ],
)
def test_a_damaged_quarantine_is_refused(dataset, tmp_path, change, message):
    uri = dataset.uri
    assert read_quarantine(uri, STORAGE) is None
    quarantine = make_quarantine(dataset, [gone(0, 1), gone(1)])
    STORAGE.write(f"{uri}/quarantine.json", quarantine.to_json().encode())
    assert read_quarantine(uri, STORAGE) == quarantine
    STORAGE.write(f"{uri}/quarantine.json", json.dumps(change(json.loads(quarantine.to_json()))).encode())
    with pytest.raises(DatasetError, match=message):
        read_quarantine(uri, STORAGE)


@pytest.mark.parametrize("left_out", [[], [(1, 0), (1, 3)], [(0, None), (2, 2), (3, 4)]])
def test_a_sample_is_found_where_a_reader_with_the_quarantine_has_it(dataset, tmp_path, left_out):
    quarantine = make_quarantine(dataset, [gone(*pair) for pair in left_out])
    numbers = np.arange(4 * PER_SHARD)
    which, shards, indices = kept_places(dataset, "train", quarantine, numbers // PER_SHARD, numbers % PER_SHARD)
    kept = reader(dataset, tmp_path, quarantine)
    firsts = np.cumsum([0, *kept.shards.samples[:-1]])
    assert which.tolist() == read_split(kept).labels.tolist()
    assert kept.at(firsts[shards] + indices).labels.tolist() == which.tolist()


def test_a_quarantine_that_another_took_the_place_of_is_found_by_the_digest_of_its_stream(dataset):
    first, second = (make_quarantine(dataset, [gone(0, at)]) for at in (1, 2))
    for quarantine in (first, second):
        store_quarantine(quarantine, dataset.uri, STORAGE)
    assert read_quarantine(dataset.uri, STORAGE) == second
    for quarantine in (None, first, second):
        assert quarantine_of(dataset, stream_digest(dataset, quarantine), STORAGE) == (quarantine,)
    assert quarantine_of(dataset, "0" * 64, STORAGE) is None
