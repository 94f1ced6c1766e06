"""DDIM (Song et al. 2021a): few, large, by default deterministic steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from ddpm.gaussian import posterior_variance
from ddpm.prediction import Conditioning, Denoiser, coefficients
from ddpm.samplers.common import Sample, StepNoise, predict, time_grid
from ddpm.schedule import NoiseSchedule


def ddim(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    cond: Conditioning | None = None,
    *,
    steps: int = 50,
    eta: float = 0.0,
    noise: StepNoise | None = None,
    timesteps: Sequence[float] | None = None,
) -> Iterator[Sample]:
    """DDIM (eq. 12), one `Sample` per step.

    Args:
        denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`.
        x_T: standard normal noise [B, C, H, W].
        steps: network evaluations, 1..schedule.num_steps.
        eta: 0 is deterministic, 1 adds the noise of the DDPM posterior (eq. 16).
        noise: level -> standard normal noise like x_T; needed where eta > 0.
        timesteps: real levels to visit instead, strictly decreasing, from the level of x_T to 0 or above.

    Raises:
        ValueError: `steps` out of range, eta outside [0, 1], or eta > 0 without noise.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if eta > 0 and noise is None:
        raise ValueError("eta > 0 needs noise: pass noise=step_noise(seed, images, shape)")
    x_t = x_T
    for t, s in itertools.pairwise(time_grid(schedule, steps, timesteps)):
        pred = predict(denoiser, x_t, t, cond)
        alpha, sigma = coefficients(schedule, s, x_t)
        variance = eta**2 * posterior_variance(t, s, schedule).item()
        x_t = alpha * pred.x0 + (sigma**2 - variance).clamp(min=0).sqrt() * pred.eps
        if variance > 0 and noise is not None:
            x_t = x_t + variance**0.5 * noise(s)
        yield Sample(x_t, pred.x0, s)
