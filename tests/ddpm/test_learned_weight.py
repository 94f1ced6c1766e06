"""The learned weight of the loss: what it converges to, and how it goes on from a checkpoint."""

import math

import pytest
import torch

from ddpm.learned_weight import LearnedWeighting
from ddpm.schedule import make_schedule

SCHEDULE = make_schedule("cosine", num_steps=200)
BATCH = 64


def batches(count, first=0):
    """Timesteps and losses whose mean falls by a factor of 300 with the noise level, and scatter by half."""
    for i in range(first, first + count):
        generator = torch.Generator().manual_seed(i)
        t = torch.randint(1, 201, (BATCH,), generator=generator)
        yield t, mean_loss()[t - 1] * (1 + torch.rand(BATCH, generator=generator, dtype=torch.float64) - 0.5)


def mean_loss():
    log_k = -SCHEDULE.log_snr(torch.arange(1, 201)) / 2
    return 0.01 + 3 * torch.sigmoid(-log_k)


def test_it_converges_to_the_logarithm_of_the_mean_loss_so_that_every_level_contributes_alike():
    learned, one = LearnedWeighting().make(SCHEDULE, seed=0), torch.ones(BATCH, dtype=torch.float64)
    assert torch.equal(learned.factors(torch.arange(1, 201)), torch.ones(200, dtype=torch.float64))
    for t, losses in batches(1500):
        learned.update(t, losses, one)
    torch.testing.assert_close(learned.log_loss(), mean_loss().log(), rtol=0, atol=0.3)
    assert (learned.log_loss() - mean_loss().log()).square().mean().sqrt() < 0.1
    t = torch.arange(1, 201)
    assert (learned.factors(t) * mean_loss()).mean().item() == pytest.approx(1, abs=0.05)


def test_its_step_is_adams_on_the_papers_loss():
    learned = LearnedWeighting(channels=8, lr=0.1).make(SCHEDULE, seed=3)
    parameter = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.99))
    for t, losses in batches(5):
        weights = 0.5 + losses
        u = learned.features[t - 1] @ parameter
        adam.zero_grad()
        (weights * (losses / u.exp() + u)).mean().backward()
        adam.step()
        learned.update(t, losses, weights)
    torch.testing.assert_close(learned.weight, parameter.detach(), rtol=1e-9, atol=1e-12)


def test_a_learned_weight_continues_from_tensors_overwritten_in_place():
    one, other = (LearnedWeighting().make(SCHEDULE, seed=1) for _ in range(2))
    weights = torch.ones(BATCH)
    for t, losses in batches(3):
        one.update(t, losses, weights)
    for name, tensor in other.state_dict().items():
        tensor.copy_(one.state_dict()[name])
    for t, losses in batches(3, first=3):
        one.update(t, losses, weights)
        other.update(t, losses, weights)
    assert torch.equal(one.log_loss(), other.log_loss())


def test_a_timestep_without_signal_has_features_too():
    schedule = make_schedule("cosine", num_steps=10, zero_terminal_snr=True)
    learned = LearnedWeighting().make(schedule, seed=0)
    assert learned.features.isfinite().all()
    assert learned.features.square().sum(1).sqrt().max() < math.sqrt(2)
