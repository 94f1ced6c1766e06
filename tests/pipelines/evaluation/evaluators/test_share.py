import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluation.evaluators import share as shares
from pipelines.evaluation.evaluators.share import TrainShare, default_share, reference_mask, split_positions
from pipelines.shards.index import ShardInfo, make_dataset
from pipelines.shards.quarantine import Problem, make_quarantine


def dataset_of(*counts):
    infos = [ShardInfo(f"train-{i}.tar", count, 1, f"{i}") for i, count in enumerate(counts)]
    content = {"channels": 1, "image_size": 8, "mean": (0.0,), "std": (1.0,), "classes": ()}
    return make_dataset("file:///nowhere", splits={"train": tuple(infos)}, **content)


@given(st.integers(1, 3000), st.data())
def test_a_share_has_its_number_of_images_and_the_reference_has_the_others(total, data):
    share = TrainShare("digest", total, data.draw(st.integers(1, total)))
    positions = torch.arange(total)
    mine, reference = share.trained(positions), share.reference(positions)
    assert int(mine.sum()) == share.count
    assert reference.all() if share.count == total else torch.equal(reference, ~mine)


def test_a_share_is_a_function_of_the_dataset_and_the_position_alone():
    share, other = TrainShare("one", 1000, 500), TrainShare("other", 1000, 500)
    positions = torch.arange(1000)
    some = torch.tensor([999, 3, 3, 512])
    assert torch.equal(share.trained(positions)[some], share.trained(some))
    assert not torch.equal(share.trained(positions), other.trained(positions))
    # It is no block of neighbours, which may be of one class.
    halves = share.trained(positions).view(2, 500).float().mean(1)
    assert (halves - 0.5).abs().max() < 0.1


def test_the_share_is_half_of_many_images_and_all_of_few_and_bounded(monkeypatch):
    assert default_share(dataset_of(400, 599)).count == 999
    assert default_share(dataset_of(700, 738)).count == 719
    monkeypatch.setattr(shares, "MAX_IMAGES", 600)
    assert default_share(dataset_of(2_000_000, 1)).count == 600


def problem(shard, index=None):
    return Problem(f"train-{shard}.tar", index, None if index is None else f"{shard}/{index}", "decode", "")


@given(st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 4))), max_size=12))
def test_a_quarantine_does_not_change_who_trained_the_evaluator(problems):
    dataset = dataset_of(5, 5, 5, 5, 2)
    quarantine = make_quarantine(dataset, [problem(*entry) for entry in problems])
    left_out = quarantine.by_shard
    kept = [
        (5 * shard + index)
        for shard, count in enumerate((5, 5, 5, 5, 2))
        for index in range(count)
        if (excluded := left_out.get(f"train-{shard}.tar", {})) is not None and index not in excluded
    ]
    assert split_positions(dataset, quarantine, torch.arange(len(kept))).tolist() == kept
    share = TrainShare(dataset.digest, 22, 11)
    whole = share.reference(torch.arange(22))
    assert torch.equal(reference_mask(share, dataset, quarantine, torch.arange(len(kept))), whole[kept])


def test_an_evaluator_of_other_data_leaves_all_images_to_the_reference():
    assert reference_mask(None, dataset_of(5), None, torch.arange(5)).all()


def test_positions_are_computed_a_batch_at_a_time():
    dataset = dataset_of(3, 3)
    quarantine = make_quarantine(dataset, [problem(0, 1)])
    assert np.array_equal(split_positions(dataset, quarantine, torch.tensor([4, 1])), [5, 2])
    with pytest.raises(IndexError):
        split_positions(dataset, quarantine, torch.tensor([5]))
