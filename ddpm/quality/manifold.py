"""Scores by nearest neighbours: precision and recall, density and coverage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.quality.features import checked_pair
from ddpm.quality.intervals import Measured


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall of generated samples, in [0, 1].

    Attributes:
        precision: share of fake samples that lie on the manifold of the real ones (fidelity).
        recall: share of real samples that lie on the manifold of the fake ones (diversity).
    """

    precision: float
    recall: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, *, chunk: int = 1024) -> PrecisionRecall:
    """Return improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2).

    The manifold of a set is the union of balls around its members, each with the distance to the member's k-th nearest
    neighbour in the set as radius. Both numbers depend on the sizes of the sets: compare them only for equal sizes.

    Args:
        real: features [N, D], N > k.
        fake: features [M, D], M > k.
        k: the radius is the distance to the k-th nearest neighbour.
        chunk: rows of the distance matrix at a time.

    Raises:
        ValueError: k < 1, or the features differ in width, are not finite, or there are no more than k.

    Examples:
        >>> real = torch.arange(8.0).unsqueeze(1)
        >>> precision_recall(real, real[:4])  # half of the data, well drawn
        PrecisionRecall(precision=1.0, recall=0.875)
    """
    precision, recall = measured_precision_recall(real, fake, k, chunk=chunk)
    return PrecisionRecall(precision.value, recall.value)


def measured_precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, *, chunk: int = 1024
) -> tuple[Measured, Measured]:
    """Return precision, measured over the fake samples, and recall, measured over the real ones.

    The manifolds are fixed: the standard error of precision is over fake samples before one real manifold, that of
    recall over real samples before the manifold of one set of fake ones. Differences of two models' recall are paired
    by real sample.

    Args, Raises: as for `precision_recall`.

    Examples:
        >>> real = torch.arange(8.0).unsqueeze(1)
        >>> precision, recall = measured_precision_recall(real, real[:4])
        >>> (precision.value, precision.n, precision.over), (recall.value, recall.n, recall.over)
        ((1.0, 4, 'generated'), (0.875, 8, 'real'))
    """
    real, fake = _centred(real, fake, k)
    precision = _covered(fake, real, _radii(real, k, chunk), chunk)
    recall = _covered(real, fake, _radii(fake, k, chunk), chunk)
    return Measured.mean(precision), Measured.mean(recall, over="real")


def density_coverage(real: Tensor, fake: Tensor, k: int = 5, *, chunk: int = 1024) -> tuple[Measured, Measured]:
    """Return density, measured over the fake samples, and coverage, measured over the real ones.

    See Naeem et al. 2020, sec. 3. Around each real sample lies a ball to its k-th nearest other real sample. Density
    is the number of balls that a fake sample lies in, over k; for equal distributions its expectation is 1, and it may
    exceed 1. Coverage is the share of the balls that hold a fake sample; for equal distributions its expectation is 1 -
    prod_{i=1..k} (N - i) / (N + M - i). One outlier's large ball decides the precision of a sample, and adds 1/k to its
    density. As in the authors' `prdc`, what lies on the surface of a ball is outside, unlike in `precision_recall`.

    Args:
        real: features [N, D], N > k.
        fake: features [M, D], M > k.
        k: the radius is the distance to the k-th nearest neighbour.
        chunk: rows of the distance matrix at a time.

    Raises:
        ValueError: as for `precision_recall`.

    Examples:
        >>> real = torch.arange(12.0).unsqueeze(1)
        >>> density, coverage = density_coverage(real, torch.full((12, 1), 5.1))  # one and the same sample
        >>> round(coverage.value, 2), density.value > 0.5
        (0.5, True)
    """
    real, fake = _centred(real, fake, k)
    radii = _radii(real, k, chunk)
    balls = []
    reached = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in _rows(fake, len(real), chunk):
        inside = torch.cdist(rows, real) < radii
        balls.append(inside.sum(1))
        reached |= inside.any(0)
    return Measured.mean(torch.cat(balls).double() / k), Measured.mean(reached, over="real")


def _centred(real: Tensor, fake: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return both in float64 around the origin, after checking them."""
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    real, fake = checked_pair(real, fake, least=k + 1)
    centre = real.mean(0)  # cdist computes |x|^2 - 2 x.y + |y|^2, which cancels badly far from the origin
    return real - centre, fake - centre


def _radii(x: Tensor, k: int, chunk: int) -> Tensor:
    """Return the distance of each member to its k-th nearest other member, [N]."""
    parts = []
    start = 0
    for part in _rows(x, len(x), chunk):
        distances = torch.cdist(part, x)
        rows = torch.arange(len(part), device=x.device)
        distances[rows, start + rows] = math.inf  # the distance of a member to itself
        start += len(part)
        parts.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(parts)


def _covered(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> Tensor:
    """Return whether each of `points` is within the radius of any of `centres`, bool [N]."""
    return torch.cat([(torch.cdist(rows, centres) <= radii).any(1) for rows in _rows(points, len(centres), chunk)])


def _rows(x: Tensor, columns: int, chunk: int) -> tuple[Tensor, ...]:
    """Return the members in parts of `chunk`, or of fewer where a part's distance matrix would exceed 128 MB."""
    return x.split(max(1, min(chunk, (1 << 24) // columns)))
