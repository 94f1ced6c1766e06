"""DPM-Solver++ (Lu et al. 2022b): the probability-flow ODE in log-SNR, its linear part solved exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.prediction import Denoiser
from ddpm.samplers.base import Sample, StepNoise, SteppedSampler, predict
from ddpm.schedule import NoiseSchedule
from ddpm.settings import setting


@dataclass(frozen=True)
class DPMSolver(SteppedSampler):
    """DPM-Solver++(2M) (algorithm 2): data prediction, multistep, order 2, one network evaluation per step.

    With lambda = log(alpha / sigma), h = lambda_s - lambda_t and r = h_previous / h, a step is
        x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) D,   D = (1 + 1 / 2r) x0_t - 1 / 2r x0_previous.
    In the first step and where h is infinite, D is x0_t, which is DDIM's step; so the step to t = 0 returns x0_t. (The
    authors use order 1 for the last step if steps < 15; here the step to t = 0 always has order 1.) Zero terminal SNR
    needs no special case: h_previous is infinite after the first step, and so is r.

    Examples:
        >>> import torch
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import DDIM, last
        >>> from ddpm.schedule import Linear
        >>> schedule, x_T = Linear().make(1000), torch.ones(1, 1, 1, 1)
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")  # of N(0, I): its ODE keeps x
        >>> [round(last(sampler(gaussian, schedule, x_T)).item(), 2) for sampler in (DDIM(20), DPMSolver(20))]
        [0.91, 1.0]
    """

    steps: int = setting(20, "steps from T to 0, one network evaluation each", ge=1)

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
        previous, h_previous = None, 0.0
        for t, s in itertools.pairwise(self.levels(schedule, timesteps)):
            pred = predict(denoiser, x_t, t, cond)
            h = (schedule.log_snr(s) - schedule.log_snr(t)).item() / 2
            if previous is None or s == 0:
                data = pred.x0
            else:
                half = h / (2 * h_previous)  # 1 / 2r
                data = (1 + half) * pred.x0 - half * previous
            ratio = schedule.sigma(s) / schedule.sigma(t)
            # alpha_s (1 - e^-h) = alpha_s - alpha_t sigma_s / sigma_t, which is finite even if h is infinite.
            x_t = ratio.item() * x_t + (schedule.alpha(s) - ratio * schedule.alpha(t)).item() * data
            previous, h_previous = pred.x0, h
            yield Sample(x_t, pred.x0, s)
