"""Heun's method on the probability-flow ODE (EDM, Karras et al. 2022): two evaluations a step, order 2."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.prediction import Denoiser
from ddpm.samplers.base import Sample, StepNoise, SteppedSampler, predict
from ddpm.samplers.spacing import K_MAX
from ddpm.schedule import NoiseSchedule
from ddpm.settings import setting

NOISIEST = K_MAX * (1 + 1e-9)
"""EDM's noisiest level, sigma / alpha, up to rounding: a grid that begins at 80 begins with Heun's step."""


@dataclass(frozen=True)
class Heun(SteppedSampler):
    """EDM's algorithm 1, its deterministic sampler: at most 2 steps - 1 network evaluations.

    In y = x / alpha and k = sigma / alpha the ODE is dy/dk = eps, and the trapezoid's step
        y_s = y_t + (k_s - k_t) (eps_t + eps_s) / 2,   eps_s at the end of Euler's step.
    Euler's step alone (which is DDIM's) is taken to t = 0, as in the paper, and from levels with k > 80, where EDM has
    none: a variance-preserving schedule's first step may go from k = 20,000 (cosine), or from infinity (zero terminal
    SNR), down to 16, and the trapezoid would multiply the small difference of two eps by that.
    """

    steps: int = setting(25, "steps from T to 0, two network evaluations each", ge=1)

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
        """Yield one `Sample` per step, without noise; see `Sampler`."""
        x_t = x_T
        for t, s in itertools.pairwise(self.levels(schedule, timesteps)):
            alpha_t, sigma_t = schedule.alpha(t).item(), schedule.sigma(t).item()
            alpha_s, sigma_s = schedule.alpha(s).item(), schedule.sigma(s).item()
            pred = predict(denoiser, x_t, t, cond)
            x_s = alpha_s * pred.x0 + sigma_s * pred.eps
            if s > 0 and sigma_t <= NOISIEST * alpha_t:
                slope = (pred.eps + predict(denoiser, x_s, s, cond).eps) / 2
                x_s = alpha_s * (x_t / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * slope)
            x_t = x_s
            yield Sample(x_t, pred.x0, s)
