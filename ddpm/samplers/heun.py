"""Heun's method on the probability-flow ODE (EDM, Karras et al. 2022): two evaluations a step, order 2."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from ddpm.prediction import Conditioning, Denoiser
from ddpm.samplers.common import Sample, predict, time_grid
from ddpm.schedule import NoiseSchedule

SIGMA_MAX = 80.0 * (1 + 1e-9)
"""EDM's noisiest level, sigma / alpha (table 1), up to rounding: a grid that begins at 80 begins with Heun's step."""


def heun(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    cond: Conditioning | None = None,
    *,
    steps: int = 25,
    timesteps: Sequence[float] | None = None,
) -> Iterator[Sample]:
    """EDM's algorithm 1, its deterministic sampler, one `Sample` per step.

    In y = x / alpha and k = sigma / alpha the ODE is dy/dk = eps, and the trapezoid's step
        y_s = y_t + (k_s - k_t) (eps_t + eps_s) / 2,   eps_s at the end of Euler's step.
    Euler's step alone (which is DDIM's) is taken to t = 0, as in the paper, and from levels with k > 80, where EDM has
    none: a variance-preserving schedule's first step may go from k = 20,000 (cosine), or from infinity (zero terminal
    SNR), down to 16, and the trapezoid would multiply the small difference of two eps by that.

    Args:
        denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`.
        x_T: standard normal noise [B, C, H, W].
        steps: 1..schedule.num_steps; at most 2 steps - 1 network evaluations.
        timesteps: real levels to visit instead, strictly decreasing, from the level of x_T to 0 or above.

    Raises:
        ValueError: `steps` out of range, or `timesteps` that do not fall within [T, 0].
    """

    x_t = x_T
    for t, s in itertools.pairwise(time_grid(schedule, steps, timesteps)):
        alpha_t, sigma_t = schedule.alpha(t).item(), schedule.sigma(t).item()
        alpha_s, sigma_s = schedule.alpha(s).item(), schedule.sigma(s).item()
        pred = predict(denoiser, x_t, t, cond)
        x_s = alpha_s * pred.x0 + sigma_s * pred.eps
        if s > 0 and sigma_t <= SIGMA_MAX * alpha_t:
            slope = (pred.eps + predict(denoiser, x_s, s, cond).eps) / 2
            x_s = alpha_s * (x_t / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * slope)
        x_t = x_s
        yield Sample(x_t, pred.x0, s)
