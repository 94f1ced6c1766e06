"""Sampling from a consistency model: its x_0 is an image at once, which more evaluations noise and improve."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.prediction import Denoiser, coefficients
from ddpm.samplers.base import Sample, StepNoise, check_levels, predict, require_noise
from ddpm.samplers.spacing import K_MAX, exponential_ratios
from ddpm.schedule import NoiseSchedule
from ddpm.settings import Settings, setting


@dataclass(frozen=True)
class Consistency(Settings):
    """Multistep consistency sampling (Song et al. 2023, algorithm 1), for models of `ConsistencyTuning` alone.

    From pure noise at the first level the model gives an image; each further evaluation noises it to the next level
    down, and maps that to an image again. Levels are given as k = sigma / alpha and are evenly spaced in log k. The
    defaults are those of Easy Consistency Tuning (Geng et al. 2024) for one and two evaluations, 80 and 0.821.

    Other models give the mean of all images at once, not one of them.

    Examples:
        >>> import torch
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import last
        >>> from ddpm.schedule import Linear
        >>> schedule = Linear().make(1000)
        >>> grey = NetworkDenoiser(lambda x, row, cond: 0 * x + 0.5, schedule, "x0")
        >>> last(Consistency(steps=1)(grey, schedule, torch.ones(1, 1, 1, 1))).item()
        0.5
    """

    steps: int = setting(2, "network evaluations; each after the first adds noise to the image before it", ge=1)
    first_ratio: float = setting(K_MAX, "sigma / alpha of the first evaluation, at most that of T", gt=0)
    last_ratio: float = setting(0.821, "sigma / alpha of the last evaluation, where there are several", gt=0)

    def levels(self, schedule: NoiseSchedule, timesteps: Sequence[float] | None = None) -> list[float]:
        """Return the levels of the evaluations and 0, from the level of x_T down: `timesteps` if given.

        Raises:
            ValueError: there are more steps than the schedule has, the last ratio is not below the first, or
                `timesteps` is not two or more strictly decreasing levels in [0, T].
        """
        if timesteps is not None:
            return check_levels(schedule, timesteps)
        schedule.check_steps(self.steps)
        first = top_ratio(schedule, self.first_ratio)
        low = schedule.ratio(1).item()
        if self.steps > 1 and not low <= self.last_ratio < first:
            raise ValueError(
                f"last_ratio must be in [{low:.3g}, {first:.4g}) for this schedule, got {self.last_ratio:g}: from its "
                "lowest level to the first evaluation's"
            )
        ratios = exponential_ratios(self.last_ratio, first, self.steps)  # of one step, the first
        return [*schedule.timestep_of_ratio(ratios.clamp(max=first)).tolist(), 0.0]

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
        """Yield one `Sample` per evaluation; noise is needed for more than one. See `Sampler`."""
        x_t = x_T
        for t, s in itertools.pairwise(self.levels(schedule, timesteps)):
            pred = predict(denoiser, x_t, t, cond)
            x_t = pred.x0
            if s > 0:
                alpha, sigma = coefficients(schedule, s, x_t)
                x_t = alpha * pred.x0 + sigma * require_noise(noise, "consistency sampling in several steps")(s)
            yield Sample(x_t, pred.x0, s)


def top_ratio(schedule: NoiseSchedule, at_most: float = K_MAX) -> float:
    """Return the sigma / alpha of the first evaluation: that of T, or `at_most` where T has more.

    Examples:
        >>> from ddpm.schedule import Cosine
        >>> top_ratio(Cosine().make(1000)), round(top_ratio(Cosine().make(1000), at_most=1e9), -3)
        (80.0, 20000.0)
    """
    return min(schedule.ratio(schedule.num_steps).item(), at_most)
