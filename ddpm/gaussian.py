"""The Gaussians of the forward process and of its reversal (DDPM, Ho et al. 2020, sec. 2-3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddpm.prediction import Prediction, coefficients, per_sample
from ddpm.schedule import NoiseSchedule

ReverseVariance = Literal["small", "large"]


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, diag(variance)); `variance` broadcasts against `mean`.

    Examples:
        >>> normal = DiagonalGaussian(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        >>> normal.log_prob(torch.zeros(1)).exp().item() == (2 * math.pi) ** -0.5
        True
        >>> bins = normal.discretized_log_prob(torch.linspace(-1, 1, 256, dtype=torch.float64))
        >>> round(bins.exp().sum().item(), 6)
        1.0
    """

    mean: Tensor
    variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + sqrt(variance) noise, for standard normal noise of mean's shape."""
        return self.mean + self.variance.sqrt() * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of each element of x, in nats, of x's shape."""
        return -((x - self.mean).square() / self.variance + self.variance.log() + math.log(2 * math.pi)) / 2

    def discretized_log_prob(self, x: Tensor, levels: int = 256) -> Tensor:
        """Return the log-probability of the bin around each element of x, in nats, of x's shape (DDPM, eq. 13).

        The grid has `levels` values from -1 to 1; the outermost bins extend to infinity, so that all bins sum to 1.
        The normal CDF is exact and in log form, so the far tails neither underflow nor lose their gradient.
        """
        half = 1 / (levels - 1)
        std = self.variance.sqrt()
        low, high = (x - half - self.mean) / std, (x + half - self.mean) / std
        # In the upper tail the CDF is nearly 1 at both ends of a bin: use the mirrored bin in the lower tail.
        mirrored = low > 0
        low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
        log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
        inside = log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-1e-30)))
        first, last = x < -1 + half, x > 1 - half
        left_of = torch.where(mirrored, torch.special.log_ndtr(-low), log_high)
        right_of = torch.where(mirrored, log_high, torch.special.log_ndtr(-low))
        return torch.where(first, left_of, torch.where(last, right_of, inside))


def kl(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
    """Return KL(q || p) of each element, in nats, of the means' shape.

    Examples:
        >>> def normal(mean, variance):
        ...     return DiagonalGaussian(torch.tensor(mean), torch.tensor(variance))
        >>> kl(normal(1.0, 1.0), normal(0.0, 1.0)).item()  # mean^2 / 2
        0.5
        >>> kl(normal(0.5, 2.0), normal(0.5, 2.0)).item()
        0.0
    """
    ratio = q.variance / p.variance
    return ((q.mean - p.mean).square() / p.variance + ratio - 1 - ratio.log()) / 2


def q_sample(x_0: Tensor, t: Tensor | float, eps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return x_t = alpha_t x_0 + sigma_t eps, a sample of q(x_t | x_0) if eps is standard normal (DDPM, eq. 4).

    Examples:
        >>> from ddpm.schedule import Linear
        >>> schedule, x_0, eps = Linear().make(1000), torch.full((2, 1, 1, 1), 0.5).double(), torch.ones(2, 1, 1, 1)
        >>> q_sample(x_0, torch.tensor([0, 1000]), eps, schedule).flatten().round(decimals=2).tolist()
        [0.5, 1.0]
    """
    alpha, sigma = coefficients(schedule, t, x_0)
    return alpha * x_0 + sigma * eps


def q_transition(x_s: Tensor, s: Tensor | float, t: Tensor | float, schedule: NoiseSchedule) -> DiagonalGaussian:
    """Return q(x_t | x_s) for s < t: one step of the forward chain (DDPM, eq. 2) if s = t - 1, else several at once.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> schedule = Linear().make(1000)
        >>> step = q_transition(torch.ones(1, 1, 1, 1, dtype=torch.float64), 499, 500, schedule)
        >>> torch.allclose(step.variance, schedule.betas[499])
        True
        >>> round((step.mean.square() + step.variance).item(), 6)  # variance is preserved
        1.0
    """
    step = schedule.alpha_bar(t) / schedule.alpha_bar(s)
    return DiagonalGaussian(per_sample(step.sqrt(), x_s) * x_s, per_sample(1 - step, x_s))


def q_posterior(
    x_t: Tensor, x_0: Tensor, t: Tensor | float, s: Tensor | float, schedule: NoiseSchedule
) -> DiagonalGaussian:
    """Return q(x_s | x_t, x_0) for s < t (DDPM, eq. 6-7, for any two levels of the chain).

    At s = 0 the mean is x_0 and the variance 0.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> x_t, x_0 = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.5)
        >>> last = q_posterior(x_t, x_0, 1, 0, Linear().make(1000))
        >>> last.mean.item(), last.variance.item()
        (0.5, 0.0)
    """
    bar_t, bar_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
    return DiagonalGaussian(_posterior_mean(x_t, x_0, bar_t, bar_s), per_sample(_posterior_variance(bar_t, bar_s), x_t))


def _posterior_mean(x_t: Tensor, x_0: Tensor, bar_t: Tensor, bar_s: Tensor) -> Tensor:
    step = bar_t / bar_s  # alpha_{t|s}^2
    from_x_0 = per_sample(bar_s.sqrt() * (1 - step) / (1 - bar_t), x_t)
    from_x_t = per_sample(step.sqrt() * (1 - bar_s) / (1 - bar_t), x_t)
    return from_x_0 * x_0 + from_x_t * x_t


def posterior_variance(t: Tensor | float, s: Tensor | float, schedule: NoiseSchedule) -> Tensor:
    """Return the variance of q(x_s | x_t, x_0), float64 (DDPM, eq. 7); 0 at s = 0.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> schedule = Linear().make(1000)
        >>> posterior_variance(1, 0, schedule).item()
        0.0
        >>> bool(posterior_variance(500, 499, schedule) < schedule.betas[499])
        True
    """
    return _posterior_variance(schedule.alpha_bar(t), schedule.alpha_bar(s))


def _posterior_variance(bar_t: Tensor, bar_s: Tensor) -> Tensor:
    return (1 - bar_t / bar_s) * (1 - bar_s) / (1 - bar_t)


def reverse_variance(
    t: Tensor | float, s: Tensor | float, schedule: NoiseSchedule, kind: ReverseVariance = "small"
) -> Tensor:
    """Return the fixed variance of p(x_s | x_t), float64: the posterior's ("small") or beta_{t|s} ("large").

    See DDPM, sec. 3.2. At s = 0 the posterior variance is 0, which gives no finite likelihood. There both kinds use the
    posterior variance of the next step up of the same length, from 2 t to t: for single steps that of t = 2, as in the
    authors' code. If 2 t > T, the step from T to t is used; if t = T (a chain of one step), the variance is beta_{T|0}.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> schedule = Linear().make(1000)
        >>> small, large = (reverse_variance(500, 499, schedule, kind) for kind in ("small", "large"))
        >>> torch.equal(small, posterior_variance(500, 499, schedule)), torch.allclose(large, schedule.betas[499])
        (True, True)
    """
    t, s = torch.as_tensor(t, dtype=torch.float64), torch.as_tensor(s, dtype=torch.float64)
    bar_t, bar_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
    beta = 1 - bar_t / bar_s
    above = (2 * t).clamp(max=schedule.num_steps)
    last = torch.where(above > t, _posterior_variance(schedule.alpha_bar(above), bar_t), beta)
    if kind == "large":
        return torch.where(s > 0, beta, last)
    if kind == "small":
        return torch.where(s > 0, _posterior_variance(bar_t, bar_s), last)
    raise ValueError(f"unknown variance {kind!r}; allowed: small, large")


def p_reverse(
    pred: Prediction,
    x_t: Tensor,
    t: Tensor | float,
    s: Tensor | float,
    schedule: NoiseSchedule,
    variance: ReverseVariance = "small",
) -> DiagonalGaussian:
    """Return p(x_s | x_t), with the posterior's mean at the predicted x_0 and a fixed or learned variance.

    See DDPM, sec. 3.2. If the prediction has a `mean_gradient` (classifier guidance), it shifts the mean.

    Args:
        pred: the denoiser's prediction at (x_t, t).
        variance: kind of fixed variance, see `reverse_variance`; a learned variance replaces it (Improved DDPM,
            eq. 15).

    Examples:
        >>> from ddpm.prediction import from_output
        >>> from ddpm.schedule import Linear
        >>> schedule, x_t, x_0 = Linear().make(1000), torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.5)
        >>> p = p_reverse(from_output(x_0, x_t, 500, schedule, "x0"), x_t, 500, 499, schedule)
        >>> kl(q_posterior(x_t, x_0, 500, 499, schedule), p).item()  # the prediction is the truth
        0.0
    """
    bar_t, bar_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
    mean = _posterior_mean(x_t, pred.x0, bar_t, bar_s)
    if pred.variance_fraction is None:
        var = per_sample(reverse_variance(t, s, schedule, variance), x_t)
    else:
        low = per_sample(reverse_variance(t, s, schedule, "small").log(), x_t)
        high = per_sample((1 - bar_t / bar_s).log(), x_t)
        var = torch.lerp(low, high, pred.variance_fraction).exp()
    if pred.mean_gradient is not None:
        mean = mean + var * pred.mean_gradient  # Dhariwal & Nichol 2021, algorithm 1
    return DiagonalGaussian(mean, var)
