"""Denoisers whose answers are exact, for data whose posterior is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ddpm.prediction import Conditioning, Prediction, coefficients, eps_from_x0
from ddpm.schedule import NoiseSchedule


@dataclass(frozen=True)
class GaussianDenoiser:
    """E[x_0 | x_t] for x_0 ~ N(mean, std^2) in every pixel; a label shifts the mean by its value."""

    schedule: NoiseSchedule
    mean: float = 0.2
    std: float = 0.3

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        mean = self.mean
        if cond is not None and cond.label is not None:
            shift = cond.label.to(x_t)
            if cond.drop is not None:
                shift = shift * (~cond.drop)
            mean = mean + shift.reshape(-1, *(1,) * (x_t.dim() - 1))
        alpha, sigma = coefficients(self.schedule, t, x_t)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        x_0 = mean + gain * (x_t - alpha * mean)
        return Prediction(x_0, eps_from_x0(x_0, x_t, t, self.schedule))


@dataclass(frozen=True)
class PointDenoiser:
    """The data is a single image."""

    schedule: NoiseSchedule
    image: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        x_0 = self.image.to(x_t).expand_as(x_t)
        return Prediction(x_0, eps_from_x0(x_0, x_t, t, self.schedule))
