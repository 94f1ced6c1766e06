"""Ancestral sampling: the reverse Markov chain itself (DDPM, Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from ddpm.gaussian import DiagonalGaussian, q_posterior, reverse_variance
from ddpm.prediction import Conditioning, Denoiser, clip_x0
from ddpm.samplers.common import Sample, StepNoise
from ddpm.schedule import NoiseSchedule


def ancestral(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    cond: Conditioning | None = None,
    *,
    steps: int | None = None,
    noise: StepNoise,
    variance: Literal["small", "large"] = "small",
    clip: float | None = None,
) -> Iterator[Sample]:
    """Sample x_s ~ p(x_s | x_t) down the chain, one `Sample` per step.

    The mean is that of q(x_s | x_t, x_0) at the predicted x_0. A predicted log-variance beats `variance`.

    Args:
        denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`.
        x_T: standard normal noise [B, C, H, W].
        steps: network evaluations; None is every step of the schedule, fewer respace it.
        noise: level -> standard normal noise like x_T.
        variance: the fixed one of p, the posterior's ("small") or beta ("large").
        clip: bound on |x_0|.
    """
    x_t = x_T
    for t, s in schedule.pairs(steps or schedule.num_steps):
        pred = denoiser(x_t, x_t.new_full((len(x_t),), t), cond)
        if clip is not None:
            pred = clip_x0(pred, x_t, t, schedule, clip)
        mean = q_posterior(x_t, pred.x0, t, s, schedule).mean
        if s == 0:
            x_t = mean
        else:
            fixed = reverse_variance(t, s, schedule, variance).to(x_t)
            learned = None if pred.log_variance is None else pred.log_variance.exp()
            x_t = DiagonalGaussian(mean, fixed if learned is None else learned).sample(noise(s))
        yield Sample(x_t, pred.x0, s)
