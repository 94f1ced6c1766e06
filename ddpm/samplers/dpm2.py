"""DPM-Solver-2 (Lu et al. 2022a, algorithm 1; "DPM-2" elsewhere): the midpoint method in log(sigma / alpha)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.prediction import Denoiser
from ddpm.samplers.base import Sample, StepNoise, SteppedSampler, predict
from ddpm.samplers.heun import NOISIEST
from ddpm.schedule import NoiseSchedule
from ddpm.settings import setting


@dataclass(frozen=True)
class DPM2(SteppedSampler):
    """The midpoint method on the probability-flow ODE: order 2, at most 2 steps - 1 network evaluations.

    In y = x / alpha and k = sigma / alpha the ODE is dy/dk = eps, and a step is
        y_s = y_t + (k_s - k_t) eps_m,   eps_m at the end of Euler's step to the geometric middle k_m = sqrt(k_t k_s).
    This is k-diffusion's `sample_dpm_2` without churn. The step to t = 0 and steps from levels with k > 80 are Euler
    steps (which are DDIM's), for the reasons given in `Heun`.

    Examples:
        >>> import torch
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import DDIM, last
        >>> from ddpm.schedule import Linear
        >>> schedule, x_T = Linear().make(1000), torch.ones(1, 1, 1, 1)
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")  # of N(0, I): its ODE keeps x
        >>> [round(last(sampler(gaussian, schedule, x_T)).item(), 2) for sampler in (DDIM(49), DPM2(25))]
        [0.96, 1.0]
    """

    steps: int = setting(25, "steps from T to 0, two network evaluations each (one in the last)", ge=1)

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
            if s > 0 and sigma_t <= NOISIEST * alpha_t:
                k_t, k_s = sigma_t / alpha_t, sigma_s / alpha_s
                middle = schedule.timestep(math.atan(math.sqrt(k_t * k_s))).item()
                x_m = schedule.alpha(middle).item() * pred.x0 + schedule.sigma(middle).item() * pred.eps
                slope = predict(denoiser, x_m, middle, cond).eps
                x_t = alpha_s * (x_t / alpha_t + (k_s - k_t) * slope)
            else:
                x_t = alpha_s * pred.x0 + sigma_s * pred.eps
            yield Sample(x_t, pred.x0, s)
