"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class EMA:
    """Classical EMA with a ramp, counted in images so that it does not depend on the batch size.

    After a batch of b images the average moves by 1 - 0.5^(b / h), where the half-life h is at most `half_life` images
    and at most `ramp` times the images seen so far (EDM, Karras et al. 2022, app. F.2: early weights are forgotten).

    Attributes:
        shadow: name -> averaged float32 tensor, detached.
    """

    def __init__(self, module: nn.Module, half_life: float, ramp: float = 0.05) -> None:
        if half_life <= 0 or ramp <= 0:
            raise ValueError(f"half_life and ramp must be > 0, got {half_life} and {ramp}")
        self.half_life = half_life
        self.ramp = ramp
        self.shadow = {name: p.detach().float().clone() for name, p in module.state_dict().items()}

    def decay(self, images_seen: int, batch_size: int) -> float:
        """The weight of the old average in the update that ends at `images_seen`."""
        half_life = min(self.half_life, max(self.ramp * images_seen, 1e-8))
        return 0.5 ** (batch_size / half_life)

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move towards the module's weights after a step that ended at `images_seen` images."""
        weight = 1 - self.decay(images_seen, batch_size)
        torch._foreach_lerp_(list(self.shadow.values()), _float(module.state_dict().values()), weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, ready for `module.load_state_dict`."""
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the averaged weights; names must be the module's."""
        if state.keys() != self.shadow.keys():
            raise ValueError(f"EMA names differ: {sorted(state.keys() ^ self.shadow.keys())[:5]}")
        for name, tensor in state.items():
            self.shadow[name].copy_(tensor)


def _float(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().float() for t in tensors]
