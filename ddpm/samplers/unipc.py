"""UniPC (Zhao et al. 2023): a predictor and a corrector of any order, with one network evaluation per step."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.prediction import Denoiser
from ddpm.samplers.base import Sample, StepNoise, SteppedSampler, predict
from ddpm.schedule import NoiseSchedule
from ddpm.settings import setting

History = Sequence[tuple[float, Tensor]]
"""(lambda = log(alpha / sigma), predicted x_0) of levels visited before, the latest first."""


@dataclass(frozen=True)
class UniPC(SteppedSampler):
    """UniPC-p with data prediction (algorithms 5-8, B_2(h) = e^h - 1): the probability-flow ODE in log-SNR.

    From t to s, with h = lambda_s - lambda_t, r_m = (lambda_m - lambda_t) / h and D_m = x0_m - x0_t for the levels m
    visited before, predictor and corrector are
        x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) x0_t - alpha_s B(-h) sum_m rho_m D_m / r_m,
    with rho from the Vandermonde system of eq. 12. The corrector also uses D at s, from the network evaluation of the
    next step. The predictor of order p uses p levels; the corrector raises the order by one (theorem 3.1). The first
    steps have the orders 1, 2, ... The step to t = 0, where h is infinite, returns the predicted x_0 without
    correction. With zero terminal SNR the first step is DDIM's and does not enter the history.

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import DDIM, last
        >>> from ddpm.schedule import Linear
        >>> schedule, x_T = Linear().make(1000), torch.ones(1, 1, 1, 1)
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")  # of N(0, I): its ODE keeps x
        >>> [round(last(sampler(gaussian, schedule, x_T)).item(), 2) for sampler in (DDIM(20), UniPC(20))]
        [0.91, 1.0]
    """

    steps: int = setting(10, "steps from T to 0, one network evaluation each", ge=1)
    order: Literal[1, 2, 3] = setting(2, "order of the predictor; the authors use 2 with guidance and 3 without")
    corrector: bool = setting(True, "whether to correct each step with the evaluation at its end (UniC)")

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
        history: deque[tuple[float, Tensor]] = deque(maxlen=self.order)
        before: tuple[float, Tensor] | None = None  # level and state before the last step
        for t, s in itertools.pairwise(self.levels(schedule, timesteps)):
            lambda_t = schedule.log_snr(t).item() / 2
            pred = predict(denoiser, x_t, t, cond)
            if self.corrector and before is not None and history:
                # Correct x_t, but keep the prediction at the uncorrected x_t for the next step (sec. 3.1).
                x_t = _step(schedule, *before, t, history, (lambda_t, pred.x0))
            if math.isfinite(lambda_t):
                history.appendleft((lambda_t, pred.x0))
            before = t, x_t
            if s == 0 or not history:
                x_t = schedule.alpha(s).item() * pred.x0 + schedule.sigma(s).item() * pred.eps
            else:
                x_t = _step(schedule, t, x_t, s, history, None)
            yield Sample(x_t, pred.x0, s)


def _step(
    schedule: NoiseSchedule, t: float, x_t: Tensor, s: float, history: History, end: tuple[float, Tensor] | None
) -> Tensor:
    """Return x_s from x_t with the predictions at t and earlier levels, and, in the corrector, that at s (`end`)."""
    (lambda_t, x0_t), *earlier = history
    h = schedule.log_snr(s).item() / 2 - lambda_t
    ratio = schedule.sigma(s).item() / schedule.sigma(t).item()
    alpha_s = schedule.alpha(s).item()
    x_s = ratio * x_t - alpha_s * math.expm1(-h) * x0_t
    points = [*earlier, *([end] if end else [])]
    if not points:
        return x_s
    r = torch.tensor([(at - lambda_t) / h for at, _ in points], dtype=torch.float64)
    differences = [(x0 - x0_t) / r_m for (_, x0), r_m in zip(points, r.tolist(), strict=True)]
    rho = _coefficients(r, h)
    total = sum(c * d for c, d in zip(rho.tolist(), differences, strict=True))
    return x_s - alpha_s * math.expm1(-h) * total


def _coefficients(r: Tensor, h: float) -> Tensor:
    """Return rho of eq. 12 for data prediction, the solution of the system below for k = 1, 2, ...

    The system is sum_m r_m^(k-1) rho_m = k! (-h) phi_(k+1)(-h) / B_2(-h). A single rho is 1/2, as in the authors' code,
    which satisfies the condition to the required order.
    """
    if len(r) == 1:
        return torch.full((1,), 0.5, dtype=torch.float64)
    phi = math.expm1(-h) / -h - 1  # x phi_2(x) at x = -h, and x phi_(k+1)(x) = phi_k(x) - 1 / k! from there on
    rows, values = [], []
    for k in range(1, len(r) + 1):
        rows.append(r ** (k - 1))
        values.append(phi * math.factorial(k) / math.expm1(-h))
        phi = phi / -h - 1 / math.factorial(k + 1)
    return torch.linalg.solve(torch.stack(rows), torch.tensor(values, dtype=torch.float64))
