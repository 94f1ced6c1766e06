"""Ancestral sampling: the reverse Markov chain itself (DDPM, Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.gaussian import ReverseVariance, p_reverse
from ddpm.prediction import Denoiser
from ddpm.samplers.base import Sample, StepNoise, SteppedSampler, predict, require_noise
from ddpm.schedule import NoiseSchedule
from ddpm.settings import setting


@dataclass(frozen=True)
class Ancestral(SteppedSampler):
    """Ancestral sampling: draw x_s ~ p(x_s | x_t) from T to 0; with fewer steps the chain is respaced.

    The mean is that of q(x_s | x_t, x_0) at the predicted x_0. A learned variance replaces `variance`.

    Examples:
        >>> import torch
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import last, step_noise
        >>> from ddpm.schedule import Linear
        >>> schedule, x_T = Linear().make(1000), torch.ones(2, 1, 1, 1)
        >>> grey = NetworkDenoiser(lambda x, row, cond: 0 * x + 0.5, schedule, "x0")  # of data that is 0.5 everywhere
        >>> noise = step_noise(0, torch.arange(2), (1, 1, 1))
        >>> last(Ancestral(steps=10)(grey, schedule, x_T, noise=noise)).flatten().tolist()
        [0.5, 0.5]
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
        noise: StepNoise | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> Iterator[Sample]:
        """Yield one `Sample` per step; see `Sampler`."""
        noise = require_noise(noise, "ancestral sampling")
        x_t = x_T
        for t, s in itertools.pairwise(self.levels(schedule, timesteps)):
            pred = predict(denoiser, x_t, t, cond, has_variance=True)
            p = p_reverse(pred, x_t, t, s, schedule, self.variance)
            x_t = p.sample(noise(s)) if s > 0 else p.mean
            yield Sample(x_t, pred.x0, s)
