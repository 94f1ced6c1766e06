"""The timestep samplers as a step uses them."""

from __future__ import annotations

import pytest
import torch

from pipelines.config import compose, timestep_sampler

BATCH = 32


def sampler(kind: str):
    few = ["schedule.num_steps=4", "sampler.steps=4", f"batch_size={BATCH}"]
    config = compose(["+experiment=digits", f"objective.timesteps={kind}", *few])
    return timestep_sampler(config)


@pytest.mark.parametrize("kind", ["uniform", "stratified", "log_normal"])
def test_a_sampler_that_does_not_learn_ignores_losses_and_stores_nothing(kind):
    timesteps, ordinals = sampler(kind), torch.arange(BATCH)
    t, weights = timesteps.sample(ordinals)
    assert not timesteps.learns
    assert 1 <= t.min() <= t.max() <= 4
    assert torch.equal(weights, torch.ones(BATCH, dtype=torch.float64))
    timesteps.update(ordinals, torch.rand(BATCH))
    assert torch.equal(timesteps.sample(ordinals)[0], t)
    assert timesteps.state_dict() == {}


def test_a_sampler_that_learns_goes_on_from_tensors_that_are_overwritten_in_place():
    trained, restored, ordinals = sampler("importance"), sampler("importance"), torch.arange(BATCH)
    assert trained.learns
    for start in range(0, 8 * BATCH, BATCH):
        t, _ = trained.sample(ordinals + start)
        trained.update(ordinals + start, t.double())
    assert set(trained.state_dict()) == {"losses", "counts"}
    assert not torch.equal(trained.sample(ordinals)[1], restored.sample(ordinals)[1])
    for name, tensor in restored.state_dict().items():
        tensor.copy_(trained.state_dict()[name])
    for found, expected in zip(restored.sample(ordinals), trained.sample(ordinals), strict=True):
        assert torch.equal(found, expected)
