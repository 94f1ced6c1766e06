"""The timestep samplers: which one the configuration names, and what each of them needs from a step.

This is the only module that knows the samplers apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ddpm.objectives import ImportanceTimesteps, stratified_timesteps, uniform_timesteps
from ddpm.schedule import NoiseSchedule
from pipelines.config import Config


class TimestepSampler(Protocol):
    """Draws the timestep of each sample from the sample's ordinal; the same on every rank.

    Attributes:
        learns: whether it adapts to the losses, so that a step must pass the loss of every sample to `update`.
    """

    learns: bool

    def sample(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """Return (t in 1..T, int64 [B]; the weight of each sample's loss, float64 [B])."""

    def update(self, ordinals: Tensor, losses: Tensor) -> None:
        """Learn from the losses [N] of a whole global batch, whose ordinals [N] are in ascending order."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the live tensors of what was learned, by their names in a checkpoint."""


class FixedTimesteps:
    """A sampler that does not depend on the losses.

    Args:
        draw: the timestep of each ordinal.
    """

    learns = False

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        self.draw = draw

    def sample(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """Return the timesteps, all losses with weight 1."""
        return self.draw(ordinals), torch.ones_like(ordinals, dtype=torch.float64)

    def update(self, ordinals: Tensor, losses: Tensor) -> None:
        """Do nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: there is no history."""
        return {}


class LearnedTimesteps:
    """Importance sampling by the history of losses (`ddpm.objectives.ImportanceTimesteps`)."""

    learns = True

    def __init__(self, seed: int, num_steps: int) -> None:
        self.seed, self.history = seed, ImportanceTimesteps(num_steps)

    def sample(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps drawn by the history so far, and the importance weights."""
        return self.history.sample(self.seed, ordinals)

    def update(self, ordinals: Tensor, losses: Tensor) -> None:
        """Append the losses to the history of their timesteps."""
        t, _ = self.sample(ordinals)
        self.history.update(t, losses)

    def tensors(self) -> dict[str, Tensor]:
        """Return the history."""
        return {"timesteps.losses": self.history.losses, "timesteps.counts": self.history.counts}


def make_timesteps(config: Config, schedule: NoiseSchedule) -> TimestepSampler:
    """Return the sampler that the configuration names, without a history."""
    seed, num_steps, batch_size = config.seed, schedule.num_steps, config.batch_size
    if config.objective.timesteps == "importance":
        return LearnedTimesteps(seed, num_steps)
    if config.objective.timesteps == "stratified":
        return FixedTimesteps(lambda ordinals: stratified_timesteps(seed, ordinals, num_steps, batch_size))
    return FixedTimesteps(lambda ordinals: uniform_timesteps(seed, ordinals, num_steps))
