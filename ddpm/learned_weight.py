"""A weight of the loss by noise level that is learned beside the network (EDM2: Karras et al. 2024a, eq. 14-16, 21).

The network minimises E[L / e^u(k) + u(k)], where L is a sample's weighted loss at k = sigma_t / alpha_t and u is a
linear function of random Fourier features of ln(k) / 4 (after Kendall et al. 2018, "Multi-Task Learning Using
Uncertainty"). At its minimum e^u(k) is the mean loss at k, so that every noise level contributes alike, whatever its
loss. u is of no use after the training.

u is learned from the losses of the whole global batch, which every rank has, by its gradient in closed form: so it is
the same on every rank, and none of DDP's or FSDP2's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.noise import Purpose, normal, uniform
from ddpm.schedule import NoiseSchedule
from ddpm.settings import Settings, setting

BETAS, EPS = (0.9, 0.99), 1e-8
"""Of the Adam that learns u."""
WIDEST = 10.0
"""Bound on |ln k|: a timestep without signal has an infinite one."""


@dataclass(frozen=True)
class LearnedWeighting(Settings):
    """The settings of a `LearnedWeight`.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> LearnedWeighting().make(Linear().make(1000), seed=0).factors(torch.tensor([1, 500, 1000])).tolist()
        [1.0, 1.0, 1.0]
    """

    channels: int = setting(128, "Fourier features of the noise level by which the learned weight is described", ge=1)
    lr: float = setting(0.01, "learning rate of the learned weight, by Adam", gt=0)

    def make(self, schedule: NoiseSchedule, seed: int) -> LearnedWeight:
        """Return the weight of a new run: 1 at every timestep."""
        return LearnedWeight(schedule, seed, self.channels, self.lr)


class LearnedWeight:
    """u(k) and the optimizer that learns it, in float64 on the CPU.

    Args:
        schedule: of T steps.
        seed: of the run; the features are functions of it.
        channels: C, the number of features.
        lr: learning rate.

    Attributes:
        features: of t = 1..T, [T, C], of mean square 1 / C each.
        weight: [C]; u = features @ weight.
        first, second: Adam's averages of the gradient and of its square, [C].
        updates: number of updates, [1].

    Examples:
        >>> from ddpm.schedule import Linear
        >>> weight = LearnedWeight(Linear().make(1000), seed=0, channels=16, lr=0.1)
        >>> t = torch.tensor([500])
        >>> for _ in range(200):
        ...     weight.update(t, losses=torch.tensor([4.0]), weights=torch.ones(1))
        >>> round(weight.factors(t).item(), 2)  # one over the loss
        0.25
    """

    def __init__(self, schedule: NoiseSchedule, seed: int, channels: int, lr: float) -> None:
        index = torch.arange(channels)
        frequency = 2 * math.pi * normal(seed, index, Purpose.FEATURES, ()).double()
        phase = 2 * math.pi * uniform(seed, index, Purpose.FEATURES, 3)[:, 2]
        log_k = -schedule.log_snr(torch.arange(1, schedule.num_steps + 1)) / 2
        level = log_k.clamp(-WIDEST, WIDEST) / 4
        self.features = torch.cos(level[:, None] * frequency + phase) * math.sqrt(2 / channels)
        self.weight, self.first, self.second = (torch.zeros(channels, dtype=torch.float64) for _ in range(3))
        self.updates = torch.zeros(1, dtype=torch.float64)
        self.lr = lr

    def log_loss(self) -> Tensor:
        """Return u for t = 1..T, float64 [T]: what is learned of the logarithm of the mean loss."""
        return self.features @ self.weight

    def factors(self, t: Tensor) -> Tensor:
        """Return e^-u at t [B], the factor of a sample's loss, float64 [B] on the device of t."""
        return torch.exp(-self.log_loss()).to(t.device)[t - 1]

    def update(self, t: Tensor, losses: Tensor, weights: Tensor) -> None:
        """Make one step of Adam on the mean of weights (losses / e^u + u) over a global batch.

        Args:
            t: timesteps in 1..T of all its samples, [N], in the same order on every rank.
            losses: their losses without the factor e^-u, [N].
            weights: what a timestep sampler gives each sample's loss for weight, [N].
        """
        index = t.cpu() - 1
        slope = weights.cpu() * (1 - losses.cpu().double() * torch.exp(-self.log_loss()[index]))
        gradient = (slope[:, None] * self.features[index]).mean(0)
        self.updates += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.lerp_(gradient.square(), 1 - BETAS[1])
        first, second = (m / (1 - b**self.updates) for m, b in zip((self.first, self.second), BETAS, strict=True))
        self.weight -= self.lr * first / (second.sqrt() + EPS)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state without copying, so that it can be overwritten in place."""
        return {"weight": self.weight, "first": self.first, "second": self.second, "updates": self.updates}
