"""Noise that lies near its image: the nearest of k candidates (Li et al. 2025, "Improved Immiscible Diffusion", KNN).

Where noise is drawn independently of the image and there is much of it, a network sees nearly the same x_t from many
images. Candidates are those of one image alone, keyed by (seed, ordinal, j): no other image of the batch is looked at,
so what a sample gets does not depend on its batch, the rank, or a restart. Candidate 0 is the noise of one draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm.noise import Purpose, Seed, normal


def nearest_noise(x_0: Tensor, seed: Seed, ordinals: Tensor, candidates: int) -> Tensor:
    """Return the nearest of `candidates` standard normal draws to each image, float32 [B, ...] like x_0.

    The nearest one has the least Euclidean distance, computed in float64, so that no rounding decides; the first of
    equally near ones is taken. With one candidate it is the noise of ordinary training, bit for bit.

    Args:
        x_0: the images as they are trained on, flipped where they are flipped, [B, ...].
        seed: see `ddpm.noise.words`.
        ordinals: of the samples, int64 [B].
        candidates: k >= 1.

    Raises:
        ValueError: there is no candidate.

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
