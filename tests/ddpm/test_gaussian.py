import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm.gaussian import (
    DiagonalGaussian,
    kl,
    p_reverse,
    posterior_variance,
    q_posterior,
    q_sample,
    q_transition,
    reverse_variance,
)
from ddpm.prediction import Prediction
from ddpm.schedule import make_schedule

SCHEDULE = make_schedule("linear", num_steps=100)


def test_the_chain_of_single_steps_agrees_with_the_closed_form():
    """Moments of x_t by iterating x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) eps (DDPM, eq. 2)."""
    mean, variance = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for t in range(1, 101):
        step = q_transition(mean, t - 1, t, SCHEDULE)
        mean, variance = step.mean, step.variance + (1 - SCHEDULE.betas[t - 1]) * variance
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
    assert posterior_variance(1, 0, SCHEDULE) == 0
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


def test_the_last_step_has_the_variance_of_the_one_above_it():
    """As in the authors' code, for both kinds: with the posterior's own, 0, no data would have a likelihood."""
    for kind in ("small", "large"):
        torch.testing.assert_close(reverse_variance(1, 0, SCHEDULE, kind), posterior_variance(2, 1, SCHEDULE))
        torch.testing.assert_close(reverse_variance(10, 0, SCHEDULE, kind), posterior_variance(20, 10, SCHEDULE))
    one = make_schedule("betas", betas=[0.3])
    assert reverse_variance(1, 0, one, "small").item() == pytest.approx(0.3)


@given(fraction=st.floats(0, 1), t=st.integers(2, 100))
def test_a_learned_variance_interpolates_between_the_fixed_ones_in_log_space(fraction, t):
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    small, large = (reverse_variance(t, t - 1, SCHEDULE, kind) for kind in ("small", "large"))
    p = p_reverse(Prediction(x, x, torch.full_like(x, fraction)), x, t, t - 1, SCHEDULE)
    torch.testing.assert_close(p.variance, (small ** (1 - fraction) * large**fraction).expand_as(x))
    torch.testing.assert_close(p.mean, q_posterior(x, x, t, t - 1, SCHEDULE).mean)


def test_a_learned_variance_is_that_of_the_steps_that_are_taken():
    """Over fewer, larger steps the same fraction gives a larger variance (Improved DDPM, sec. 4)."""
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    pred = Prediction(x, x, torch.full_like(x, 0.5))
    respaced = SCHEDULE.respace(10)
    p = p_reverse(pred, x, 50, 40, SCHEDULE)
    torch.testing.assert_close(p.variance, p_reverse(pred, x, 5, 4, respaced).variance)


def test_kl_and_density_agree_with_torch_distributions():
    mean = torch.randn(2, 5, dtype=torch.float64)
    variance = torch.rand(2, 5, dtype=torch.float64) + 0.1
    q, p = (DiagonalGaussian(m, v) for m, v in zip(mean, variance, strict=True))
    theirs = [torch.distributions.Normal(m, v.sqrt()) for m, v in zip(mean, variance, strict=True)]
    torch.testing.assert_close(kl(q, p), torch.distributions.kl_divergence(*theirs))
    torch.testing.assert_close(q.log_prob(mean[1]), theirs[0].log_prob(mean[1]))


@given(mean=st.floats(-1.5, 1.5), log_std=st.floats(-6, 1))
def test_the_discretized_decoder_is_a_distribution_over_the_grey_levels(mean, log_std):
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    gaussian = DiagonalGaussian(torch.tensor(mean).double(), torch.tensor(2 * log_std).double().exp())
    assert gaussian.discretized_log_prob(levels).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_the_discretized_decoder_is_the_difference_of_two_error_functions():
    mean, std, x = 0.1, 0.05, torch.tensor([0.0, 0.2, -1.0, 1.0], dtype=torch.float64)
    gaussian = DiagonalGaussian(torch.tensor(mean).double(), torch.tensor(std**2).double())

    def cdf(z):
        return (1 + torch.erf((z - mean) / (std * 2**0.5))) / 2

    expected = cdf(x[:2] + 1 / 255) - cdf(x[:2] - 1 / 255)
    torch.testing.assert_close(gaussian.discretized_log_prob(x)[:2].exp(), expected)
    # 22 standard deviations away, where a difference of error functions in float64 is 0.
    edge = gaussian.discretized_log_prob(x)[2]
    assert edge.item() == pytest.approx(torch.special.log_ndtr((x[2] + 1 / 255 - mean) / std).item())


def test_the_decoder_has_a_finite_gradient_far_from_the_data():
    mean = torch.tensor([-30.0, -1.0, 0.0, 1.0, 30.0], dtype=torch.float64, requires_grad=True)
    for x in (-1.0, 0.0, 1.0):
        gaussian = DiagonalGaussian(mean, torch.full_like(mean, 1e-4))
        log_prob = gaussian.discretized_log_prob(torch.full((5,), x, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(log_prob.sum(), mean)
        assert torch.isfinite(log_prob).all()
        assert torch.isfinite(gradient).all()


def test_a_reverse_step_of_two_modes_approaches_a_gaussian_as_beta_falls():
    """The tutorial's reason for small steps (Feller 1949; Sohl-Dickstein et al. 2015): q(x_{t-1} | x_t) on a grid.

    For x_t between the modes, the worst place, the posterior's total variation distance from the Gaussian of its mean
    and variance falls from a half to 0.002, and its variance becomes beta.
    """
    x = torch.linspace(-2, 2, 40_001, dtype=torch.float64)
    prior = torch.exp(-((x + 0.8) ** 2) / 0.08) + torch.exp(-((x - 0.8) ** 2) / 0.08)
    distances, betas = [], [0.5, 0.2, 0.05, 0.01, 0.0025, 0.000625]
    for beta in betas:
        posterior = prior * torch.exp(-((0.1 - (1 - beta) ** 0.5 * x) ** 2) / (2 * beta))
        posterior /= torch.trapezoid(posterior, x)
        mean = torch.trapezoid(posterior * x, x)
        variance = torch.trapezoid(posterior * (x - mean) ** 2, x)
        gaussian = DiagonalGaussian(mean, variance).log_prob(x).exp()
        distances.append(torch.trapezoid((posterior - gaussian).abs(), x).item() / 2)
    assert distances[0] > 0.3
    assert distances[-1] < 0.01
    assert all(later < earlier for earlier, later in itertools.pairwise(distances))
    assert variance.item() == pytest.approx(betas[-1], rel=0.02)
