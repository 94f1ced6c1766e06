"""Time steps chosen for a model: a dynamic program over the local errors of its own trajectories.

Geometry-inspired time scheduling (GITS: Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion
Sampling", sec. 5). Trajectories of one model have similar shapes whatever image they end in, so a few of them on a fine
grid show where a sampler needs its steps. The error of a single step from one level of the grid to another, started on
the trajectory, needs no network evaluation: a step is a linear combination of known states and predictions, so the
squared error is a quadratic form in their inner products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.prediction import Denoiser
from ddpm.samplers.dpm_solver import DPMSolver
from ddpm.samplers.spacing import SPACINGS
from ddpm.schedule import NoiseSchedule
from ddpm.settings import Settings, setting

ORDERS = {"ddim": 1, "dpm_solver": 2}
"""Sampler whose steps can be chosen -> number of levels whose predictions a step uses."""


@dataclass(frozen=True)
class Trajectories:
    """Statistics of trajectories on a fine grid of N levels and 0.

    Attributes:
        levels: the N + 1 levels, strictly decreasing, the last 0.
        products: mean inner products per pixel of the states at all levels, then of the x_0 predicted at all levels but
            the last, float64 [2 N + 1, 2 N + 1].
        ends: where the trajectories end, [B, C, H, W].
    """

    levels: tuple[float, ...]
    products: Tensor
    ends: Tensor


@dataclass(frozen=True)
class StepSearch(Settings):
    """The settings of a search for time steps.

    `grid` and `gamma` default to those of GITS, which measures local errors differently and so may choose other steps.

    The cost of a schedule is the sum of its local errors, each a root mean square per pixel of x_t; every step
    multiplies the cost of all later steps by `gamma`:
        cost(step 1) + gamma (cost(step 2) + gamma (cost(step 3) + ...)).

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.schedule import Linear
        >>> schedule, search = Linear().make(1000), StepSearch(grid=8)
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")
        >>> found = search.trajectories(gaussian, schedule, torch.ones(1, 1, 2, 2))
        >>> levels, cost = search.find(found, schedule, "ddim", steps=3)
        >>> len(levels), set(levels) <= set(found.levels)
        (4, True)
    """

    grid: int = setting(60, "levels of the fine grid among which steps are chosen", ge=2)
    spacing: str = setting("karras", f"spacing of the levels of the grid: {', '.join(SPACINGS)}")
    gamma: float = setting(1.15, "factor of the cost of all later steps; above 1 they count more", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        SPACINGS.find(self.spacing)

    @torch.no_grad()
    def trajectories(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        x_T: Tensor,
        cond: Conditioning | None = None,
        *,
        batch_size: int = 64,
    ) -> Trajectories:
        """Follow trajectories on the fine grid, `grid` network evaluations each.

        They follow DPM-Solver++(2M), whose error on such a grid is far below that of the few steps to be chosen.

        Args:
            denoiser: the model, guided and clipped as it will be sampled.
            x_T: standard normal noise, [N, C, H, W].
            cond: conditions of the N images.
            batch_size: trajectories followed at once; all their states are kept in memory.

        Raises:
            ValueError: the schedule has fewer steps than the grid has levels.
        """
        levels = SPACINGS[self.spacing](schedule, self.grid)
        count = 2 * self.grid + 1
        products = torch.zeros(count, count, dtype=torch.float64, device=x_T.device)
        ends = []
        for i in range(0, len(x_T), batch_size):
            part = x_T[i : i + batch_size]
            some = None if cond is None else cond[i : i + batch_size]
            states, predictions = [part], []
            for sample in DPMSolver(steps=self.grid)(denoiser, schedule, part, some, timesteps=levels):
                states.append(sample.x_t)
                predictions.append(sample.x0)
            vectors = torch.stack([x.flatten().double() for x in (*states, *predictions)])
            products += vectors @ vectors.T
            ends.append(states[-1])
        return Trajectories(tuple(levels), products.cpu() / x_T.numel(), torch.cat(ends))

    def find(self, found: Trajectories, schedule: NoiseSchedule, kind: str, steps: int) -> tuple[list[float], float]:
        """Return the levels of a sampler's steps, from the grid's first down to 0, and their cost.

        Args:
            found: result of `trajectories`.
            kind: "ddim" or "dpm_solver".
            steps: number of steps.

        Raises:
            ValueError: the sampler's steps cannot be chosen, or there are more steps than the grid has levels.
        """
        if kind not in ORDERS:
            raise ValueError(f"the steps of {kind!r} cannot be chosen; allowed: {', '.join(ORDERS)}")
        last = len(found.levels) - 1
        if not 1 <= steps <= last:
            raise ValueError(f"steps must be in 1..{last}, the levels of the grid, got {steps}")
        costs = local_errors(found, schedule, kind)
        # By the last two levels visited, (h, i): the least cost of continuing from i to the end in k steps.
        value = torch.full((last + 1, last + 1), math.inf, dtype=torch.float64)
        value[:, last] = 0
        choices = []
        for _ in range(steps):
            value, choice = (costs + self.gamma * value).min(dim=2)
            choices.append(choice)
        path, before = [0], 0
        for choice in reversed(choices):
            before, here = path[-1], int(choice[before, path[-1]])
            path.append(here)
        return [found.levels[i] for i in path], value[0, 0].item()


def local_errors(found: Trajectories, schedule: NoiseSchedule, kind: str) -> Tensor:
    """Return the error of one step from i to j after one from h to i, float64 [N + 1, N + 1, N + 1], by (h, i, j).

    It is the root mean square per pixel of the step's result minus the state at j, for a step that starts at the state
    and with the predictions of the trajectory. h = i is the first step of a sampler. It is infinite unless h <= i < j.

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.schedule import Linear
        >>> schedule = Linear().make(1000)
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")
        >>> found = StepSearch(grid=4).trajectories(gaussian, schedule, torch.ones(1, 1, 2, 2))
        >>> errors = local_errors(found, schedule, "ddim")
        >>> errors.shape, bool(errors[0, 0, 3] > errors[0, 0, 1])  # a longer step errs by more
        (torch.Size([5, 5, 5]), True)
    """
    levels = torch.tensor(found.levels, dtype=torch.float64)
    last = len(levels) - 1
    alpha, sigma, lambda_ = schedule.alpha(levels), schedule.sigma(levels), schedule.log_snr(levels) / 2
    h, i, j = torch.meshgrid(*[torch.arange(last + 1)] * 3, indexing="ij")
    allowed = (h <= i) & (i < j)
    h, i, j = (torch.where(allowed, index, other) for index, other in ((h, 0), (i, 0), (j, last)))
    # DPM-Solver++(2M), algorithm 2; with one prediction it is DDIM, eq. 12, and so in the first and the last step.
    keep = sigma[j] / sigma[i]
    data = alpha[j] - keep * alpha[i]
    half = torch.zeros_like(keep)
    if ORDERS[kind] == 2:
        two = (h < i) & (j < last)
        ratio = (lambda_[j] - lambda_[i]) / (2 * (lambda_[i] - lambda_[h]))
        half = torch.where(two, ratio, half)
    terms = [(keep, i), (data * (1 + half), last + 1 + i), (-data * half, last + 1 + h), (-torch.ones_like(keep), j)]
    square = sum(a * b * found.products[x, y] for a, x in terms for b, y in terms)
    assert isinstance(square, Tensor)
    return torch.where(allowed, square.clamp(min=0).sqrt(), math.inf)
