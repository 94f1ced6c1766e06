"""What every sampler is, takes and yields; and noise that belongs to an image and not to its batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.noise import Purpose, normal
from ddpm.prediction import Denoiser, Prediction
from ddpm.samplers.spacing import SPACINGS
from ddpm.schedule import NoiseSchedule
from ddpm.settings import Settings, setting

StepNoise = Callable[[float], Tensor]
"""Key -> standard normal noise like x_T; the key is mostly the level that a sampler steps to. See `step_noise`."""


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


class Sampler(Protocol):
    """Settings of a sampling algorithm, which are the algorithm: call them."""

    @property
    def steps(self) -> int:
        """Steps from T to 0, 1..schedule.num_steps."""

    def __call__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        x_T: Tensor,
        cond: Conditioning | None = None,
        *,
        noise: StepNoise | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> Iterator[Sample]:
        """Yield one `Sample` per step, from x_T to the image.

        Args:
            denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`.
            schedule: of the denoiser.
            x_T: standard normal noise [B, C, H, W].
            cond: what the images are conditioned on.
            noise: key -> standard normal noise like x_T; needed by samplers that add noise.
            timesteps: real levels to visit instead of the sampler's own, strictly decreasing, from the level of x_T to
                0 or above.

        Raises:
            ValueError: more steps than the schedule has, `timesteps` that do not fall within [T, 0], or noise that is
                needed and missing.
        """


@dataclass(frozen=True)
class SteppedSampler(Settings):
    """What samplers have that go from T to 0 in a given number of steps."""

    steps: int = setting(50, "steps from T to 0, at most the schedule's num_steps", ge=1)
    spacing: str = setting("trailing", f"which levels the steps visit: {', '.join(SPACINGS)}")

    def __post_init__(self) -> None:
        super().__post_init__()
        SPACINGS.find(self.spacing)

    def levels(self, schedule: NoiseSchedule, timesteps: Sequence[float] | None = None) -> list[float]:
        """The levels that are visited, from the level of x_T down: `timesteps` where given, else by `spacing`.

        Raises:
            ValueError: more steps than the schedule has, or `timesteps` that are not two or more strictly decreasing
                levels in [0, T].
        """
        if timesteps is None:
            return SPACINGS[self.spacing](schedule, self.steps)
        grid = list(timesteps)
        falling = all(s < t for t, s in itertools.pairwise(grid))
        if len(grid) < 2 or not falling or not 0 <= grid[-1] <= grid[0] <= schedule.num_steps:
            raise ValueError(
                f"timesteps must be at least 2 strictly decreasing levels within [{schedule.num_steps}, 0], got {grid}"
            )
        return grid


def predict(
    denoiser: Denoiser, x_t: Tensor, t: float, cond: Conditioning | None, *, has_variance: bool = False
) -> Prediction:
    """The denoiser's answer for a batch that is all at level t.

    Args:
        has_variance: whether the sampler's step has a variance, so that it heeds `Prediction.mean_gradient`.

    Raises:
        ValueError: the denoiser asks to move a mean that the sampler does not have.
    """
    pred = denoiser(x_t, torch.full((len(x_t),), t, dtype=torch.float64, device=x_t.device), cond)
    if pred.mean_gradient is not None and not has_variance:
        raise ValueError(
            "guidance by a classifier with shift='mean' moves the mean of a reverse step that has a variance: use it "
            "with the ancestral or predictor_corrector sampler, or set shift='score'"
        )
    return pred


def require_noise(noise: StepNoise | None, sampler: str) -> StepNoise:
    """The noise that a sampler needs.

    Raises:
        ValueError: there is none.
    """
    if noise is None:
        raise ValueError(f"{sampler} needs noise: pass noise=step_noise(seed, image_ids, shape)")
    return noise


def last(samples: Iterable[Sample]) -> Tensor:
    """Run a sampler to its end and return the images [B, C, H, W]."""
    sample = None
    for sample in samples:  # noqa: B007
        pass
    if sample is None:
        raise ValueError("the sampler yielded nothing")
    return sample.x_t


def initial_noise(seed: int, image_ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x_T ~ N(0, I) for image numbers [B]: image i of a seed starts from the same noise in every batch."""
    return normal(seed, image_ids, Purpose.SAMPLING, shape)


def step_noise(seed: int, image_ids: Tensor, shape: tuple[int, ...]) -> StepNoise:
    """Fresh N(0, I) for each key, mostly a level s that a sampler steps to, per image like `initial_noise`.

    Keys are told apart to 1/256: levels between the table's have noise of their own.
    """

    def noise(s: float) -> Tensor:
        # 2^32 images per key before two keys could share an ordinal.
        return normal(seed, image_ids + ((round(s * 256) + 256) << 32), Purpose.SAMPLING_STEP, shape)

    return noise
