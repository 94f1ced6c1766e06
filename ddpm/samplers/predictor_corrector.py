"""Predictor-corrector sampling (Song et al. 2021b): the reverse chain with Langevin steps at every noise level."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.gaussian import ReverseVariance, p_reverse
from ddpm.prediction import Denoiser
from ddpm.samplers.base import Sample, StepNoise, SteppedSampler, predict, require_noise
from ddpm.schedule import NoiseSchedule
from ddpm.settings import setting


@dataclass(frozen=True)
class PredictorCorrector(SteppedSampler):
    """Predictor-corrector sampling (Song et al. 2021b, algorithm 3), one `Sample` per level.

    The predictor is the step of `Ancestral`. After it, at each level s > 0, the Langevin corrector (algorithm 5) is
        x <- x + e score(x, s) + sqrt(2 e) z,   e = 2 (1 - beta_s) (snr |z| / |score|)^2,
    with beta_s of the chain of `steps` steps. The norms are per image; the authors' code averages them over the batch,
    which makes a sample depend on the others. With corrector_steps = 0 this is `Ancestral`. There are steps +
    (steps - 1) corrector_steps network evaluations.

    At level s the predictor's noise has the key s (corrector_steps + 1), and the j-th corrector step's key is larger by
    j, so each step has a unique key where the levels are table timesteps. Of other levels, keys are rounded to 1/256.

    Examples:
        >>> import torch
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import last, step_noise
        >>> from ddpm.schedule import Linear
        >>> schedule, x_T = Linear().make(1000), torch.ones(2, 1, 1, 1)
        >>> grey = NetworkDenoiser(lambda x, row, cond: 0 * x + 0.5, schedule, "x0")  # of data that is 0.5 everywhere
        >>> noise = step_noise(0, torch.arange(2), (1, 1, 1))
        >>> last(PredictorCorrector(steps=10)(grey, schedule, x_T, noise=noise)).flatten().tolist()
        [0.5, 0.5]
    """

    steps: int = setting(500, "predictor steps from T to 0, one network evaluation each", ge=1)
    variance: ReverseVariance = setting(
        "small", "variance of a reverse step, unless it is learned: the posterior's (small), or beta (large)"
    )
    corrector_steps: int = setting(1, "Langevin steps at each level, one network evaluation each", ge=0)
    snr: float = setting(
        0.16, "signal-to-noise ratio of a Langevin step; 0.16 is the authors' for CIFAR-10", gt=0, lt=1
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
        """Yield one `Sample` per level; see `Sampler`."""
        noise = require_noise(noise, "predictor-corrector sampling")
        x_t = x_T
        grid = self.levels(schedule, timesteps)
        for i, (t, s) in enumerate(itertools.pairwise(grid)):
            pred = predict(denoiser, x_t, t, cond, has_variance=True)
            p = p_reverse(pred, x_t, t, s, schedule, self.variance)
            if s == 0:
                yield Sample(p.mean, pred.x0, s)
                return
            key = s * (self.corrector_steps + 1)
            x_t = p.sample(noise(key))
            if i + 2 < len(grid):
                sigma = schedule.sigma(s).item()
                one_minus_beta = (schedule.alpha_bar(s) / schedule.alpha_bar(grid[i + 2])).item()
                for j in range(1, self.corrector_steps + 1):
                    score, z = predict(denoiser, x_t, s, cond, has_variance=True).eps / -sigma, noise(key + j)
                    e = 2 * one_minus_beta * (self.snr * _norm(z) / _norm(score)).square()
                    x_t = x_t + e * score + (2 * e).sqrt() * z
            yield Sample(x_t, pred.x0, s)


def _norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each image, [B, 1, ..., 1]."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *(1,) * (x.dim() - 1))
