"""The interface of samplers, and noise that depends on the image and not on its batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.noise import Purpose, Seed, normal
from ddpm.prediction import Denoiser, Prediction
from ddpm.samplers.spacing import SPACINGS
from ddpm.schedule import NoiseSchedule
from ddpm.settings import Settings, setting

StepNoise = Callable[[float], Tensor]
"""Key -> standard normal noise like x_T; the key is usually the level that a step ends at. See `step_noise`."""


@dataclass(frozen=True)
class Sample:
    """The state after one sampling step.

    Attributes:
        x_t: images at noise level t, [B, C, H, W].
        x0: the denoiser's estimate of the clean images used in this step, [B, C, H, W].
        t: noise level, 0 after the last step; not an integer if the sampler was given real `timesteps`.
    """

    x_t: Tensor
    x0: Tensor
    t: float


class Sampler(Protocol):
    """The settings of a sampling algorithm; calling them runs it."""

    @property
    def steps(self) -> int:
        """The number of steps from T to 0, 1..schedule.num_steps."""

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
            schedule: noise schedule of the denoiser.
            x_T: standard normal noise [B, C, H, W].
            cond: conditions of the images.
            noise: key -> standard normal noise like x_T; needed by samplers that add noise.
            timesteps: real levels to use instead of the sampler's own, strictly decreasing, from the level of x_T to 0
                or above.

        Raises:
            ValueError: there are more steps than the schedule has, `timesteps` is not decreasing within [0, T], or the
                sampler needs noise and none is given.
        """


@dataclass(frozen=True)
class SteppedSampler(Settings):
    """Base of samplers that go from T to 0 in a given number of steps."""

    steps: int = setting(50, "steps from T to 0, at most the schedule's num_steps", ge=1)
    spacing: str = setting("trailing", f"which levels the steps visit: {', '.join(SPACINGS)}")
    timesteps: tuple[float, ...] | None = setting(
        None, "levels that the steps visit instead, such as `ddpm search steps` finds: steps + 1 of them, the last 0"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        SPACINGS.find(self.spacing)
        given = self.timesteps
        if given is None:
            return
        if len(given) != self.steps + 1:
            raise ValueError(f"timesteps must be {self.steps + 1} levels for {self.steps} steps, got {len(given)}")
        if any(s >= t for t, s in itertools.pairwise(given)) or given[-1] != 0:
            raise ValueError(f"timesteps must be strictly decreasing, the last 0, got {list(given)}")

    def levels(self, schedule: NoiseSchedule, timesteps: Sequence[float] | None = None) -> list[float]:
        """Return the levels to visit, from the level of x_T down: `timesteps` if given, else those of the settings.

        Raises:
            ValueError: there are more steps than the schedule has, or `timesteps` is not two or more strictly
                decreasing levels in [0, T].
        """
        given = self.timesteps if timesteps is None else timesteps
        return SPACINGS[self.spacing](schedule, self.steps) if given is None else check_levels(schedule, given)


def check_levels(schedule: NoiseSchedule, timesteps: Sequence[float]) -> list[float]:
    """Return levels that were given by hand, after checking them.

    Raises:
        ValueError: they are not two or more strictly decreasing levels in [0, T].

    Examples:
        >>> from ddpm.schedule import Linear
        >>> check_levels(Linear().make(1000), (1000, 250.5, 0))
        [1000, 250.5, 0]
        >>> check_levels(Linear().make(1000), (0, 1000))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: timesteps must be at least 2 strictly decreasing levels within [1000, 0], ...
    """
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
    """Return the denoiser's prediction for a batch with the same level t for every image.

    Args:
        has_variance: whether the sampler's step has a variance and so supports `Prediction.mean_gradient`.

    Raises:
        ValueError: the prediction has a `mean_gradient`, which the sampler does not support.

    Examples:
        >>> denoiser = lambda x_t, t, cond: Prediction(x0=x_t, eps=t)
        >>> predict(denoiser, torch.zeros(2, 1, 8, 8), 3.5, None).eps.tolist()  # what it gets for t
        [3.5, 3.5]
    """
    pred = denoiser(x_t, torch.full((len(x_t),), t, dtype=torch.float64, device=x_t.device), cond)
    if pred.mean_gradient is not None and not has_variance:
        raise ValueError(
            "guidance by a classifier with shift='mean' moves the mean of a reverse step that has a variance: use it "
            "with the ancestral or predictor_corrector sampler, or set shift='score'"
        )
    return pred


def require_noise(noise: StepNoise | None, sampler: str) -> StepNoise:
    """Return `noise`, after checking that it was given.

    Raises:
        ValueError: `noise` is None.

    Examples:
        >>> require_noise(None, "Ancestral")
        Traceback (most recent call last):
            ...
        ValueError: Ancestral needs noise: pass noise=step_noise(seed, image_ids, shape)
    """
    if noise is None:
        raise ValueError(f"{sampler} needs noise: pass noise=step_noise(seed, image_ids, shape)")
    return noise


def last(samples: Iterable[Sample]) -> Tensor:
    """Run a sampler to its end and return the images [B, C, H, W].

    Examples:
        >>> x = torch.zeros(1, 1, 1, 1)
        >>> last(Sample(x + t, x, t) for t in (3, 2, 0)).item()
        0.0
    """
    sample = None
    for sample in samples:  # noqa: B007
        pass
    if sample is None:
        raise ValueError("the sampler yielded nothing")
    return sample.x_t


def initial_noise(seed: Seed, image_ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return x_T ~ N(0, I) for image ids [B]; the same seed and id give the same noise in every batch.

    Args:
        seed: one for all images, or int64 [B] with one for each.
        image_ids: int64 [B].
        shape: (C, H, W).

    Examples:
        >>> x_T = initial_noise(7, torch.arange(4), (3, 8, 8))
        >>> x_T.shape, torch.equal(initial_noise(7, torch.tensor([2]), (3, 8, 8)), x_T[2:3])
        (torch.Size([4, 3, 8, 8]), True)
    """
    return normal(seed, image_ids, Purpose.SAMPLING, shape)


def step_noise(seed: Seed, image_ids: Tensor, shape: tuple[int, ...]) -> StepNoise:
    """Return a function from a key, usually the level s that a step ends at, to N(0, I) noise per image id.

    Keys are rounded to multiples of 1/256, so levels between table points have their own noise.

    Examples:
        >>> noise = step_noise(7, torch.arange(4), (3, 8, 8))
        >>> torch.equal(noise(20), noise(20)), torch.equal(noise(20), noise(10))
        (True, False)
    """

    def noise(s: float) -> Tensor:
        # Each key has room for 2^32 images.
        return normal(seed, image_ids + ((round(s * 256) + 256) << 32), Purpose.SAMPLING_STEP, shape)

    return noise
