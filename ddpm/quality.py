"""Scores of sets of images, computed from features in float64, and their confidence intervals.

Frechet distance, KID, precision, recall, density and coverage compare features [N, D] of an evaluator network. The
inception score uses its class probabilities. The functions `measure_…` return a score with the influence of each image
on it, from which its standard error follows; `bootstrap` gives a confidence interval for any statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

    It is biased upwards for few samples, so report the counts with it. The trace of the root is computed as the sum of
    the square roots of the eigenvalues of C_a^{1/2} C_b C_a^{1/2}, which is symmetric and therefore stable for
    rank-deficient covariances.
    """
    cov_a, cov_b = a.covariance, b.covariance
    root_a = _root(cov_a)
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


@dataclass(frozen=True, eq=False)
class Measured:
    """A score with the first-order influence of each image on it (von Mises 1947; Hampel 1974).

    Dropping image i changes the score by about -influence[i] / N. The score of N images therefore has the variance
    var(influence) / N around its expectation at this N. For two scores that are paired, such as those of two models
    with the same labels and noise, the influences of the difference are the differences of the influences.

    Attributes:
        value: the score.
        influence: of each generated image on it (of each real one for recall and coverage, which are means over real
            images), float64 [N], with mean 0.
    """

    value: float
    influence: Tensor

    @property
    def standard_error(self) -> float:
        """The standard deviation of the score over sets of N images, to first order."""
        return (self.influence.std() / math.sqrt(len(self.influence))).item()


def frechet_influence(reference: FeatureMoments, moments: FeatureMoments, features: Tensor) -> Tensor:
    """Return the influence of images on the Frechet distance of their set to a fixed reference, float64 [n].

    The distance has the derivatives 2 (mu - mu_r) by the mean and I - T by the covariance C, where T = C_r^{1/2}
    (C_r^{1/2} C C_r^{1/2})^{-1/2} C_r^{1/2} is the optimal transport from N(0, C) to N(0, C_r) (Takatsu 2011, sec. 2).
    Directions in which neither set varies have no influence.

    Args:
        moments: of the whole set.
        features: of some images of it, [n, D]; the influence of one does not depend on which others are passed.
    """
    root = _root(reference.covariance)
    values, vectors = torch.linalg.eigh(root @ moments.covariance @ root)
    least = values.max().clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(values > least, values.clamp(min=least).rsqrt(), 0.0)
    transport = root @ (vectors * inverse) @ vectors.T @ root
    by_covariance = torch.eye(len(root), dtype=root.dtype) - transport
    centred = features.double() - moments.mean
    linear = 2 * (centred @ (moments.mean - reference.mean))
    quadratic = ((centred @ by_covariance) * centred).sum(1)
    return linear + quadratic - (by_covariance * moments.scatter / moments.count).sum()


def measure_frechet(reference: FeatureMoments, features: Tensor) -> Measured:
    """Return the Frechet distance of a set of images to a fixed reference; see `frechet_distance`.

    Its bias, which shrinks as 1/N, is not part of the standard error: the interval is around the expectation at this N.
    """
    moments = FeatureMoments.of(features)
    return Measured(frechet_distance(reference, moments), frechet_influence(reference, moments, features))


def _root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def kid(a: Tensor, b: Tensor, *, chunk: int = 1024) -> float:
    """Return the kernel inception distance, the unbiased MMD^2 with k(x, y) = (x.y / D + 1)^3.

    See Binkowski et al. 2018, eq. 4. For equal distributions its expectation is 0 at every sample size, so it may be
    negative.

    Args:
        a: features [N, D], N >= 2.
        b: features [M, D], M >= 2.
        chunk: rows of the kernel matrix at a time.

    Raises:
        ValueError: the features differ in width, are not finite, or are too few.
    """
    return measure_kid(a, b, chunk=chunk).value


def measure_kid(real: Tensor, fake: Tensor, *, chunk: int = 1024) -> Measured:
    """Return the kernel distance of generated images to fixed real ones; arguments and errors are those of `kid`."""
    real, fake = _feature_pair(real, fake, least=2)

    def means(x: Tensor, y: Tensor, *, same: bool) -> Tensor:
        """Return the mean of k(x_i, y_j) over j for each i; over j != i for a set and itself."""
        sums = torch.cat([(rows @ y.T / y.shape[1] + 1).pow(3).sum(1) for rows in x.split(chunk)])
        if same:
            sums = sums - (x.square().sum(1) / x.shape[1] + 1).pow(3)
        return sums / (len(y) - same)

    within, across = means(fake, fake, same=True), means(fake, real, same=False)
    value = means(real, real, same=True).mean() + within.mean() - 2 * across.mean()
    # An image is in two places of each pair of its own set.
    influence = 2 * (within - across)
    return Measured(value.item(), influence - influence.mean())


def inception_score(probabilities: Tensor) -> float:
    """Return exp E_x KL(p(y | x) || p(y)), in [1, C] (Salimans et al. 2016, sec. 4), over all images, without splits.

    Args:
        probabilities: p(y | x) [N, C] of N >= 2 images.

    Raises:
        ValueError: there are fewer than 2 images, or a row is not a probability distribution.
    """
    return measure_inception_score(probabilities).value


def measure_inception_score(probabilities: Tensor) -> Measured:
    """Return the inception score; argument and errors are those of `inception_score`."""
    if probabilities.dim() != 2 or len(probabilities) < 2:
        raise ValueError(f"probabilities must be [N, C] with N >= 2, got {tuple(probabilities.shape)}")
    p = probabilities.double()
    total = p.sum(1, keepdim=True)
    if not bool((p >= 0).all()) or not bool(((total - 1).abs() < 1e-3).all()):
        raise ValueError("probabilities must be >= 0 and sum to 1 over each row: pass the softmax of the logits")
    p = p / total
    # xlogy has 0 log 0 = 0, and p(y) is 0 only where p(y | x) is 0 for every x.
    divergence = torch.special.xlogy(p, p).sum(1) - torch.special.xlogy(p, p.mean(0)).sum(1)
    value = math.exp(divergence.mean().item())
    # The derivative by p(y) vanishes, because p(y) is the mean of p(y | x).
    return Measured(value, value * (divergence - divergence.mean()))


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
    """
    precision, recall = measure_precision_recall(real, fake, k, chunk=chunk)
    return PrecisionRecall(precision.value, recall.value)


def measure_precision_recall(real: Tensor, fake: Tensor, k: int = 3, *, chunk: int = 1024) -> tuple[Measured, Measured]:
    """Return precision and recall; arguments and errors are those of `precision_recall`."""
    real, fake = _manifolds(real, fake, k)
    precise = _times_covered(fake, real, _radii(real, k, chunk), chunk) > 0
    recalled = _times_covered(real, fake, _radii(fake, k, chunk), chunk) > 0
    return _mean(precise), _mean(recalled)


@dataclass(frozen=True)
class DensityCoverage:
    """Density and coverage of generated samples.

    Attributes:
        density: how many balls around real samples a fake sample lies in, over k; about 1 for equal distributions, and
            above 1 where the fake samples crowd where the real ones are dense.
        coverage: share of real samples, 0..1, whose ball has a fake sample in it.
    """

    density: float
    coverage: float


def density_coverage(real: Tensor, fake: Tensor, k: int = 5, *, chunk: int = 1024) -> DensityCoverage:
    """Return density and coverage (Naeem et al. 2020, eq. 2 and 3), in which only real samples have balls.

    So one outlier among the fake samples covers nothing. The ball of a real sample has the distance to its k-th nearest
    other real sample as radius. For equal distributions of equal sizes the coverage is 1 - 2^-k (eq. 6).

    Args:
        real: features [N, D], N > k.
        fake: features [M, D], M > k.
        k: the radius is the distance to the k-th nearest neighbour.
        chunk: rows of the distance matrix at a time.

    Raises:
        ValueError: as for `precision_recall`.
    """
    density, coverage = measure_density_coverage(real, fake, k, chunk=chunk)
    return DensityCoverage(density.value, coverage.value)


def measure_density_coverage(real: Tensor, fake: Tensor, k: int = 5, *, chunk: int = 1024) -> tuple[Measured, Measured]:
    """Return density and coverage; arguments and errors are those of `density_coverage`."""
    real, fake = _manifolds(real, fake, k)
    radii = _radii(real, k, chunk)
    density = _times_covered(fake, real, radii, chunk) / k
    nearest = torch.cat([torch.cdist(rows, fake).amin(1) for rows in real.split(chunk)])
    return _mean(density), _mean(nearest <= radii)


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        value: the statistic of all samples.
        low: lower end of the confidence interval.
        high: upper end.
        n: size of each sample.
    """

    value: float
    low: float
    high: float
    n: tuple[int, ...]


def bootstrap(
    statistic: Callable[..., float], *samples: Tensor, draws: int, seed: int, level: float = 0.95
) -> Interval:
    """Return the reflected confidence interval [2 v - q_high, 2 v - q_low] from random halves of the samples.

    v is the statistic of the whole samples and q are quantiles over `halves`. If v has a bias of b/n, as Frechet
    distances have, the halves differ from v by the same b/n, so the reflected interval is around the value for
    infinitely many samples. Therefore v may lie outside the interval, and the interval may exceed the range of the
    statistic. Resampling with replacement would be wrong here: `kid` would count pairs of a member and its copy. The
    bias of precision and recall is not of the form b/n: keep the manifold fixed, as in `bootstrap(lambda part:
    precision_recall(real, part).precision, fake, ...)`. For paired data, such as images of two samplers from the same
    noise, pass one sample with the pairs stacked along the second axis.

    Args:
        statistic: maps tensors like `samples` to a number.
        samples: [N_i, ...] each, at least 2 members, halved along the first axis.
        draws: number of random halves, at least 2 / (1 - level), so that the quantiles are not just the extremes.
        seed: seed of the draws.
        level: confidence level, in (0, 1).

    Raises:
        ValueError: there are no samples, a sample has fewer than 2 members, or `draws` or `level` is out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    least = math.ceil(round(2 / (1 - level), 6))
    if draws < least:
        raise ValueError(f"draws must be >= {least} for level={level}, got {draws}")
    sizes = _sizes(samples)
    value = float(statistic(*samples))
    repeats = halves(statistic, *samples, draws=draws, seed=seed)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = repeats.quantile(tails).tolist()
    return Interval(value, 2 * value - high, 2 * value - low, sizes)


def halves(statistic: Callable[..., float], *samples: Tensor, draws: int, seed: int) -> Tensor:
    """Return the statistic of random halves of the samples, each halved independently without replacement, [draws].

    The difference between a half and the whole has the same variance, 1/(n/2) - 1/n = 1/n, as the difference between
    the whole and the truth, so the standard deviation of the halves is the standard error of the statistic (delete-half
    jackknife, Shao & Wu 1989). The same seed selects the same halves of samples of the same sizes, so differences
    between two results are paired.

    Raises:
        ValueError: there are no samples, or a sample has fewer than 2 members.
    """
    _sizes(samples)
    generator = torch.Generator().manual_seed(seed)

    def half(sample: Tensor) -> Tensor:
        return sample[torch.randperm(len(sample), generator=generator)[: len(sample) // 2].to(sample.device)]

    repeats = [float(statistic(*(half(sample) for sample in samples))) for _ in range(draws)]
    return torch.tensor(repeats, dtype=torch.float64)


def _sizes(samples: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Return the size of each sample, after checking that it can be halved."""
    sizes = tuple(len(sample) for sample in samples)
    if not sizes or min(sizes) < 2:
        raise ValueError(f"a bootstrap needs one sample or more, of at least 2 members each, got sizes {list(sizes)}")
    return sizes


def _feature_pair(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Return both in float64, after checking their shapes and values."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < least:
        raise ValueError(f"need at least {least} feature vectors in each set, got {len(a)} and {len(b)}")
    if not bool(a.isfinite().all()) or not bool(b.isfinite().all()):
        raise ValueError("features must be finite: the images or the evaluator network overflowed")
    return a.double(), b.double()


def _radii(x: Tensor, k: int, chunk: int) -> Tensor:
    """Return the distance of each member to its k-th nearest other member, [N]."""
    parts = []
    for start in range(0, len(x), chunk):
        distances = torch.cdist(x[start : start + chunk], x)
        rows = torch.arange(len(distances), device=x.device)
        distances[rows, start + rows] = math.inf  # the distance of a member to itself
        parts.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(parts)


def _times_covered(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> Tensor:
    """Return within how many of the radii around `centres` each of `points` lies, [N]."""
    return torch.cat([(torch.cdist(rows, centres) <= radii).sum(1) for rows in points.split(chunk)])


def _manifolds(real: Tensor, fake: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return both in float64 and centred, after checking that each has neighbours."""
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    real, fake = _feature_pair(real, fake, least=k + 1)
    centre = real.mean(0)  # cdist computes |x|^2 - 2 x.y + |y|^2, which cancels badly far from the origin
    return real - centre, fake - centre


def _mean(values: Tensor) -> Measured:
    """Return the mean of a value for each image."""
    values = values.double()
    return Measured(values.mean().item(), values - values.mean())
