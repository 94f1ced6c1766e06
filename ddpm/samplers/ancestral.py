"""Ancestral sampling: the reverse Markov chain itself (DDPM, Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from ddpm.gaussian import ReverseVariance, p_reverse
from ddpm.prediction import Conditioning, Denoiser
from ddpm.samplers.common import Sample, StepNoise, predict, time_grid
from ddpm.schedule import NoiseSchedule


def ancestral(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    cond: Conditioning | None = None,
    *,
    steps: int | None = None,
    noise: StepNoise,
    variance: ReverseVariance = "small",
    timesteps: Sequence[float] | None = None,
) -> Iterator[Sample]:
    """Sample x_s ~ p(x_s | x_t) down the chain, one `Sample` per step.

    The mean is that of q(x_s | x_t, x_0) at the predicted x_0. A learned variance takes the place of `variance`.

    Args:
        denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`.
        x_T: standard normal noise [B, C, H, W].
        steps: network evaluations; None is every step of the schedule, fewer respace it.
        noise: level -> standard normal noise like x_T.
        variance: the fixed one of p, the posterior's ("small") or beta ("large").
        timesteps: real levels to visit instead, strictly decreasing, from the level of x_T to 0 or above.
    """
    x_t = x_T
    steps = schedule.num_steps if steps is None else steps
    for t, s in itertools.pairwise(time_grid(schedule, steps, timesteps)):
        pred = predict(denoiser, x_t, t, cond)
        p = p_reverse(pred, x_t, t, s, schedule, variance)
        x_t = p.sample(noise(s)) if s > 0 else p.mean
        yield Sample(x_t, pred.x0, s)
