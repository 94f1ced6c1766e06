"""Weights of the squared error by timestep, which determine the noise levels that training emphasises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddpm.choices import Choices
from ddpm.prediction import Parameterization, check_parameterization, skip_coefficients
from ddpm.schedule import NoiseSchedule
from ddpm.settings import Settings, setting


class Weight(Protocol):
    """The settings of a weight; calling them computes it."""

    def __call__(self, schedule: NoiseSchedule, t: Tensor, prediction: Parameterization) -> Tensor:
        """Return the weight at t of the squared error of an output of this parameterization, float64 of t's shape."""


@dataclass(frozen=True)
class Uniform(Settings):
    """The weight 1 for every timestep: L_simple (DDPM, Ho et al. 2020, eq. 14).

    Examples:
        >>> from ddpm.schedule import Linear
        >>> Uniform()(Linear().make(1000), torch.tensor([1, 1000]), "v").tolist()
        [1.0, 1.0]
    """

    def __call__(self, schedule: NoiseSchedule, t: Tensor, prediction: Parameterization) -> Tensor:
        """See `Weight`."""
        return torch.ones_like(t, dtype=torch.float64)


@dataclass(frozen=True)
class MinSNR(Settings):
    """min-SNR-gamma (Hang et al. 2023, sec. 3.4): weight min(SNR, gamma) on the x_0 error for every parameterization.

    The x_0 error is sigma / alpha times the eps error, sigma times the v error, and sigma^2 / alpha times the score
    error, which gives the factors.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> schedule = Linear().make(1000)
        >>> weight = MinSNR(gamma=5.0)(schedule, torch.tensor([1, 1000]), "x0")
        >>> weight[0].item(), bool(weight[1] == schedule.snr(1000))
        (5.0, True)
    """

    gamma: float = setting(5.0, "signal-to-noise ratio above which the weight of an x_0 error stops growing", gt=0)

    def __call__(self, schedule: NoiseSchedule, t: Tensor, prediction: Parameterization) -> Tensor:
        """See `Weight`."""
        check_parameterization(prediction)
        alpha_bar, snr = schedule.alpha_bar(t), schedule.snr(t)
        clipped = snr.clamp(max=self.gamma)
        # min(SNR, gamma) / SNR, which is 1 instead of 0 / 0 for SNR = 0.
        eps = torch.where(snr < self.gamma, 1, self.gamma / snr)
        return {
            "x0": clipped,
            "v": clipped / (snr + 1),
            "eps": eps,
            "score": eps * (1 - alpha_bar),
            "x0_skip": clipped * _skip_share(alpha_bar),
            "flow": clipped / (snr + 1) / _flow_share(alpha_bar),
        }[prediction]


@dataclass(frozen=True)
class P2(Settings):
    """P2 (Choi et al. 2022, eq. 8): weight 1 / (k + SNR)^gamma on the eps error for every parameterization.

    Compared with L_simple, it reduces the weight of low noise levels, where only imperceptible detail is learned.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> P2(gamma=0.0)(Linear().make(1000), torch.tensor([1, 1000]), "eps").tolist()  # L_simple
        [1.0, 1.0]
    """

    gamma: float = setting(1.0, "exponent of P2's weight; 0 is uniform for eps, the paper uses 0.5 and 1", ge=0)
    k: float = setting(1.0, "constant that keeps P2's weight finite at SNR 0", gt=0)

    def __call__(self, schedule: NoiseSchedule, t: Tensor, prediction: Parameterization) -> Tensor:
        """See `Weight`."""
        check_parameterization(prediction)
        alpha_bar, snr = schedule.alpha_bar(t), schedule.snr(t)
        eps = (self.k + snr) ** -self.gamma
        # The eps error is alpha / sigma times the x_0 error, alpha times the v error, and sigma times the score error.
        return {
            "eps": eps,
            "x0": eps * snr,
            "v": eps * alpha_bar,
            "score": eps * (1 - alpha_bar),
            "x0_skip": eps * snr * _skip_share(alpha_bar),
            "flow": eps * alpha_bar / _flow_share(alpha_bar),
        }[prediction]


@dataclass(frozen=True)
class EDMWeight(Settings):
    """EDM's weight (Karras et al. 2022, table 1): (k^2 + s^2) / (k s)^2 on the x_0 error, with k = sigma_t / alpha_t.

    That is 1 / s^2 + SNR. It gives an output the same weight at every level where that output is the paper's: 1 for v
    with s = 1, whose x_0 is EDM's skip connection for data of that standard deviation, and 1 / 0.5^2 for "x0_skip" with
    s = 0.5. The paper draws the levels by `LogNormalTimesteps`.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> t = torch.tensor([1, 500, 1000])
        >>> EDMWeight(sigma_data=1.0)(Linear().make(1000), t, "v").tolist()
        [1.0, 1.0, 1.0]
        >>> EDMWeight(sigma_data=0.5)(Linear().make(1000), t, "x0_skip").round(decimals=6).tolist()
        [4.0, 4.0, 4.0]
    """

    sigma_data: float = setting(0.5, "standard deviation of the data, s of the weight 1 / s^2 + SNR", gt=0)

    def __call__(self, schedule: NoiseSchedule, t: Tensor, prediction: Parameterization) -> Tensor:
        """See `Weight`."""
        check_parameterization(prediction)
        alpha_bar, inverse = schedule.alpha_bar(t), self.sigma_data**-2
        sigma2 = 1 - alpha_bar
        # The x_0 error is sigma / alpha times that of eps, sigma times that of v, sigma^2 / alpha times that of score.
        eps = 1 + inverse * sigma2 / alpha_bar
        return {
            "x0": inverse + alpha_bar / sigma2,
            "v": alpha_bar + inverse * sigma2,
            "eps": eps,
            "score": eps * sigma2,
            "x0_skip": (inverse + alpha_bar / sigma2) * _skip_share(alpha_bar),
            "flow": (alpha_bar + inverse * sigma2) / _flow_share(alpha_bar),
        }[prediction]


@dataclass(frozen=True)
class FlowWeight(Settings):
    """Weight 1 on the velocity of flow matching for every parameterization: 1 / tau^2 on the x_0 error.

    With an output of "x0" it is the loss of JiT (Li & He 2025, table 1 and app. A), which predicts the image and
    compares velocities; tau is `NoiseSchedule.flow_time`.

    Examples:
        >>> from ddpm.schedule import Flow
        >>> schedule, t = Flow().make(1000), torch.tensor([10, 500, 1000])
        >>> FlowWeight()(schedule, t, "x0").round(decimals=6).tolist()
        [400.0, 4.0, 1.0]
        >>> FlowWeight(least_time=0.0)(schedule, t, "flow").round(decimals=6).tolist()
        [1.0, 1.0, 1.0]
    """

    least_time: float = setting(
        0.05, "tau below which the weight on the x_0 error stops growing; 0 for no bound", ge=0, lt=1
    )

    def __call__(self, schedule: NoiseSchedule, t: Tensor, prediction: Parameterization) -> Tensor:
        """See `Weight`."""
        check_parameterization(prediction)
        alpha_bar, tau = schedule.alpha_bar(t), schedule.flow_time(t)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        bounded = (
            tau / tau.clamp(min=self.least_time)
        ).square()  # of the velocity's error, which is 1 / tau that of x_0
        return {
            "x0": tau.clamp(min=self.least_time) ** -2,
            "v": bounded * _flow_share(alpha_bar),
            "eps": bounded * _flow_share(alpha_bar) / alpha_bar,
            "score": bounded * _flow_share(alpha_bar) * (sigma / alpha).square(),
            "x0_skip": tau.clamp(min=self.least_time) ** -2 * _skip_share(alpha_bar),
            "flow": bounded,
        }[prediction]


def _flow_share(alpha_bar: Tensor) -> Tensor:
    """Return the squared factor from an error of v to that of "flow", (alpha + sigma)^2."""
    return (alpha_bar.sqrt() + (1 - alpha_bar).sqrt()).square()


def _skip_share(alpha_bar: Tensor) -> Tensor:
    """Return the squared factor from an output of "x0_skip" to its x_0."""
    return skip_coefficients(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())[1].square()


WEIGHTS: Choices[type[Weight]] = Choices(
    "weight of the loss",
    "ddpm.weights",
    {"uniform": Uniform, "min_snr": MinSNR, "p2": P2, "edm": EDMWeight, "flow": FlowWeight},
)
