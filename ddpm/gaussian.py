"""The Gaussians of the forward process and of its reversal (DDPM, Ho et al. 2020, sec. 2-3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ddpm.prediction import coefficients
from ddpm.schedule import NoiseSchedule


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, diag(variance)); `variance` broadcasts against `mean`."""

    mean: Tensor
    variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + sqrt(variance) noise, for standard normal noise of mean's shape."""
        return self.mean + self.variance.sqrt() * noise


def q_sample(x_0: Tensor, t: Tensor | float, eps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x_t ~ q(x_t | x_0) in one jump: alpha_t x_0 + sigma_t eps (DDPM, eq. 4)."""
    alpha, sigma = coefficients(schedule, t, x_0)
    return alpha * x_0 + sigma * eps


def q_posterior(
    x_t: Tensor, x_0: Tensor, t: Tensor | float, s: Tensor | float, schedule: NoiseSchedule
) -> DiagonalGaussian:
    """q(x_s | x_t, x_0) for s < t (DDPM, eq. 6-7, for any two levels of the chain).

    At s = 0 the mean is x_0 and the variance 0.
    """
    bar_t, bar_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
    step = bar_t / bar_s  # alpha_{t|s}^2
    shape = (-1,) + (1,) * (x_t.dim() - 1)

    def cast(value: Tensor) -> Tensor:
        return value.to(device=x_t.device, dtype=x_t.dtype).reshape(shape)

    from_x_0 = cast(bar_s.sqrt() * (1 - step) / (1 - bar_t))
    from_x_t = cast(step.sqrt() * (1 - bar_s) / (1 - bar_t))
    variance = cast((1 - step) * (1 - bar_s) / (1 - bar_t))
    return DiagonalGaussian(from_x_0 * x_0 + from_x_t * x_t, variance)


def reverse_variance(t: int, s: int, schedule: NoiseSchedule, kind: str) -> Tensor:
    """Fixed variance of p(x_s | x_t), float64: the posterior's ("small") or beta_{t|s} ("large"); DDPM, sec. 3.2."""
    bar_t, bar_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
    beta = 1 - bar_t / bar_s
    if kind == "large":
        return beta
    if kind == "small":
        return beta * (1 - bar_s) / (1 - bar_t)
    raise ValueError(f"unknown variance {kind!r}; allowed: small, large")
