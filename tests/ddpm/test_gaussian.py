import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm.gaussian import DiagonalGaussian, q_posterior, q_sample, reverse_variance
from ddpm.schedule import make_schedule

SCHEDULE = make_schedule("linear", num_steps=100)


def test_the_chain_of_single_steps_agrees_with_the_closed_form():
    """Moments of x_t by iterating x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) eps (DDPM, eq. 2)."""
    mean, variance = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for t, beta in enumerate(SCHEDULE.betas, start=1):
        mean, variance = (1 - beta).sqrt() * mean, (1 - beta) * variance + beta
        torch.testing.assert_close(mean, SCHEDULE.alpha(t).reshape(1))
        torch.testing.assert_close(variance, SCHEDULE.sigma(t).square().reshape(1))


@given(t=st.integers(2, 100), data=st.data())
def test_the_posterior_is_bayes_rule(t, data):
    """q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): precisions and weighted means add."""
    s = data.draw(st.integers(1, t - 1))
    x_0, x_t = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
    bar_t, bar_s = SCHEDULE.alpha_bar(t), SCHEDULE.alpha_bar(s)
    step = bar_t / bar_s
    precision = step / (1 - step) + 1 / (1 - bar_s)
    mean = (step.sqrt() * x_t / (1 - step) + bar_s.sqrt() * x_0 / (1 - bar_s)) / precision
    posterior = q_posterior(x_t, x_0, t, s, SCHEDULE)
    torch.testing.assert_close(posterior.variance.flatten(), (1 / precision).reshape(1))
    torch.testing.assert_close(posterior.mean, mean)


def test_the_last_posterior_is_the_image_itself():
    x_0, x_1 = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    posterior = q_posterior(x_1, x_0, 1, 0, SCHEDULE)
    torch.testing.assert_close(posterior.mean, x_0)
    assert posterior.variance.abs().max() == 0


def test_small_variance_is_the_posteriors_and_large_is_beta():
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t in (2, 50, 100):
        small, large = (reverse_variance(t, t - 1, SCHEDULE, kind) for kind in ("small", "large"))
        torch.testing.assert_close(small, q_posterior(x, x, t, t - 1, SCHEDULE).variance.squeeze())
        torch.testing.assert_close(large, SCHEDULE.betas[t - 1])
        assert small < large
    assert reverse_variance(1, 0, SCHEDULE, "small") == 0
    with pytest.raises(ValueError, match="allowed: small, large"):
        reverse_variance(2, 1, SCHEDULE, "medium")


def test_samples_have_the_gaussians_moments():
    noise = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = DiagonalGaussian(torch.tensor(2.0), torch.tensor(0.25)).sample(noise)
    assert drawn.mean().item() == pytest.approx(2, abs=0.01)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.01)


def test_q_sample_interpolates_from_image_to_noise():
    x_0, eps = torch.randn(2, 5, 1, 4, 4)
    assert torch.equal(q_sample(x_0, 0, eps, SCHEDULE), x_0)
    per_sample = q_sample(x_0, torch.tensor([1, 2, 3, 4, 100]), eps, SCHEDULE)
    torch.testing.assert_close(per_sample[4], q_sample(x_0[4:], 100, eps[4:], SCHEDULE)[0])
