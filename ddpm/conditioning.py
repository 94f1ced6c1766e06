"""What a sample is conditioned on: class, text, and the known pixels of inpainting; each with a null per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a sample is conditioned on; every tensor is batched on its first axis.

    Attributes:
        label: class index in [0, num_classes), int64 [B].
        text: token embeddings [B, L, D].
        text_mask: bool [B, L], True for the tokens that are there; None where all are.
        pooled: embedding of the whole text, [B, D].
        mask: bool or float [B, 1, H, W], 1 where a pixel is known (inpainting).
        context: the clear image [B, C, H, W]; only what `mask` lets through is seen.
        drop: bool [B]; True replaces the sample's label and text by the null condition that the network owns. What is
            known of the image itself (mask and context) is never dropped.
    """

    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    mask: Tensor | None = None
    context: Tensor | None = None
    drop: Tensor | None = None

    def dropped(self, drop: Tensor) -> Conditioning:
        """The same conditions with `drop` [B] added to what is dropped already (Ho & Salimans 2022, algorithm 1)."""
        return replace(self, drop=drop if self.drop is None else self.drop | drop)

    def __len__(self) -> int:
        """The number of samples.

        Raises:
            ValueError: an empty condition, which fits any number.
        """
        for _, tensor in self._tensors():
            if tensor is not None:
                return len(tensor)
        raise ValueError("a condition without any tensor has no length")

    def __getitem__(self, span: slice | Tensor) -> Conditioning:
        """The conditions of some of the samples."""
        return self.map(lambda tensor: tensor[span])

    def null(self) -> Conditioning:
        """Without label and text: the null condition beside the same known pixels."""
        return Conditioning(mask=self.mask, context=self.context)

    def map(self, f: Callable[[Tensor], Tensor]) -> Conditioning:
        """Every tensor replaced by f(tensor): for moving, slicing or repeating the batch."""
        return Conditioning(**{k: None if v is None else f(v) for k, v in self._tensors()})

    def to(self, device: torch.device | str) -> Conditioning:
        """On `device`."""
        return self.map(lambda tensor: tensor.to(device))

    def _tensors(self) -> list[tuple[str, Tensor | None]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]
