"""The Frechet distance of two sets of features, and how each member of a set moves it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureMoments:
    """The count, mean and scatter of features, float64; the sum of two is the moments of both sets together.

    Attributes:
        count: number of feature vectors.
        mean: [D].
        scatter: sum of outer products of deviations from the mean, [D, D].

    Examples:
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [5.0]])
        >>> both = FeatureMoments.of(features[:2]) + FeatureMoments.of(features[2:])
        >>> both.count, both.mean.tolist(), abs(both.covariance.item() - features.var().item()) < 1e-5
        (4, [2.0], True)
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureMoments:
        """Return the moments of features [N, D], N >= 1."""
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        """Return the moments of both sets together (Chan, Golub & LeVeque 1983)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * other.count / count)
        return FeatureMoments(count, self.mean + shift * (other.count / count), scatter)

    @property
    def covariance(self) -> Tensor:
        """Return the unbiased covariance [D, D]; needs count >= 2."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """Return |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2}) (Dowson & Landau 1982; FID: Heusel et al. 2017).

    It is biased upwards by about b/n, so report the counts with it. The trace of the root is computed as the sum of the
    square roots of the eigenvalues of C_a^{1/2} C_b C_a^{1/2}, which is symmetric and therefore stable for
    rank-deficient covariances.

    Examples:
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
        >>> a, b = FeatureMoments.of(features), FeatureMoments.of(features + 2)
        >>> round(frechet_distance(a, b), 6)  # the means are 2 apart in both dimensions
        8.0
    """
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


@dataclass(frozen=True, eq=False)
class FrechetInfluence:
    """The Frechet distance to a fixed reference, and the influence of each member of the set on it, in parts.

    In the direction of a member x the mean moves by d = x - mean and the covariance C by d d^T - C. The gradient of the
    distance is 2 (mean - mean_r) with respect to the mean, and I - T with respect to C, where T = C_r^{1/2} (C_r^{1/2}
    C C_r^{1/2})^{-1/2} C_r^{1/2} maps N(0, C) optimally to N(0, C_r): the gradient of tr(M^{1/2}) is M^{-1/2} / 2. So
    the influence of x is 2 (mean - mean_r).d + d^T (I - T) d less the mean over all (Rippl, Munk & Sturm 2016, "Limit
    laws of the empirical Wasserstein distance: Gaussian distributions"; influence functions: Hampel 1974). The inverse
    is a pseudo-inverse where dimensions have no variance, such as dead ReLUs, or the set has no more than D members:
    where C has no variance no member deviates, and where C_r has none T is 0. Many features are processed in parts::

        parts = FrechetInfluence.of(reference, moments)
        measured = Measured(parts.distance, torch.cat([parts(chunk) for chunk in chunks]))

    The interval is around the expectation of the distance at this n, which is greater by about b/n than that of
    infinitely many samples. Where the distance itself is hardly more than this bias, the first order vanishes and the
    standard error is too large: 1.5 times at a distance of 0.

    Attributes:
        distance: of the moments to the reference, `frechet_distance`.
    """

    distance: float
    _mean: Tensor
    _to_mean: Tensor
    _to_covariance: Tensor
    _level: float

    @classmethod
    def of(cls, reference: FeatureMoments, moments: FeatureMoments) -> FrechetInfluence:
        """Return the influence of the members of the set with these moments; two eigenvalue problems of size D."""
        fixed, covariance = reference.covariance, moments.covariance
        values, vectors = torch.linalg.eigh(fixed)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        values, vectors = torch.linalg.eigh(root @ covariance @ root)
        values = values.clamp(min=0)
        # Below this an eigenvalue is rounding, as in numpy.linalg.pinv.
        alive = values > values.max() * len(values) * torch.finfo(torch.float64).eps
        carried = root @ vectors[:, alive] * values[alive].pow(-0.25)
        to_covariance = torch.eye(len(values), dtype=torch.float64, device=fixed.device) - carried @ carried.T
        to_mean = 2 * (moments.mean - reference.mean)
        level = (to_covariance * moments.scatter).sum().item() / moments.count
        return cls(frechet_distance(reference, moments), moments.mean, to_mean, to_covariance, level)

    def __call__(self, features: Tensor) -> Tensor:
        """Return the influence of members with features [n, D], float64 [n]; its mean over the whole set is 0."""
        deviations = features.double() - self._mean
        return deviations @ self._to_mean + (deviations @ self._to_covariance * deviations).sum(1) - self._level


def frechet_influence(reference: FeatureMoments, moments: FeatureMoments, features: Tensor) -> Tensor:
    """Return the influence of members with features [n, D] on the Frechet distance to the reference, float64 [n].

    `moments` are those of the whole set, of which `features` may be a part. For many parts, solve the eigenvalue
    problems once: `FrechetInfluence`.

    Examples:
        >>> features = torch.tensor([[0.0], [1.0], [5.0]])
        >>> reference = FeatureMoments.of(torch.tensor([[0.0], [1.0], [2.0]]))
        >>> influence = frechet_influence(reference, FeatureMoments.of(features), features)
        >>> abs(influence.mean().item()) < 1e-9, influence.argmax().item()
        (True, 2)
    """
    return FrechetInfluence.of(reference, moments)(features)
