"""Annealed Langevin dynamics: a walk along the score, -eps / sigma, at falling noise levels (Song & Ermon 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.prediction import Denoiser
from ddpm.samplers.base import Sample, StepNoise, SteppedSampler, predict, require_noise
from ddpm.schedule import NoiseSchedule
from ddpm.settings import setting


@dataclass(frozen=True)
class AnnealedLangevin(SteppedSampler):
    """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1), one `Sample` per level.

    At each level, from the noisiest down, it runs a Langevin chain with target q(x_t):
        x <- x + a / 2 score(x, t) + sqrt(a) z,   a = step_size sigma_t^2,   score = -eps / sigma_t.
    The step size is a fixed fraction of the noise variance, as in the paper, here for a variance-preserving process.
    Level 0 is a final denoising step, which returns the predicted x_0 (Jolicoeur-Martineau et al. 2021). Without it in
    `timesteps` the result has the noise of its last level, as in the paper. There are steps * steps_per_level + 1
    network evaluations.

    With the paper's step size of 0.2 (its epsilon / sigma_L^2) chains of this length do not mix: samples of N(0.2,
    0.3^2) have a standard deviation of 0.32 to 0.33; with the default of 1 it is 0.304 to 0.311. For a Gaussian q(x_t)
    of variance v >= sigma_t^2 the variance of a long chain is v / (1 - a / 4v): up to a third too large at high noise,
    but right at low noise, which determines the result. Steps above 2 overshoot.

    Step j at level i (both from 0) uses the noise of key i steps_per_level + j, which is unique.

    Examples:
        >>> import torch
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import last, step_noise
        >>> from ddpm.schedule import Linear
        >>> schedule, x_T = Linear().make(1000), torch.ones(2, 1, 1, 1)
        >>> grey = NetworkDenoiser(lambda x, row, cond: 0 * x + 0.5, schedule, "x0")  # of data that is 0.5 everywhere
        >>> noise = step_noise(0, torch.arange(2), (1, 1, 1))
        >>> last(AnnealedLangevin(steps=3, steps_per_level=2)(grey, schedule, x_T, noise=noise)).flatten().tolist()
        [0.5, 0.5]
    """

    steps: int = setting(100, "number of noise levels above 0", ge=1)
    steps_per_level: int = setting(10, "Langevin steps at each level, one network evaluation each", ge=1)
    step_size: float = setting(1.0, "Langevin step as a fraction of the level's noise variance", gt=0, lt=2)

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
        """Yield one `Sample` per level; see `Sampler`."""
        noise = require_noise(noise, "annealed Langevin dynamics")
        grid = self.levels(schedule, timesteps)
        x_t = x_T
        for i, t in enumerate(grid):
            if t == 0:
                x_t = predict(denoiser, x_t, grid[i - 1], cond).x0
                yield Sample(x_t, x_t, t)
                return
            sigma = schedule.sigma(t).item()
            a = self.step_size * sigma**2
            for j in range(self.steps_per_level):
                pred = predict(denoiser, x_t, t, cond)
                x_t = x_t - a / 2 / sigma * pred.eps + a**0.5 * noise(i * self.steps_per_level + j)
            yield Sample(x_t, pred.x0, t)
