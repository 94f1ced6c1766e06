"""Exact denoisers for data distributions with a closed-form posterior."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.prediction import Prediction, coefficients, eps_from_x0
from ddpm.schedule import NoiseSchedule


@dataclass(frozen=True)
class GaussianDenoiser:
    """The exact denoiser E[x_0 | x_t] for x_0 ~ N(mean, std^2) in every pixel; a label shifts the mean by its value."""

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
    """The exact denoiser for a dataset of a single image."""

    schedule: NoiseSchedule
    image: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        x_0 = self.image.to(x_t).expand_as(x_t)
        return Prediction(x_0, eps_from_x0(x_0, x_t, t, self.schedule))


@dataclass(frozen=True)
class MixtureDenoiser:
    """The exact denoiser for x_0 ~ sum_k weights_k N(means_k, std^2 I); a label selects one component.

    Attributes:
        means: means of the components, [K, D] with D = C * H * W.
        std: standard deviation of every component in every direction, > 0.
        weights: positive weights [K], normalised by this class; None is equal weights.
    """

    schedule: NoiseSchedule
    means: Tensor
    std: float = 0.1
    weights: Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        """See `Denoiser`; differentiable in x_t."""
        alpha, _, variance, means = self._at(x_t, t)
        share = self._log_share(x_t, t, cond).exp()
        mean = (share @ means).reshape(x_t.shape)
        x_0 = mean + alpha * self.std**2 / variance * (x_t - alpha * mean)
        return Prediction(x_0, eps_from_x0(x_0, x_t, t, self.schedule))

    def log_density(self, x_t: Tensor, t: Tensor | float, cond: Conditioning | None = None) -> Tensor:
        """Return log q(x_t) in nats, [B]; that of the labels' components if `cond` has labels."""
        return (self._log_prior(len(x_t), x_t, cond) + self._log_components(x_t, t)).logsumexp(1)

    def class_log_posterior(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return log p(k | x_t) of the whole mixture, [B, K]."""
        return self._log_share(x_t, t, None)

    def _at(self, x_t: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return alpha, sigma and the variance of x_t given a component, broadcastable to x_t, and the means."""
        alpha, sigma = coefficients(self.schedule, t, x_t)
        return alpha, sigma, alpha**2 * self.std**2 + sigma**2, self.means.to(x_t)

    def _log_components(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return log q(x_t | k), [B, K]."""
        alpha, _, variance, means = self._at(x_t, t)
        alpha, variance = alpha.flatten(1), variance.flatten(1)
        square = (x_t.flatten(1).unsqueeze(1) - alpha.unsqueeze(1) * means).square().sum(2)
        return -(square / variance + means.shape[1] * (2 * math.pi * variance).log()) / 2

    def _log_prior(self, count: int, like: Tensor, cond: Conditioning | None) -> Tensor:
        """Return log-weights of the components for each sample, [B, K]; a label sets all others to -inf."""
        weights = (torch.ones(len(self.means)) if self.weights is None else self.weights).to(like)
        log_prior = (weights / weights.sum()).log().expand(count, -1)
        if cond is None or cond.label is None:
            return log_prior
        only = torch.nn.functional.one_hot(cond.label.to(like.device), len(self.means)).to(like.dtype).log()
        return only if cond.drop is None else torch.where(cond.drop.to(like.device)[:, None], log_prior, only)

    def _log_share(self, x_t: Tensor, t: Tensor | float, cond: Conditioning | None) -> Tensor:
        return (self._log_prior(len(x_t), x_t, cond) + self._log_components(x_t, t)).log_softmax(1)


@dataclass(frozen=True)
class GaussianConsistency:
    """The exact consistency function for x_0 ~ N(mean, std^2): where the probability-flow ODE through x_t ends.

    The ODE keeps (x_t - alpha mean) / sqrt(alpha^2 std^2 + sigma^2), which is a standard normal number at every t.
    """

    schedule: NoiseSchedule
    mean: float = 0.2
    std: float = 0.3

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        alpha, sigma = coefficients(self.schedule, t, x_t)
        x_0 = self.mean + self.std * (x_t - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2).sqrt()
        return Prediction(x_0, eps_from_x0(x_0, x_t, t, self.schedule))
