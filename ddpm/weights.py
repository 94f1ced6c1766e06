"""Weights of the squared error by timestep: what of the noise levels a training minds most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddpm.prediction import Parameterization, check_parameterization
from ddpm.registry import Registry
from ddpm.schedule import NoiseSchedule
from ddpm.settings import Settings, setting


class Weight(Protocol):
    """Settings of a weight, which are the weight: call them."""

    def __call__(self, schedule: NoiseSchedule, t: Tensor, prediction: Parameterization) -> Tensor:
        """Return the weight of the squared error of an output of this parameterization at t, float64 of t's shape."""


@dataclass(frozen=True)
class Uniform(Settings):
    """The weight 1 for every timestep: L_simple (DDPM, Ho et al. 2020, eq. 14)."""

    def __call__(self, schedule: NoiseSchedule, t: Tensor, prediction: Parameterization) -> Tensor:
        """See `Weight`."""
        return torch.ones_like(t, dtype=torch.float64)


@dataclass(frozen=True)
class MinSNR(Settings):
    """min-SNR-gamma (Hang et al. 2023, sec. 3.4): errors of x_0 are weighted by min(SNR, gamma), whatever is predicted.

    An error of x_0 is one of eps times sigma / alpha, of v times sigma, and of the score times sigma^2 / alpha, whence
    the factors.
    """

    gamma: float = setting(5.0, "signal-to-noise ratio above which the weight of an x_0 error stops growing", gt=0)

    def __call__(self, schedule: NoiseSchedule, t: Tensor, prediction: Parameterization) -> Tensor:
        """See `Weight`."""
        check_parameterization(prediction)
        alpha_bar, snr = schedule.alpha_bar(t), schedule.snr(t)
        clipped = snr.clamp(max=self.gamma)
        # min(SNR, gamma) / SNR, which is 1 and not 0 / 0 where there is no signal.
        eps = torch.where(snr < self.gamma, 1, self.gamma / snr)
        return {"x0": clipped, "v": clipped / (snr + 1), "eps": eps, "score": eps * (1 - alpha_bar)}[prediction]


@dataclass(frozen=True)
class P2(Settings):
    """P2 (Choi et al. 2022, eq. 8): the error of eps is weighted by 1 / (k + SNR)^gamma, whatever is predicted.

    Against L_simple it takes weight from the lowest noise levels, where only imperceptible detail is learned.
    """

    gamma: float = setting(1.0, "exponent of P2's weight; 0 is uniform for eps, the paper uses 0.5 and 1", ge=0)
    k: float = setting(1.0, "keeps P2's weight finite where there is no signal", gt=0)

    def __call__(self, schedule: NoiseSchedule, t: Tensor, prediction: Parameterization) -> Tensor:
        """See `Weight`."""
        check_parameterization(prediction)
        alpha_bar, snr = schedule.alpha_bar(t), schedule.snr(t)
        eps = (self.k + snr) ** -self.gamma
        # An error of eps is alpha / sigma times one of x_0, alpha times one of v, and sigma times one of the score.
        return {"eps": eps, "x0": eps * snr, "v": eps * alpha_bar, "score": eps * (1 - alpha_bar)}[prediction]


WEIGHTS: Registry[type[Weight]] = Registry(
    "weight of the loss", "ddpm.weights", {"uniform": Uniform, "min_snr": MinSNR, "p2": P2}
)
