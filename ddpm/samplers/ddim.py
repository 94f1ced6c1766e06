"""DDIM (Song, Meng & Ermon 2021): few, large, by default deterministic steps."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ddpm.gaussian import reverse_variance
from ddpm.prediction import Conditioning, Denoiser, clip_x0, coefficients
from ddpm.samplers.common import Sample, StepNoise
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
    clip: float | None = None,
) -> Iterator[Sample]:
    """DDIM (eq. 12), one `Sample` per step.

    Args:
        denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`.
        x_T: standard normal noise [B, C, H, W].
        steps: network evaluations, 1..schedule.num_steps.
        eta: 0 is deterministic, 1 adds the noise of the DDPM posterior (eq. 16).
        noise: level -> standard normal noise like x_T; needed where eta > 0.
        clip: bound on |x_0|; eps is recomputed so that the step stays consistent.

    Raises:
        ValueError: `steps` out of range, eta outside [0, 1], or eta > 0 without noise.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if eta > 0 and noise is None:
        raise ValueError("eta > 0 needs noise: pass noise=step_noise(seed, images, shape)")
    x_t = x_T
    for t, s in schedule.pairs(steps):
        pred = denoiser(x_t, x_t.new_full((len(x_t),), t), cond)
        if clip is not None:
            pred = clip_x0(pred, x_t, t, schedule, clip)
        alpha, sigma = coefficients(schedule, s, x_t)
        variance = eta**2 * reverse_variance(t, s, schedule, "small").item()
        x_t = alpha * pred.x0 + (sigma**2 - variance).clamp(min=0).sqrt() * pred.eps
        if variance > 0 and noise is not None:
            x_t = x_t + variance**0.5 * noise(s)
        yield Sample(x_t, pred.x0, s)
