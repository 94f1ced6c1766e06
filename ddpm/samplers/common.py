"""What every sampler yields, and noise that belongs to an image and not to its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from ddpm.noise import Purpose, normal

StepNoise = Callable[[int], Tensor]


@dataclass(frozen=True)
class Sample:
    """The state after a step.

    Attributes:
        x_t: at noise level t, [B, C, H, W].
        x0: the denoiser's estimate of the clean image that led here.
        t: the level, 0 when finished.
    """

    x_t: Tensor
    x0: Tensor
    t: int


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
    """Fresh N(0, I) for each level s that a stochastic sampler steps to, per image like `initial_noise`."""

    def noise(s: int) -> Tensor:
        # 2^32 images per level before two levels could share an ordinal.
        return normal(seed, images + ((s + 1) << 32), Purpose.SAMPLING_STEP, shape)

    return noise
