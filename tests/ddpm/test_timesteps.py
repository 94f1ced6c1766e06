"""Timestep samplers: low-discrepancy sequences; the others are tested with the objectives."""

import pytest
import torch

from ddpm.timesteps import LowDiscrepancyTimesteps


@pytest.mark.parametrize("batch_size", [5, 8, 100])
def test_a_batch_is_evenly_spaced_round_the_circle_whoever_draws_which_part_of_it(batch_size):
    sampler = LowDiscrepancyTimesteps().make(1000, batch_size, seed=3)
    ordinals = torch.arange(20 * batch_size)
    t, weight = sampler.sample(ordinals)
    assert torch.equal(weight, torch.ones(len(ordinals), dtype=torch.float64))
    rows = t.reshape(20, batch_size).sort(dim=1).values
    gaps = torch.cat([rows.diff(dim=1), rows[:, :1] + 1000 - rows[:, -1:]], dim=1)
    assert ((gaps - 1000 / batch_size).abs() < 1).all()
    for i in range(3):
        assert torch.equal(sampler.sample(ordinals[i::3])[0], t[i::3])


def test_every_place_of_the_batch_is_uniform_and_offsets_differ_from_batch_to_batch():
    sampler = LowDiscrepancyTimesteps().make(1000, 8, seed=1)
    t = sampler.sample(torch.arange(8 * 4000))[0].reshape(4000, 8).double()
    assert (t.mean(0) - 500.5).abs().max() < 4.5 * 289 / 4000**0.5
    assert len(t.min(dim=1).values.unique()) == 125  # the offset is anywhere in the first eighth
    assert (
        sampler.sample(torch.arange(8))[0] != LowDiscrepancyTimesteps().make(1000, 8, seed=2).sample(torch.arange(8))[0]
    ).any()
