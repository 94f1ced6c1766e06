"""Spacings: the noise levels that a sampler visits, from the level of x_T down to 0.

The first three are grids of table timesteps. diffusers counts table indices from 0, which are our t - 1:
    "trailing": T, ..., T/n, 0; the same name in diffusers, which recommends it (Lin et al. 2024, table 2). It
        starts at T, where x_T is distributed exactly as in training, and is the default.
    "leading": (n - 1) floor(T/n) + 1, ..., floor(T/n) + 1, 1, 0; diffusers' default for DDIM and DDPM (steps_offset 0),
        and DDIM's own code ("uniform"). It never visits the noisiest levels.
    "linspace": n values from T to 1 inclusive, rounded, then 0; diffusers' for DDIM and Euler, and Improved DDPM's
        respacing (there called "N", not "ddimN"). diffusers' DPM-Solver makes n + 1 values and drops the last.
The others are grids of n values of k = sigma / alpha, from min(k_T, 80) to k_1 (the lowest noise level that a network
is trained on), followed by 0. k-diffusion takes both ends as arguments; diffusers starts at k_T even if that is 20,000
(cosine). The limit of 80 is EDM's; levels above it do not improve samples.
    "karras": evenly spaced in k^(1/7) (EDM, Karras et al. 2022, eq. 5); k-diffusion's `get_sigmas_karras`.
    "exponential": evenly spaced in log k, so in log-SNR; k-diffusion's `get_sigmas_exponential`, DPM-Solver's "logSNR".
    "vp": the times of the continuous VP process with beta from 0.1 to 20, evenly spaced (score SDE, Song et al. 2021b,
        eq. 33): k = sqrt(exp(19.9 u^2 / 2 + 0.1 u) - 1); k-diffusion's `get_sigmas_vp`, whose ends are u = 1 and 0.001.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.choices import Choices
from ddpm.schedule import NoiseSchedule

Spacing = Callable[[NoiseSchedule, int], list[float]]
"""(schedule, steps) -> steps + 1 strictly decreasing levels in [0, T], the last 0."""

K_MAX = 80.0
"""EDM's noisiest level, sigma / alpha (Karras et al. 2022, table 1)."""


def trailing(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Return levels from T down to 0, as evenly spaced as integers allow.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> trailing(Linear().make(1000), 4)
        [1000, 750, 500, 250, 0]
    """
    return list(schedule.timesteps(steps))


def leading(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Return the multiples of floor(T / steps) plus 1, in descending order, and 0.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> leading(Linear().make(1000), 4)
        [751.0, 501.0, 251.0, 1.0, 0.0]
    """
    schedule.check_steps(steps)
    stride = schedule.num_steps // steps
    return [float(i * stride + 1) for i in reversed(range(steps))] + [0.0]


def linspace(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Return `steps` values from T to 1, ends included, as evenly spaced as integers allow, and 0.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> linspace(Linear().make(1000), 4)
        [1000.0, 667.0, 334.0, 1.0, 0.0]
    """
    schedule.check_steps(steps)
    if steps == 1:
        return [float(schedule.num_steps), 0.0]
    # As in numpy, halves are rounded to even table indices.
    values = torch.linspace(0, schedule.num_steps - 1, steps, dtype=torch.float64).round() + 1
    return [*values.flip(0).tolist(), 0.0]


def karras(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Return levels evenly spaced in k^(1/7).

    Examples:
        >>> from ddpm.schedule import Linear
        >>> schedule = Linear().make(1000)
        >>> (schedule.ratio(torch.tensor(karras(schedule, 4)[:-1])) ** (1 / 7)).diff().round(decimals=4).tolist()
        [-0.4507, -0.4507, -0.4507]
    """
    return _by_ratio(schedule, steps, karras_ratios)


def exponential(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Return levels evenly spaced in log k.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> schedule = Linear().make(1000)
        >>> schedule.log_snr(torch.tensor(exponential(schedule, 4)[:-1])).diff().round(decimals=4).tolist()
        [5.9914, 5.9914, 5.9914]
    """
    return _by_ratio(schedule, steps, exponential_ratios)


def vp(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Return levels evenly spaced in the time of the continuous VP process.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> [round(level) for level in vp(Linear().make(1000), 4)]
        [931, 622, 312, 1, 0]
    """
    return _by_ratio(schedule, steps, vp_ratios)


SPACINGS: Choices[Spacing] = Choices(
    "spacing",
    "ddpm.spacings",
    {
        "trailing": trailing,
        "leading": leading,
        "linspace": linspace,
        "karras": karras,
        "exponential": exponential,
        "vp": vp,
    },
)


def karras_ratios(low: float, high: float, count: int, rho: float = 7.0) -> Tensor:
    """Return `count` values of k from high to low, evenly spaced in k^(1/rho), float64 (EDM, eq. 5).

    Examples:
        >>> karras_ratios(1.0, 16.0, 3, rho=2.0).round(decimals=6).tolist()
        [16.0, 6.25, 1.0]
    """
    return torch.linspace(high ** (1 / rho), low ** (1 / rho), count, dtype=torch.float64) ** rho


def exponential_ratios(low: float, high: float, count: int) -> Tensor:
    """Return `count` values of k from high to low, evenly spaced in log k, float64.

    Examples:
        >>> exponential_ratios(0.01, 100.0, 5).round(decimals=6).tolist()
        [100.0, 10.0, 1.0, 0.1, 0.01]
    """
    return torch.linspace(math.log(high), math.log(low), count, dtype=torch.float64).exp()


def vp_ratios(low: float, high: float, count: int, beta_d: float = 19.9, beta_min: float = 0.1) -> Tensor:
    """Return `count` values of k = sqrt(exp(beta_d u^2 / 2 + beta_min u) - 1), high to low, evenly spaced in u.

    Examples:
        >>> k = vp_ratios(0.01, 100.0, 3)
        >>> [round(x, 6) for x in (k[0].item(), k[-1].item())]
        [100.0, 0.01]
    """

    def time(k: float) -> float:
        exponent = math.log1p(k * k)
        return (math.sqrt(beta_min**2 + 2 * beta_d * exponent) - beta_min) / beta_d

    u = torch.linspace(time(high), time(low), count, dtype=torch.float64)
    return torch.expm1(beta_d * u**2 / 2 + beta_min * u).sqrt()


def _by_ratio(schedule: NoiseSchedule, steps: int, ratios: Callable[[float, float, int], Tensor]) -> list[float]:
    schedule.check_steps(steps)
    low, high = (
        math.tan(schedule.angle(1).item()),
        math.tan(min(schedule.angle(schedule.num_steps).item(), math.atan(K_MAX))),
    )
    levels = schedule.timestep(
        torch.atan(ratios(low, high, steps)).clamp(max=schedule.angle(schedule.num_steps).item())
    )
    return [*levels.tolist(), 0.0]
