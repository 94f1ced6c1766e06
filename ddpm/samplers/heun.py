"""Heun's method on the probability-flow ODE (EDM, Karras et al. 2022): order 2, two network evaluations per step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.prediction import Denoiser
from ddpm.samplers.base import Sample, StepNoise, SteppedSampler, predict
from ddpm.samplers.spacing import K_MAX
from ddpm.schedule import NoiseSchedule
from ddpm.settings import setting

NOISIEST = K_MAX * (1 + 1e-9)
"""EDM's noisiest level, sigma / alpha, with a margin for rounding, so that a grid from 80 starts with Heun's step."""


@dataclass(frozen=True)
class Heun(SteppedSampler):
    """EDM's deterministic sampler (algorithm 1): at most 2 steps - 1 network evaluations.

    In y = x / alpha and k = sigma / alpha the ODE is dy/dk = eps, and a step of the trapezoidal rule is
        y_s = y_t + (k_s - k_t) (eps_t + eps_s) / 2,   eps_s at the end of Euler's step.
    The step to t = 0 is an Euler step (which is DDIM's), as in the paper. So are steps from levels with k > 80, which
    EDM does not have: the first step of a variance-preserving schedule may go from k = 20,000 (cosine), or infinity
    (zero terminal SNR), down to 16, and the trapezoidal rule would multiply the small difference of two eps by that.

    With `time` = "flow" the rule is that of flow matching, in z = x / (alpha + sigma), tau = sigma / (alpha + sigma):
        z_s = z_t + (tau_s - tau_t) (u_t + u_s) / 2,   u = eps - x_0,
    which is finite at every level. Euler's step is the same in both, and DDIM's.

    Examples:
        >>> import torch
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import DDIM, last
        >>> from ddpm.schedule import Linear
        >>> schedule, x_T = Linear().make(1000), torch.ones(1, 1, 1, 1)
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")  # of N(0, I): its ODE keeps x
        >>> [round(last(sampler(gaussian, schedule, x_T)).item(), 2) for sampler in (DDIM(49), Heun(25))]
        [0.96, 1.0]
    """

    steps: int = setting(25, "steps from T to 0, two network evaluations each (one in the last)", ge=1)
    time: Literal["ratio", "flow"] = setting(
        "ratio", "time of the ODE that a step takes for straight: sigma / alpha (EDM), or tau of flow matching"
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
        """Yield one `Sample` per step, without noise; see `Sampler`."""
        x_t = x_T
        for t, s in itertools.pairwise(self.levels(schedule, timesteps)):
            alpha_t, sigma_t = schedule.alpha(t).item(), schedule.sigma(t).item()
            alpha_s, sigma_s = schedule.alpha(s).item(), schedule.sigma(s).item()
            pred = predict(denoiser, x_t, t, cond)
            x_s = alpha_s * pred.x0 + sigma_s * pred.eps
            if s > 0 and self.time == "flow":
                end = predict(denoiser, x_s, s, cond)
                velocity = (pred.eps - pred.x0 + end.eps - end.x0) / 2
                span = sigma_s / (alpha_s + sigma_s) - sigma_t / (alpha_t + sigma_t)
                x_s = (alpha_s + sigma_s) * (x_t / (alpha_t + sigma_t) + span * velocity)
            elif s > 0 and sigma_t <= NOISIEST * alpha_t:
                slope = (pred.eps + predict(denoiser, x_s, s, cond).eps) / 2
                x_s = alpha_s * (x_t / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * slope)
            x_t = x_s
            yield Sample(x_t, pred.x0, s)
