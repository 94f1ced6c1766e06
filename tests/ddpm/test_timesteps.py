"""Timestep samplers: low-discrepancy sequences and EDM's noise levels; the others are tested with the objectives."""

import pytest
import torch
from scipy.stats import norm

from ddpm.schedule import make_schedule
from ddpm.timesteps import LogNormalTimesteps, LowDiscrepancyTimesteps


def chain(num_steps, kind="cosine", **settings):
    return make_schedule(kind, num_steps=num_steps, **settings)


@pytest.mark.parametrize("batch_size", [5, 8, 100])
def test_a_batch_is_evenly_spaced_round_the_circle_on_any_number_of_ranks(batch_size):
    sampler = LowDiscrepancyTimesteps().make(chain(1000), batch_size, seed=3)
    ordinals = torch.arange(20 * batch_size)
    t, weight = sampler.sample(ordinals)
    assert torch.equal(weight, torch.ones(len(ordinals), dtype=torch.float64))
    rows = t.reshape(20, batch_size).sort(dim=1).values
    gaps = torch.cat([rows.diff(dim=1), rows[:, :1] + 1000 - rows[:, -1:]], dim=1)
    assert ((gaps - 1000 / batch_size).abs() < 1).all()
    for i in range(3):
        assert torch.equal(sampler.sample(ordinals[i::3])[0], t[i::3])


def test_every_place_of_the_batch_is_uniform_and_offsets_differ_from_batch_to_batch():
    sampler = LowDiscrepancyTimesteps().make(chain(1000), 8, seed=1)
    t = sampler.sample(torch.arange(8 * 4000))[0].reshape(4000, 8).double()
    assert (t.mean(0) - 500.5).abs().max() < 4.5 * 289 / 4000**0.5
    assert len(t.min(dim=1).values.unique()) == 125  # the offset is anywhere in the first eighth
    assert (
        sampler.sample(torch.arange(8))[0]
        != LowDiscrepancyTimesteps().make(chain(1000), 8, seed=2).sample(torch.arange(8))[0]
    ).any()


@pytest.mark.parametrize("kind", ["cosine", "edm", "linear"])
def test_the_log_noise_level_has_the_quantiles_of_the_normal_distribution(kind):
    schedule = chain(4000, kind)
    t, weight = LogNormalTimesteps(p_mean=-1.0, p_std=0.8).make(schedule, 100, seed=5).sample(torch.arange(100_000))
    assert torch.equal(weight, torch.ones(len(t), dtype=torch.float64))  # which levels are drawn is the objective
    log_k = -schedule.log_snr(t) / 2
    shares = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99], dtype=torch.float64)
    expected = torch.from_numpy(norm.ppf(shares.numpy(), -1.0, 0.8))
    torch.testing.assert_close(log_k.quantile(shares), expected, rtol=0, atol=0.03)


def test_on_the_straight_path_it_is_the_logit_normal_distribution_of_flow_matching():
    """ln(sigma / alpha) = ln(tau / (1 - tau)), so that tau = sigmoid(N(p_mean, p_std^2)), which SD3 and JiT draw."""
    schedule, generator = chain(4000, "flow"), torch.Generator().manual_seed(0)
    t, _ = LogNormalTimesteps(p_mean=0.8, p_std=0.8).make(schedule, 100, seed=5).sample(torch.arange(100_000))
    drawn = torch.sigmoid(0.8 + 0.8 * torch.randn(1_000_000, generator=generator, dtype=torch.float64))
    shares = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    torch.testing.assert_close((t / 4000).double().quantile(shares), drawn.quantile(shares), rtol=0, atol=0.003)


def test_a_timestep_has_the_probability_of_the_levels_that_are_nearest_to_it_and_the_ends_have_the_rest():
    schedule, timesteps = chain(20), LogNormalTimesteps()
    log_k = -schedule.log_snr(torch.arange(1, 21)) / 2
    edges = [-torch.inf, *((log_k[:-1] + log_k[1:]) / 2).tolist(), torch.inf]
    expected = torch.from_numpy(norm.cdf(edges, -1.2, 1.2)).diff()
    t, _ = timesteps.make(schedule, 1000, seed=0).sample(torch.arange(200_000))
    torch.testing.assert_close(torch.bincount(t, minlength=21)[1:] / len(t), expected.float(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("batch_size", [7, 64])
def test_every_stratum_of_a_batch_has_one_level_on_any_number_of_ranks(batch_size):
    schedule, timesteps = chain(1000), LogNormalTimesteps(uniform_fraction=0.1)
    sampler, ordinals = timesteps.make(schedule, batch_size, seed=3), torch.arange(10 * batch_size)
    t, _ = sampler.sample(ordinals)
    below = torch.cat([torch.zeros(1), timesteps.probability_below(schedule), torch.ones(1)]).double()
    rows = t.reshape(10, batch_size).sort(dim=1).values
    strata = torch.arange(batch_size) / batch_size
    assert (below[rows - 1] < strata + 1 / batch_size).all()  # the level's probabilities overlap the stratum
    assert (below[rows] > strata).all()
    for i in range(3):
        assert torch.equal(sampler.sample(ordinals[i::3])[0], t[i::3])


def test_a_last_timestep_without_signal_is_drawn_by_the_uniform_share_only():
    schedule, ordinals = chain(10, zero_terminal_snr=True), torch.arange(10_000)
    assert LogNormalTimesteps(p_mean=9.0).make(schedule, 100, seed=0).sample(ordinals)[0].max() == 9
    t, _ = LogNormalTimesteps(uniform_fraction=0.5).make(schedule, 100, seed=0).sample(ordinals)
    assert (t == 10).double().mean().item() == pytest.approx(0.05, abs=0.001)
