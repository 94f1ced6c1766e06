"""Loss scaling for fp16, without which small gradients would underflow."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipelines.training.loop.collectives import local_part

START, LARGEST = 16, 24  # exponents of 2
GROWTH_STEPS = 2000


class LossScale:
    """A power of two by which the loss is multiplied, and the gradient divided (Micikevicius et al. 2018, sec. 3.2).

    It starts at 2^16, is halved where the gradient overflows, whose update is left out, and doubled after 2,000 updates
    in a row: the rule and the numbers of `torch.amp.GradScaler`. That class looks for infinities of each optimizer's
    gradient once more and on each rank; a step has already agreed on a loss and a norm, under DDP and FSDP2 alike, and
    an exponent in CPU memory needs no look at the device. Dividing by a power of two is exact.

    Args:
        enabled: whether this is fp16; otherwise the factor is 1 and never changes.

    Attributes:
        state: int64 [2], part of every checkpoint: the exponent minus 16, and the updates since it changed. Zeros are a
            new one.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.state = torch.zeros(2, dtype=torch.int64)

    @property
    def factor(self) -> float:
        """The number by which the loss is multiplied."""
        return 2.0 ** (START + int(self.state[0])) if self.enabled else 1.0

    @torch.no_grad()
    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients of parameters, whole or sharded, in place."""
        if self.enabled:
            gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.factor)

    def update(self, loss_is_finite: bool, gradient_is_finite: bool) -> bool:
        """Change the scale after a step, and return whether it was lowered: the next step may do better then.

        A loss that is not finite itself is none of its business, and neither is a gradient that overflows at factor 1.
        """
        exponent, updates = self.state.tolist()
        if not self.enabled or not loss_is_finite:
            return False
        if not gradient_is_finite:
            lowered = exponent > -START
            self.state[:] = torch.tensor([exponent - lowered, 0])
            return lowered
        if updates + 1 == GROWTH_STEPS:
            self.state[:] = torch.tensor([min(exponent + 1, LARGEST - START), 0])
        else:
            self.state[1] = updates + 1
        return False
