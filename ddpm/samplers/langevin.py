"""Samplers that walk along the score, -eps / sigma: annealed Langevin dynamics and predictor-corrector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ddpm.gaussian import ReverseVariance, p_reverse
from ddpm.prediction import Conditioning, Denoiser
from ddpm.samplers.common import Sample, StepNoise, predict, time_grid
from ddpm.schedule import NoiseSchedule


def annealed_langevin(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    cond: Conditioning | None = None,
    *,
    levels: int = 100,
    steps_per_level: int = 10,
    step_size: float = 1.0,
    noise: StepNoise,
    timesteps: Sequence[float] | None = None,
) -> Iterator[Sample]:
    """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1), one `Sample` per level.

    At each level, from the noisiest down, a chain whose target is q(x_t):
        x <- x + a / 2 score(x, t) + sqrt(a) z,   a = step_size sigma_t^2,   score = -eps / sigma_t.
    The step is the paper's, a fixed fraction of the noise variance, in the variables of a variance-preserving process.
    Level 0 is a last denoising, x_0 for the last x_t (Jolicoeur-Martineau et al. 2021); without it in `timesteps` the
    result is the paper's, as noisy as its last level.

    Args:
        denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`.
        x_T: standard normal noise [B, C, H, W].
        levels: noise levels above 0, 1..schedule.num_steps.
        steps_per_level: Langevin steps at each; in all levels * steps_per_level + 1 network evaluations.
        step_size: a / sigma_t^2, in (0, 2). The paper's is 0.2 (its epsilon / sigma_L^2), with which chains of this
            length do not mix: N(0.2, 0.3^2) comes out with a standard deviation of 0.32 to 0.33, at 1 with 0.304 to
            0.311. For a Gaussian q(x_t) of variance v >= sigma_t^2 a long chain's variance is v / (1 - a / 4v): up to a
            third too large where all is noise, and right at low levels, which decide.
        noise: key -> standard normal noise like x_T. Step j of level number i, from 0, has key
            i steps_per_level + j: no two steps share one.
        timesteps: real levels to visit instead, strictly decreasing.

    Raises:
        ValueError: `levels`, `steps_per_level` or `step_size` out of range, or `timesteps` that do not fall.
    """
    if steps_per_level < 1 or not 0 < step_size < 2:
        raise ValueError(
            f"need steps_per_level >= 1 and step_size in (0, 2), above which steps overshoot, "
            f"got steps_per_level={steps_per_level} and step_size={step_size}"
        )

    grid = time_grid(schedule, levels, timesteps)
    x_t = x_T
    for i, t in enumerate(grid):
        if t == 0:
            x_t = predict(denoiser, x_t, grid[i - 1], cond).x0
            yield Sample(x_t, x_t, t)
            return
        sigma = schedule.sigma(t).item()
        a = step_size * sigma**2
        for j in range(steps_per_level):
            pred = predict(denoiser, x_t, t, cond)
            x_t = x_t - a / 2 / sigma * pred.eps + a**0.5 * noise(i * steps_per_level + j)
        yield Sample(x_t, pred.x0, t)


def predictor_corrector(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    cond: Conditioning | None = None,
    *,
    steps: int = 100,
    corrector_steps: int = 1,
    snr: float = 0.16,
    noise: StepNoise,
    variance: ReverseVariance = "small",
) -> Iterator[Sample]:
    """Predictor-corrector sampling (Song et al. 2021b, algorithm 3), one `Sample` per step.

    The predictor is the step of `ancestral`. At each level s > 0 that it reaches, Langevin's corrector (algorithm 5)
        x <- x + e score(x, s) + sqrt(2 e) z,   e = 2 (1 - beta_s) (snr |z| / |score|)^2,
    beta_s being that of the chain of `steps` steps. The norms are each image's own: the authors' code takes their means
    over the batch, which makes a sample depend on its neighbours. With corrector_steps = 0 this is `ancestral`.

    Args:
        denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`.
        x_T: standard normal noise [B, C, H, W].
        steps: predictor steps, 1..schedule.num_steps; in all steps + (steps - 1) corrector_steps network evaluations.
        corrector_steps: Langevin steps at each level.
        snr: signal-to-noise ratio of the corrector's step, in (0, 1); 0.16 is the authors' for CIFAR-10.
        noise: key -> standard normal noise like x_T. At level s the predictor's key is s (corrector_steps + 1), its
            j-th corrector step's j more: no two steps share one.
        variance: the predictor's fixed one, the posterior's ("small") or beta ("large"); a learned one takes its place.

    Raises:
        ValueError: `steps`, `corrector_steps` or `snr` out of range.
    """
    if corrector_steps < 0 or not 0 < snr < 1:
        raise ValueError(f"need corrector_steps >= 0 and snr in (0, 1), got {corrector_steps} and {snr}")

    x_t = x_T
    grid = schedule.timesteps(steps)
    for i, (t, s) in enumerate(schedule.pairs(steps)):
        pred = predict(denoiser, x_t, t, cond)
        p = p_reverse(pred, x_t, t, s, schedule, variance)
        if s == 0:
            yield Sample(p.mean, pred.x0, s)
            return
        key = s * (corrector_steps + 1)
        x_t = p.sample(noise(key))
        sigma = schedule.sigma(s).item()
        one_minus_beta = (schedule.alpha_bar(s) / schedule.alpha_bar(grid[i + 2])).item()
        for j in range(1, corrector_steps + 1):
            score, z = predict(denoiser, x_t, s, cond).eps / -sigma, noise(key + j)
            e = 2 * one_minus_beta * (snr * _norm(z) / _norm(score)).square()
            x_t = x_t + e * score + (2 * e).sqrt() * z
        yield Sample(x_t, pred.x0, s)


def _norm(x: Tensor) -> Tensor:
    """The Euclidean norm of each image, [B, 1, ..., 1]."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *(1,) * (x.dim() - 1))
