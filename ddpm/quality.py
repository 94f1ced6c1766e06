"""How close two sets of images are, from their features: Frechet distance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureMoments:
    """Streaming count, mean and scatter of features, float64; moments of parts add up to those of the whole.

    Attributes:
        count: number of feature vectors.
        mean: [D].
        scatter: sum of outer products of deviations from the mean, [D, D].
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureMoments:
        """Moments of features [N, D], N >= 1."""
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        """Moments of both sets together (Chan, Golub & LeVeque 1983)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * other.count / count)
        return FeatureMoments(count, self.mean + shift * (other.count / count), scatter)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D]; needs count >= 2."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2}) (Dowson & Landau 1982; FID of Heusel et al. 2017).

    Biased upwards by few samples, so report the counts with it. The trace of the root is taken as the sum of the roots
    of the eigenvalues of C_a^{1/2} C_b C_a^{1/2}, symmetric and therefore stable for rank-deficient covariances.
    """
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)
