"""Noise near its image: the nearest of k candidates (Li et al. 2025, "Improved Immiscible Diffusion", KNN).

If noise is drawn independently of the image, at high noise levels a network sees nearly the same x_t from many images.
Candidates are drawn for each image separately, keyed by (seed, ordinal, j), so the noise of a sample does not depend on
the other images of the batch, the rank, or a restart. Candidate 0 is the noise of ordinary training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm.noise import Purpose, Seed, normal


def nearest_noise(x_0: Tensor, seed: Seed, ordinals: Tensor, candidates: int) -> Tensor:
    """Return the nearest of `candidates` standard normal draws to each image, float32 [B, ...] like x_0.

    The nearest draw has the least Euclidean distance, computed in float64 so that rounding does not decide; of equally
    near draws the first is taken. With one candidate the result is the noise of ordinary training, bit for bit.

    Args:
        x_0: images as used in training, flips included, [B, ...].
        seed: see `ddpm.noise.words`.
        ordinals: ordinals of the samples, int64 [B].
        candidates: k >= 1.

    Raises:
        ValueError: `candidates` is less than 1.

    Examples:
        >>> x_0 = torch.ones(4, 1, 8, 8)
        >>> one, best = (nearest_noise(x_0, 7, torch.arange(4), k) for k in (1, 8))
        >>> bool(((best - x_0).flatten(1).norm(dim=1) <= (one - x_0).flatten(1).norm(dim=1)).all())
        True
    """
    if candidates < 1:
        raise ValueError(f"candidates must be >= 1, got {candidates}")
    shape = tuple(x_0.shape[1:])
    best = normal(seed, ordinals, Purpose.NOISE, shape)
    if candidates == 1:
        return best
    least = _squared_distance(x_0, best)
    for j in range(1, candidates):  # one at a time: all of them would take k times the memory
        other = normal(seed, ordinals, Purpose.NOISE, shape, draw=j)
        distance = _squared_distance(x_0, other)
        nearer = distance < least
        best = torch.where(nearer.reshape(-1, *(1,) * len(shape)), other, best)
        least = torch.where(nearer, distance, least)
    return best


def _squared_distance(x_0: Tensor, eps: Tensor) -> Tensor:
    """Return the squared distance of each image to its noise, float64 [B]."""
    return (x_0.double() - eps).square().flatten(1).sum(1)
