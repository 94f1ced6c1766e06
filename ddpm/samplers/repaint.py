"""Inpainting by replacing the known pixels at every level: replacement, and RePaint (Lugmayr et al. 2022)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.gaussian import DiagonalGaussian, ReverseVariance, p_reverse, q_transition
from ddpm.masks import checked_mask, paste, same_shape
from ddpm.prediction import Denoiser, coefficients
from ddpm.samplers.base import Sample, StepNoise, SteppedSampler, predict
from ddpm.schedule import NoiseSchedule
from ddpm.settings import setting


class Inpainter(Protocol):
    """The settings of an inpainting algorithm; calling them runs it."""

    def __call__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        x_T: Tensor,
        cond: Conditioning | None = None,
        *,
        known: Tensor,
        mask: Tensor,
        noise: StepNoise,
        timesteps: Sequence[float] | None = None,
    ) -> Iterator[Sample]:
        """Yield one `Sample` per network evaluation; the last has the known pixels exactly as given.

        Args:
            denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`; it gets `known` only if it is
                part of cond.
            schedule: noise schedule of the denoiser.
            x_T: standard normal noise [B, C, H, W].
            cond: conditions of the denoiser.
            known: clean images [B, C, H, W]; the values of hidden pixels are ignored.
            mask: [B, 1, H, W], True (or 1) where known.
            noise: key -> standard normal noise like x_T. The key is the index, from 0, of the transition in
                `repaint_levels`, jumps included, so it is unique. Known and hidden pixels of a step use the same noise.
            timesteps: real levels to use instead of the sampler's own, strictly decreasing, from the level of x_T to 0.

        Raises:
            ValueError: shapes do not fit each other, a number is out of range, or `timesteps` does not decrease to 0.
        """


@dataclass(frozen=True)
class RePaint(SteppedSampler):
    """RePaint (Lugmayr et al. 2022, algorithm 1), which fills hidden pixels; jumps yield no `Sample`.

    A step down draws hidden pixels from p(x_s | x_t) and known ones from q(x_s | known) (eq. 8). A jump up draws x_t
    from q(x_t | x_s) for all pixels at once: the hidden pixels keep part of their content, and the following steps down
    make it consistent with the known pixels. There are steps + (resamplings - 1) jump_length floor((steps - 1) /
    jump_length) network evaluations, 2,410 with the defaults, which are the authors'. Known and hidden pixels agree
    only down to the noise level that a jump reaches: use short jumps with few steps.

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import last, step_noise
        >>> from ddpm.schedule import Linear
        >>> schedule, x_T = Linear().make(1000), torch.ones(1, 1, 1, 2)
        >>> grey = NetworkDenoiser(lambda x, row, cond: 0 * x + 0.5, schedule, "x0")
        >>> around = {"known": 0 * x_T - 1, "mask": torch.tensor([1, 0]).reshape(1, 1, 1, 2)}
        >>> noise = step_noise(0, torch.arange(1), (1, 1, 2))
        >>> last(RePaint(5, jump_length=2)(grey, schedule, x_T, **around, noise=noise)).flatten().tolist()
        [-1.0, 0.5]
    """

    steps: int = setting(250, "steps from T to 0", ge=1)
    jump_length: int = setting(10, "length of a jump up, in steps", ge=1)
    resamplings: int = setting(10, "how often each section of the chain is sampled; 1 for no jumps", ge=1)
    variance: ReverseVariance = setting(
        "small", "variance of a reverse step, unless it is learned: the posterior's (small), or beta (large)"
    )

    def __call__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        x_T: Tensor,
        cond: Conditioning | None = None,
        *,
        known: Tensor,
        mask: Tensor,
        noise: StepNoise,
        timesteps: Sequence[float] | None = None,
    ) -> Iterator[Sample]:
        """See `Inpainter`."""
        same_shape(x_T, known, "x_T and known")
        mask, known = checked_mask(mask, known).to(x_T.device), known.to(x_T)
        grid = self.levels(schedule, timesteps)
        levels = repaint_levels(grid, jump_length=self.jump_length, resamplings=self.resamplings)
        x_t = x_T
        for i, (t, s) in enumerate(itertools.pairwise(levels)):
            if s > t:
                x_t = q_transition(x_t, t, s, schedule).sample(noise(i))
                continue
            pred = predict(denoiser, x_t, t, cond, has_variance=True)
            p = p_reverse(pred, x_t, t, s, schedule, self.variance)
            x_t = _with_known(p, known, mask, s, schedule).sample(noise(i)) if s > 0 else paste(known, p.mean, mask)
            yield Sample(x_t, pred.x0, s)


@dataclass(frozen=True)
class Replacement(SteppedSampler):
    """Ancestral sampling that draws the known pixels from q(x_s | known) at every level (Song et al. 2021b, app. I.2).

    The hidden pixels depend on noisy known pixels, once per level, so the result is not a sample of the conditional
    distribution of the data, however many steps there are. `RePaint` reduces this bias with more network evaluations
    (Lugmayr et al. 2022, sec. 4.2). This is `RePaint` with one resampling, so noise has the keys 0, 1, 2, ...

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import last, step_noise
        >>> from ddpm.schedule import Linear
        >>> schedule, x_T = Linear().make(1000), torch.ones(1, 1, 1, 2)
        >>> grey = NetworkDenoiser(lambda x, row, cond: 0 * x + 0.5, schedule, "x0")
        >>> around = {"known": 0 * x_T - 1, "mask": torch.tensor([1, 0]).reshape(1, 1, 1, 2)}
        >>> noise = step_noise(0, torch.arange(1), (1, 1, 2))
        >>> last(Replacement(5)(grey, schedule, x_T, **around, noise=noise)).flatten().tolist()
        [-1.0, 0.5]
    """

    steps: int = setting(1000, "steps from T to 0, one network evaluation each", ge=1)
    variance: ReverseVariance = setting(
        "small", "variance of a reverse step, unless it is learned: the posterior's (small), or beta (large)"
    )

    def __call__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        x_T: Tensor,
        cond: Conditioning | None = None,
        *,
        known: Tensor,
        mask: Tensor,
        noise: StepNoise,
        timesteps: Sequence[float] | None = None,
    ) -> Iterator[Sample]:
        """See `Inpainter`."""
        once = RePaint(self.steps, self.spacing, self.timesteps, jump_length=1, resamplings=1, variance=self.variance)
        return once(denoiser, schedule, x_T, cond, known=known, mask=mask, noise=noise, timesteps=timesteps)


def repaint_levels(grid: Sequence[float], *, jump_length: int, resamplings: int) -> list[float]:
    """Return every level that RePaint visits, in order; an increase is one jump (Lugmayr et al. 2022, algorithm 1).

    The grid has N steps; position n is the level with n steps left. At each position b = 1 + i jump_length with
    b + jump_length <= N, the chain jumps up to b + jump_length and steps down again, resamplings - 1 times. For
    jump_length = 1 this is algorithm 1 with U = resamplings, for other lengths the authors' `get_schedule_jump`.
    There are N + (resamplings - 1) jump_length floor((N - 1) / jump_length) steps down in total.

    Args:
        grid: strictly decreasing levels that end at 0, for example `schedule.timesteps(steps)`.
        jump_length: length of a jump in steps of the grid, at least 1.
        resamplings: how often each section of the chain is sampled, at least 1; 1 makes no jumps.

    Raises:
        ValueError: a number is out of range, the grid is too short for a jump, or it does not decrease to 0.

    Examples:
        >>> repaint_levels([4, 3, 2, 1, 0], jump_length=1, resamplings=2)
        [4, 3, 4, 3, 2, 3, 2, 1, 2, 1, 0]
    """
    steps = len(grid) - 1
    if jump_length < 1 or resamplings < 1:
        raise ValueError(
            f"need jump_length >= 1 and resamplings >= 1, got jump_length={jump_length} and resamplings={resamplings}"
        )
    if steps < 1 or grid[-1] != 0 or any(s >= t for t, s in itertools.pairwise(grid)):
        raise ValueError(f"levels must fall strictly and end at 0, where known pixels are clean, got {list(grid)}")
    if resamplings > 1 and jump_length > steps - 1:
        raise ValueError(
            f"jump_length={jump_length} does not fit into {steps} steps: use jump_length <= {steps - 1}, more steps, "
            f"or resamplings=1"
        )
    jumps = dict.fromkeys(range(1, steps - jump_length + 1, jump_length), resamplings - 1)
    levels, position = [grid[0]], steps
    while position > 0:
        position -= 1
        levels.append(grid[steps - position])
        if jumps.get(position, 0) > 0:
            jumps[position] -= 1
            position += jump_length
            levels.append(grid[steps - position])
    return levels


def _with_known(
    p: DiagonalGaussian, known: Tensor, mask: Tensor, s: float, schedule: NoiseSchedule
) -> DiagonalGaussian:
    """Return q(x_s | known) for known pixels and p for the others; given x_t, all pixels are independent."""
    alpha, sigma = coefficients(schedule, s, known)
    return DiagonalGaussian(torch.where(mask, alpha * known, p.mean), torch.where(mask, sigma.square(), p.variance))
