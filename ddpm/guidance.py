"""Guidance as denoisers that wrap denoisers: nothing is trained, so scale and interval can be searched on one model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm.prediction import Conditioning, Denoiser, Prediction
from ddpm.schedule import NoiseSchedule


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, in the form null + scale (cond - null)).

    Scale 0 is exactly the unconditional model and 1 exactly the conditional one, at one evaluation each; any other
    scale evaluates both in one batch of 2 B. Outside `interval` the conditional model is used as it is
    (Kynkäänniemi et al. 2024).

    Attributes:
        denoiser: the conditional model, whose null condition is the unconditional one.
        scale: guidance scale.
        interval: (low, high) as fractions of T within which guidance acts, ends included.
        num_steps: T, to which `interval` refers.
    """

    denoiser: Denoiser
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    num_steps: int = 1000

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"interval must satisfy 0 <= low <= high <= 1, got {self.interval}")

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        """See `Denoiser`."""
        if cond is None or self.scale == 0:
            return self.denoiser(x_t, t, None)
        u = float(t.max()) / self.num_steps
        if self.scale == 1 or not self.interval[0] <= u <= self.interval[1]:
            return self.denoiser(x_t, t, cond)
        batch = len(x_t)
        null = torch.arange(2 * batch, device=x_t.device) >= batch
        both = cond.map(lambda tensor: torch.cat([tensor, tensor])).dropped(null)
        pred = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        (x0, null_x0), (eps, null_eps) = pred.x0.split(batch), pred.eps.split(batch)
        return replace(
            pred,
            x0=torch.lerp(null_x0, x0, self.scale),
            eps=torch.lerp(null_eps, eps, self.scale),
            log_variance=None if pred.log_variance is None else pred.log_variance[:batch],
        )


def classifier_free(
    denoiser: Denoiser, schedule: NoiseSchedule, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> ClassifierFree:
    """`ClassifierFree` on the schedule's time axis."""
    return ClassifierFree(denoiser, scale, interval, schedule.num_steps)
