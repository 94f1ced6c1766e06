"""DDIM (Song et al. 2021a): sampling in few steps, deterministic by default, and inversion from image to noise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.gaussian import posterior_variance
from ddpm.prediction import Denoiser, coefficients
from ddpm.samplers.base import Sample, StepNoise, SteppedSampler, predict, require_noise
from ddpm.schedule import NoiseSchedule
from ddpm.settings import setting

CONTRACTION = 0.7
"""Largest share of the error that a correction of an inverted step may leave; beyond it the iteration diverges."""


@dataclass(frozen=True)
class DDIM(SteppedSampler):
    """DDIM sampling: each step recombines the predicted image and the predicted noise at the next level (eq. 12).

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import last
        >>> from ddpm.schedule import Linear
        >>> schedule, x_T = Linear().make(1000), torch.ones(1, 1, 1, 1)
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")  # of N(0, I): its ODE keeps x
        >>> [round(last(DDIM(steps=n)(gaussian, schedule, x_T)).item(), 2) for n in (10, 100)]
        [0.83, 0.98]
    """

    steps: int = setting(50, "steps from T to 0, one network evaluation each", ge=1)
    eta: float = setting(
        0.0, "noise of a step as a share of the DDPM posterior's (eq. 16); 0 is deterministic", ge=0, le=1
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
        """Yield one `Sample` per step; noise is needed where eta > 0. See `Sampler`."""
        if self.eta > 0:
            noise = require_noise(noise, "DDIM with eta > 0")
        x_t = x_T
        for t, s in itertools.pairwise(self.levels(schedule, timesteps)):
            pred = predict(denoiser, x_t, t, cond)
            alpha, sigma = coefficients(schedule, s, x_t)
            variance = self.eta**2 * posterior_variance(t, s, schedule).item()
            x_t = alpha * pred.x0 + (sigma**2 - variance).clamp(min=0).sqrt() * pred.eps
            if variance > 0 and noise is not None:
                x_t = x_t + variance**0.5 * noise(s)
            yield Sample(x_t, pred.x0, s)

    def invert(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        x_0: Tensor,
        cond: Conditioning | None = None,
        *,
        corrections: int = 5,
        timesteps: Sequence[float] | None = None,
    ) -> Iterator[Sample]:
        """Yield one `Sample` per step from an image to the noise from which sampling reproduces it.

        A deterministic step down from t to s is x_s = alpha_s x_0(x_t) + sigma_s eps(x_t). Inversion solves this for
        x_t, given x_s: x_t = alpha_t x_0 + sigma_t eps with the prediction at x_t itself. The usual inversion (Song et
        al. 2021a, sec. 4.3; Dhariwal & Nichol 2021, app. F) uses the prediction at (x_s, s) instead, which is correct
        to first order in the step. Each correction evaluates the prediction at the current estimate of x_t, a
        fixed-point iteration (Pan et al. 2023, "Effective Real Image Editing with Accelerated Iterative Diffusion
        Inversion"), which converges if the step is small enough. It iterates on eps, or on x_0 where noise dominates,
        because the errors of x_0 are smaller there. Each image continues from the estimate whose step down came closest
        to x_s, and is not corrected further once a correction leaves more than `CONTRACTION` of the error: where the
        density of the data has sharp edges the iteration does not converge, and more corrections would do harm.

        Args:
            denoiser: the denoiser used for sampling, with the same guidance and clipping.
            x_0: clean images [B, C, H, W].
            cond: the conditions used for sampling.
            corrections: evaluations per step beyond the first; 0 is the usual inversion. Its first step, from a clean
                image, evaluates the network at its lowest noise level, t = 1.
            timesteps: the levels of sampling, strictly decreasing, instead of the sampler's own.

        Raises:
            ValueError: eta > 0, so that steps are random and cannot be inverted, or `corrections` < 0.
        """
        if self.eta > 0 or corrections < 0:
            raise ValueError(f"inversion needs eta = 0 and corrections >= 0, got eta={self.eta}, {corrections=}")
        x_s = x_0
        for s, t in itertools.pairwise(reversed(self.levels(schedule, timesteps))):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = coefficients(schedule, t, x_s), coefficients(schedule, s, x_s)
            noisy = bool(schedule.sigma(s) > schedule.alpha(s))
            x_t, level = x_s, max(s, 1.0)  # networks are not trained below t = 1
            kept, least = Sample(x_s, x_s, t), x_s.new_full((len(x_s),), torch.inf)
            for evaluation in range(corrections + 1):
                pred = predict(denoiser, x_t, level, cond)
                missed = (alpha_s * pred.x0 + sigma_s * pred.eps - x_s).flatten(1).norm(dim=1)
                if noisy:
                    x_t = alpha_t * pred.x0 + sigma_t / sigma_s * (x_s - alpha_s * pred.x0)
                else:  # x_0 is the one that gives x_s with this eps: (x_s - sigma_s eps) / alpha_s.
                    x_t = alpha_t / alpha_s * (x_s - sigma_s * pred.eps) + sigma_t * pred.eps
                level = t
                if evaluation == 0:  # the usual inversion
                    kept = Sample(x_t, pred.x0, t)
                    continue
                nearer = missed < CONTRACTION * least
                least = torch.where(nearer, missed, -1)
                chosen = nearer.view(-1, *[1] * (x_t.dim() - 1))
                kept = Sample(torch.where(chosen, x_t, kept.x_t), torch.where(chosen, pred.x0, kept.x0), t)
            x_s = kept.x_t
            yield kept
