"""The generalized solver: one of the probability-flow ODE, each factor of which is a number that can be learned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.prediction import Denoiser, Prediction, eps_from_x0
from ddpm.samplers.base import Sample, Sampler, StepNoise, SteppedSampler, predict
from ddpm.samplers.ddim import DDIM
from ddpm.schedule import NoiseSchedule
from ddpm.settings import setting

T = TypeVar("T")
WHOLE_ONLY = (
    "the weights of this solver were learned for whole trajectories, which it cannot begin or end elsewhere: use "
    "another sampler, such as dpm_solver"
)


@dataclass(frozen=True)
class GeneralizedSolver(SteppedSampler):
    """A multistep solver with weights of its own ("generalized solver", arXiv 2510.17699).

    The state after evaluation n is a linear combination of the noise and of all x_0 that were predicted so far:
        x_(n+1) = w_(n,T) x_T + w_(n,0) x0_0 + ... + w_(n,n) x0_n.
    Every deterministic sampler of one evaluation a step has this form, DDIM, DPM-Solver++ and UniPC each with weights
    that follow from the levels (`weights_of`). Here they are numbers, as `ddpm.step_learning` finds them for one model,
    and so are the levels, which only tell the network how noisy its input is.

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import last
        >>> from ddpm.schedule import Linear
        >>> schedule, x_T = Linear().make(1000), torch.ones(1, 1, 1, 1)
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")
        >>> own, ddim = (last(sampler(gaussian, schedule, x_T)) for sampler in (GeneralizedSolver(6), DDIM(6)))
        >>> torch.allclose(own, ddim)  # whose weights it has, where none are given
        True
    """

    steps: int = setting(6, "steps from T to 0, one network evaluation each", ge=1)
    weights: tuple[float, ...] | None = setting(
        None,
        "factors of x_T and of the predicted x_0s, step after step, such as `ddpm search steps --learn` finds for the "
        "timesteps beside them; null: those of DDIM",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is None:
            return
        if self.timesteps is None:
            raise ValueError("weights belong to timesteps: give the timesteps that they were learned with, too")
        count = self.steps * (self.steps + 3) // 2
        if len(self.weights) != count:
            raise ValueError(f"weights must be {count} numbers for {self.steps} steps, got {len(self.weights)}")

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
        """Yield one `Sample` per step, without noise; see `Sampler`.

        Raises:
            ValueError: other `timesteps` are given than those that the weights belong to.
        """
        levels = self.levels(schedule, timesteps)
        if self.weights is None:
            weights = weights_of(DDIM(steps=len(levels) - 1), schedule, levels)
        elif tuple(levels) != self.timesteps:
            raise ValueError(WHOLE_ONLY)
        else:
            weights = self.weights
        x_t, predicted = x_T, [x_T]
        for row, (t, s) in zip(rows(weights), itertools.pairwise(levels), strict=True):
            pred = predict(denoiser, x_t, t, cond)
            predicted.append(pred.x0)
            x_t = combine(row, predicted)
            yield Sample(x_t, pred.x0, s)


def rows(weights: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield the weights of each step: 2 of the first, 3 of the second, and so on.

    Examples:
        >>> [list(row) for row in rows([1, 2, 3, 4, 5])]
        [[1, 2], [3, 4, 5]]
    """
    start = 0
    for count in itertools.count(2):
        if start >= len(weights):
            return
        yield weights[start : start + count]
        start += count


def combine(weights: Sequence[float | Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """Return the linear combination of x_T and predictions, each [B, C, H, W].

    Examples:
        >>> combine([0.5, 2.0], [torch.tensor([4.0]), torch.tensor([1.0])]).tolist()
        [4.0]
    """
    total = weights[0] * vectors[0]
    for weight, vector in zip(weights[1:], vectors[1:], strict=True):
        total = total + weight * vector
    return total


def weights_of(sampler: Sampler, schedule: NoiseSchedule, levels: Sequence[float]) -> tuple[float, ...]:
    """Return the weights by which a deterministic sampler goes through levels, from the first down to 0.

    They are read off by following the sampler itself, where the noise and each predicted x_0 are unit vectors.

    Raises:
        ValueError: the sampler evaluates the network other than once a step.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> weights = weights_of(DDIM(steps=2), Linear().make(1000), [1000, 500, 0])
        >>> len(weights), [abs(round(weight, 4)) for weight in weights[2:]]  # the last step gives x_0 alone
        (5, [0.0, 0.0, 1.0])
    """
    steps = len(levels) - 1
    units = torch.eye(steps + 1, dtype=torch.float64).reshape(steps + 1, 1, 1, 1, -1)
    predictions = iter(units[1:])

    def denoiser(x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        x_0 = next(predictions, None)
        if x_0 is None:
            raise ValueError(f"{type(sampler).__name__} has more than one evaluation a step")
        return Prediction(x_0, eps_from_x0(x_0, x_t, t, schedule))

    found: list[float] = []
    for n, sample in enumerate(sampler(denoiser, schedule, units[0], timesteps=levels)):
        found += sample.x_t.flatten()[: n + 2].tolist()
    return tuple(found)
