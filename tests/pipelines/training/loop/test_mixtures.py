"""Trainings on mixtures of datasets: the same whoever computes them, with the loss of each source."""

import math

import numpy as np
import pytest
import torch

from pipelines.checkpoints import ModelError, load_checkpoint
from pipelines.shards.index import DatasetError
from pipelines.shards.joined import read_data
from pipelines.shards.mixture import Schedule, by_stretch
from pipelines.storage import Storage
from pipelines.training.prepare import check_dataset, check_labels
from tests.forked import start_ranks
from tests.pipelines.shards.test_joined import write_source
from tests.pipelines.training.loop.ranks import (
    NO_GRIDS,
    SMALL,
    last_checkpoint,
    process_group,
    tiny_config,
    trace,
    train_here,
)
from tests.pipelines.training.loop.test_invariance import killed_at_random

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

BATCH = 25
STEPS = 20
WEIGHTS = "{0:2,150:1}"  # changes in the middle of a batch


@pytest.fixture
def sources(digits, tmp_path):
    """Digits, pictures without labels, and pictures of two classes of which one is a digit."""
    plain = write_source(tmp_path / "plain", [], np.arange(60) * 4)
    other = write_source(tmp_path / "other", ["10", "7"], np.arange(40) * 6)
    listed = f"{{name:digits,uri:'{digits.uri}',weight:{WEIGHTS}}},{{name:plain,uri:'{plain}'}}"
    return [f"data.uri={digits.uri}", f"data.sources=[{listed},{{name:other,uri:'{other}',weight:0.5}}]"]


def mixed_config(root, sources, *overrides):
    """A run on the sources, in float64, so that losses differ by rounding alone."""
    plain = ["data.num_classes=11", *sources, *SMALL, NO_GRIDS, "optim.warmup_images=0", "optim.precision=fp64"]
    plain += ["objective.timesteps=stratified", "tracking.log_every=25", "objective.label_drop=0.2"]
    return tiny_config(root, STEPS * BATCH, BATCH, *plain, *overrides)


def some_steps(rank, world, rendezvous, dataset, folder, config, steps):
    with process_group(rank, world, rendezvous):
        train_here(folder, dataset, config, rank, world, **({} if steps is None else {"stop_after": steps}))


def test_a_mixture_that_was_killed_goes_on_on_other_workers_with_the_losses_and_weights_of_one(sources, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    config = mixed_config(one, sources)
    dataset, quarantine = read_data(config.data, Storage())
    check_dataset(dataset, config)
    assert quarantine is None
    train_here(one, dataset, config)
    there = mixed_config(many, sources, "micro_batch_size=5", f"checkpoint.every={2 * BATCH}")
    killed_at_random(2, tmp_path, many, dataset, there)
    for at, (world, steps) in enumerate([(3, 4), (1, None)]):
        start_ranks(some_steps, (world, tmp_path / f"rendezvous-{at}", dataset, many, there, steps), world)
    reference, found = trace(one), trace(many)
    assert len(found) == len(reference) == STEPS
    assert max(abs(found[seen] / loss - 1) for seen, loss in reference.items()) < 1e-9
    tensors, same = (load_checkpoint(last_checkpoint(folder))[1] for folder in (one, many))
    for name, tensor in tensors.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-5, atol=1e-8, msg=name)


def test_the_losses_of_the_sources_are_logged_and_add_up_to_the_loss(sources, tmp_path):
    config = mixed_config(tmp_path / "r", sources)
    dataset, _ = read_data(config.data, Storage())
    _, tracker = train_here(tmp_path / "r", dataset, config)
    schedule = Schedule(by_stretch([source.weights for source in dataset.sources]))
    assert len(tracker.points) == STEPS
    for seen, values in tracker.points.items():
        counts = schedule.counts(seen) - schedule.counts(seen - BATCH)
        each = [values[f"train/loss/{name}"] for name in ("digits", "plain", "other")]
        assert math.isclose(float(counts @ np.array(each)) / BATCH, values["train/loss"], rel_tol=1e-9)


def test_weights_and_names_are_part_of_the_identity_and_addresses_are_not(sources, tmp_path):
    def identity(old="", new=""):
        return mixed_config(tmp_path, [override.replace(old, new) for override in sources]).identity()

    assert identity(WEIGHTS, "2") != identity()
    assert identity("name:plain", "name:bare") != identity()
    assert identity("file://", "file:///elsewhere") == identity()
    assert "data.sources" not in tiny_config(tmp_path, 100, 25).identity()


def test_a_run_that_would_go_on_with_other_weights_says_that_they_were_others(sources, tmp_path):
    config = mixed_config(tmp_path, sources)
    dataset, _ = read_data(config.data, Storage())
    train_here(tmp_path, dataset, config, stop_after=2)
    other = mixed_config(tmp_path, [override.replace("weight:0.5", "weight:0.6") for override in sources])
    with pytest.raises(ModelError, match=r"(?s)data\.sources: .*0\.5.* before, .*0\.6.* now\n.* the same settings;"):
        train_here(tmp_path, dataset, other)
    with pytest.raises(ModelError, match=r"add seed=0, and give data\.sources the names and weights that they had"):
        train_here(tmp_path, dataset, other.model_copy(update={"seed": 1}))


def test_a_classifier_and_a_wrong_number_of_classes_are_refused_before_anything_starts(sources, tmp_path):
    config = mixed_config(tmp_path, sources, "data.num_classes=12")
    dataset, _ = read_data(config.data, Storage())
    with pytest.raises(DatasetError, match=r"data\.num_classes is 12 in the config, 11 in all sources"):
        check_dataset(dataset, config)
    classifier = mixed_config(tmp_path, sources).model_copy(update={"task": "classifier"})
    with pytest.raises(DatasetError, match=r"source 'plain' .* has no labels, and task = classifier learns them"):
        check_labels(dataset, classifier)
