"""Scores of sets of images, computed from features in float64, and their confidence intervals.

Frechet distance, KID and precision/recall compare features [N, D] of an evaluator network. The inception score uses its
class probabilities. `bootstrap` gives a confidence interval for any of them.
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
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


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
    a, b = _feature_pair(a, b, least=2)

    def kernel_sum(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([(rows @ y.T / y.shape[1] + 1).pow(3).sum() for rows in x.split(chunk)]).sum()

    def mean_of_pairs(x: Tensor) -> Tensor:
        diagonal = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
        return (kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

    return (mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel_sum(a, b) / (len(a) * len(b))).item()


def inception_score(probabilities: Tensor) -> float:
    """Return exp E_x KL(p(y | x) || p(y)), in [1, C] (Salimans et al. 2016, sec. 4), over all images, without splits.

    Args:
        probabilities: p(y | x) [N, C] of N >= 2 images.

    Raises:
        ValueError: there are fewer than 2 images, or a row is not a probability distribution.
    """
    if probabilities.dim() != 2 or len(probabilities) < 2:
        raise ValueError(f"probabilities must be [N, C] with N >= 2, got {tuple(probabilities.shape)}")
    p = probabilities.double()
    total = p.sum(1, keepdim=True)
    if not bool((p >= 0).all()) or not bool(((total - 1).abs() < 1e-3).all()):
        raise ValueError("probabilities must be >= 0 and sum to 1 over each row: pass the softmax of the logits")
    p = p / total
    # xlogy has 0 log 0 = 0, and p(y) is 0 only where p(y | x) is 0 for every x.
    divergence = torch.special.xlogy(p, p).sum(1) - torch.special.xlogy(p, p.mean(0)).sum(1)
    return math.exp(divergence.mean().item())


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
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    real, fake = _feature_pair(real, fake, least=k + 1)
    centre = real.mean(0)  # cdist computes |x|^2 - 2 x.y + |y|^2, which cancels badly far from the origin
    real, fake = real - centre, fake - centre
    precision = _share_covered(fake, real, _radii(real, k, chunk), chunk)
    return PrecisionRecall(precision, _share_covered(real, fake, _radii(fake, k, chunk), chunk))


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


def _share_covered(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    """Return the share of `points` within the radius of any of `centres`."""
    covered = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(chunk)]
    return torch.cat(covered).double().mean().item()
