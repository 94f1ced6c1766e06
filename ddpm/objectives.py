"""Training objectives."""

from __future__ import annotations

from torch import Tensor, nn

from ddpm.gaussian import q_sample
from ddpm.prediction import Conditioning, Parameterization, target
from ddpm.schedule import NoiseSchedule


def simple_loss(
    network: nn.Module,
    schedule: NoiseSchedule,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    cond: Conditioning | None = None,
    *,
    kind: Parameterization = "eps",
) -> Tensor:
    """L_simple per sample, [B]: mean squared error of the network's output (DDPM, Ho et al. 2020, eq. 14).

    Args:
        network: maps (x_t [B, C, H, W], table index t - 1 [B], cond) to an output of `kind`.
        x_0: clean images in [-1, 1], [B, C, H, W].
        t: timesteps in 1..T, int64 [B].
        eps: standard normal noise like x_0.
        kind: what the network's output means.
    """
    output = network(q_sample(x_0, t, eps, schedule), (t - 1).float(), cond)
    return (output.float() - target(x_0, eps, t, schedule, kind)).square().flatten(1).mean(1)
