"""What every sampler yields, and noise that belongs to an image and not to its batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.noise import Purpose, normal
from ddpm.prediction import Conditioning, Denoiser, Prediction
from ddpm.schedule import NoiseSchedule

StepNoise = Callable[[float], Tensor]


@dataclass(frozen=True)
class Sample:
    """The state after a step.

    Attributes:
        x_t: at noise level t, [B, C, H, W].
        x0: the denoiser's estimate of the clean image that led here.
        t: the level, 0 when finished; between the table's where a sampler was given real `timesteps`.
    """

    x_t: Tensor
    x0: Tensor
    t: float


def predict(denoiser: Denoiser, x_t: Tensor, t: float, cond: Conditioning | None) -> Prediction:
    """The denoiser's answer for a batch that is all at level t."""
    return denoiser(x_t, torch.full((len(x_t),), t, dtype=torch.float64, device=x_t.device), cond)


def last(samples: Iterable[Sample]) -> Tensor:
    """Run a sampler to its end and return the images [B, C, H, W]."""
    sample = None
    for sample in samples:  # noqa: B007
        pass
    if sample is None:
        raise ValueError("the sampler yielded nothing")
    return sample.x_t


def initial_noise(seed: int, images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x_T ~ N(0, I) for image numbers [B]: image i of a seed starts from the same noise in every batch."""
    return normal(seed, images, Purpose.SAMPLING, shape)


def step_noise(seed: int, images: Tensor, shape: tuple[int, ...]) -> StepNoise:
    """Fresh N(0, I) for each key, mostly a level s that a sampler steps to, per image like `initial_noise`.

    Keys are told apart to 1/256: levels between the table's have noise of their own.
    """

    def noise(s: float) -> Tensor:
        # 2^32 images per key before two keys could share an ordinal.
        return normal(seed, images + ((round(s * 256) + 256) << 32), Purpose.SAMPLING_STEP, shape)

    return noise


def time_grid(schedule: NoiseSchedule, steps: int, timesteps: Sequence[float] | None) -> list[float]:
    """The levels that an ODE solver visits: `timesteps` where given, else `schedule.timesteps(steps)`.

    Raises:
        ValueError: `steps` out of range, or `timesteps` not two or more strictly decreasing levels in [0, T].
    """
    if timesteps is None:
        return list(schedule.timesteps(steps))
    grid = list(timesteps)
    falling = all(s < t for t, s in itertools.pairwise(grid))
    if len(grid) < 2 or not falling or not 0 <= grid[-1] <= grid[0] <= schedule.num_steps:
        raise ValueError(
            f"timesteps must be at least 2 strictly decreasing levels within [{schedule.num_steps}, 0], got {grid}"
        )
    return grid
