import pytest
import torch

from ddpm.noise import Purpose, integers, normal
from ddpm.objectives import simple_loss
from ddpm.prediction import Conditioning, coefficients
from ddpm.schedule import make_schedule

SCHEDULE = make_schedule("cosine")


class Optimal(torch.nn.Module):
    """The best eps for x_0 ~ N(0, std^2): E[eps | x_t]."""

    def __init__(self, std):
        super().__init__()
        self.std = std

    def forward(self, x_t, t, cond):
        alpha, sigma = coefficients(SCHEDULE, t + 1, x_t)
        return sigma * x_t / (alpha**2 * self.std**2 + sigma**2)


def test_the_loss_of_the_optimal_predictor_is_the_posterior_variance_of_the_noise():
    """Var[eps | x_t] = alpha^2 std^2 / (alpha^2 std^2 + sigma^2) on Gaussian data."""
    n, std, t = torch.arange(4000), 0.5, 400
    x_0 = std * normal(0, n, Purpose.SAMPLING, (1, 4, 4))
    eps = normal(0, n, Purpose.NOISE, (1, 4, 4))
    loss = simple_loss(Optimal(std), SCHEDULE, x_0, torch.full_like(n, t), eps)
    alpha, sigma = SCHEDULE.alpha(t).item(), SCHEDULE.sigma(t).item()
    assert loss.shape == (4000,)
    assert loss.mean().item() == pytest.approx((alpha * std) ** 2 / ((alpha * std) ** 2 + sigma**2), rel=0.02)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_a_network_that_outputs_zero_pays_the_power_of_its_target(kind):
    class Zero(torch.nn.Module):
        def forward(self, x_t, t, cond):
            assert cond is not None
            return torch.zeros_like(x_t)

    n = torch.arange(2000)
    x_0, eps = normal(0, n, Purpose.SAMPLING, (1, 4, 4)), normal(0, n, Purpose.NOISE, (1, 4, 4))
    t = integers(0, n, Purpose.TIMESTEP, 1000) + 1
    loss = simple_loss(Zero(), SCHEDULE, x_0, t, eps, Conditioning(label=n % 10), kind=kind)
    assert loss.mean().item() == pytest.approx(1, abs=0.03)
