"""Checks of two sets of features before they are compared."""

from __future__ import annotations

from torch import Tensor


def checked_pair(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Return both in float64, after checking their shapes and values.

    Examples:
        >>> import torch
        >>> a, b = checked_pair(torch.zeros(3, 2), torch.ones(4, 2), least=2)
        >>> a.dtype
        torch.float64
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < least:
        raise ValueError(f"need at least {least} feature vectors in each set, got {len(a)} and {len(b)}")
    if not bool(a.isfinite().all()) or not bool(b.isfinite().all()):
        raise ValueError("features must be finite: the images or the evaluator network overflowed")
    return a.double(), b.double()
