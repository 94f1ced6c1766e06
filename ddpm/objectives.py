"""Training objectives: the simplified loss, its hybrid with the variational bound, the bound alone, score matching.

Every loss is per sample, [B]; the caller averages over batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ddpm.bound import vlb_term
from ddpm.conditioning import Conditioning
from ddpm.gaussian import q_sample
from ddpm.prediction import Parameterization, from_output, network_input, split_output, target
from ddpm.schedule import NoiseSchedule
from ddpm.settings import Settings, setting
from ddpm.weights import Uniform, Weight

Loss = Literal["simple", "hybrid", "vlb"]


@dataclass(frozen=True)
class Objective(Settings):
    """The parameterization of a network and its training loss.

    The loss is one of "simple", the squared error of the output (DDPM, eq. 14); "hybrid", which adds `vlb_weight` L_vlb
    to train only a learned variance (Improved DDPM, eq. 16); and "vlb", L_vlb alone. L_vlb is the sum over the
    timesteps, in bits per dimension.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> schedule, x_0, t = Linear().make(1000), torch.zeros(2, 1, 8, 8), torch.tensor([1, 500])
        >>> def nothing(x_t, row, cond):
        ...     return torch.zeros_like(x_t)
        >>> Objective(prediction="eps").losses(nothing, schedule, x_0, t, torch.ones_like(x_0)).tolist()
        [1.0, 1.0]
    """

    prediction: Parameterization = setting("v", "parameterization: what the network's output is")
    loss: Loss = setting("simple", "squared error; hybrid adds the bound, for a learned variance; vlb: bound only")
    weight: Weight = Uniform()
    vlb_weight: float = setting(1e-3, "weight of the bound in the hybrid loss", gt=0)

    def losses(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        x_0: Tensor,
        t: Tensor,
        eps: Tensor,
        cond: Conditioning | None = None,
    ) -> Tensor:
        """Return the loss of each sample, [B], float32 (float64 for a network in float64).

        Args:
            network: maps (x_t [B, C, H, W], table index t - 1 [B], cond) to [B, C, H, W], or [B, 2 C, H, W] if it
                learns the variance; see `ddpm.prediction.network_input`.
            x_0: clean images in [-1, 1], [B, C, H, W].
            t: timesteps in 1..T, int64 [B].
            eps: standard normal noise like x_0.

        Raises:
            ValueError: the loss is "hybrid" but the network does not learn the variance.
        """
        x_t = q_sample(x_0, t, eps, schedule)
        output, fraction = split_output(network(*network_input(x_t, t, schedule, self.prediction), cond), x_0.shape[1])
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.loss == "vlb":
            return self._vlb(output, fraction, x_0, x_t, t, schedule)
        error = output - target(x_0, eps, t, schedule, self.prediction)
        loss = self.weight(schedule, t, self.prediction).to(x_0) * error.square().flatten(1).mean(1)
        if self.loss == "simple":
            return loss
        if fraction is None:
            raise ValueError("the hybrid loss trains a learned variance: the network needs twice the output channels")
        # Only L_simple trains the mean: the bound's gradient, which is noisier, is stopped (Improved DDPM, sec. 3.1).
        return loss + self.vlb_weight * self._vlb(output.detach(), fraction, x_0, x_t, t, schedule)

    def _vlb(
        self, output: Tensor, fraction: Tensor | None, x_0: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule
    ) -> Tensor:
        """Return T times the bound's term at t: for uniform t, an unbiased estimate of the sum, bits per dimension."""
        # In float64, because the terms are differences of nearly equal Gaussians.
        x_t = x_t.double()
        pred = from_output(output.double(), x_t, t, schedule, self.prediction)
        pred = replace(pred, variance_fraction=None if fraction is None else fraction.double())
        return (schedule.num_steps * vlb_term(pred, x_0.double(), x_t, t, schedule)).to(output.dtype)


def simple_loss(
    network: nn.Module,
    schedule: NoiseSchedule,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    cond: Conditioning | None = None,
    *,
    prediction: Parameterization = "eps",
) -> Tensor:
    """Return L_simple per sample, [B]: the mean squared error of the output (DDPM, Ho et al. 2020, eq. 14).

    Examples:
        >>> from ddpm.schedule import Linear
        >>> eps = torch.full((2, 1, 8, 8), 2.0)
        >>> t = torch.tensor([1, 500])
        >>> simple_loss(lambda x_t, row, cond: eps - 0.5, Linear().make(1000), torch.zeros_like(eps), t, eps).tolist()
        [0.25, 0.25]
    """
    return Objective(prediction=prediction).losses(network, schedule, x_0, t, eps, cond)


def score_matching_loss(score: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return the denoising score matching loss per sample, [B] (Vincent 2011, eq. 11; Song & Ermon 2019, eq. 5).

    It is the mean over pixels of the squared distance to grad log q(x_t | x_0) = -eps / sigma_t. For score = -eps_theta
    / sigma_t this is 1 / sigma_t^2 times the squared error of eps_theta; multiplied by sigma_t^2 it is L_simple.

    Args:
        score: the model's score at x_t = alpha_t x_0 + sigma_t eps, [B, C, H, W].

    Examples:
        >>> from ddpm.schedule import Linear
        >>> schedule, eps, t = Linear().make(1000), torch.ones(1, 1, 8, 8), torch.tensor([500])
        >>> loss = score_matching_loss(torch.zeros_like(eps), eps, t, schedule)
        >>> round((loss * schedule.sigma(t).square()).item(), 5)  # L_simple of a network that predicts 0
        1.0
    """
    return (score - target(torch.zeros_like(eps), eps, t, schedule, "score")).square().flatten(1).mean(1)
