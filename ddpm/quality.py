"""How close two sets of images are, from their features, and how sure of it we may be; all in float64.

Frechet distance, KID and precision/recall compare features [N, D] of an evaluator network, the inception score looks at
its class probabilities, and `bootstrap` puts an interval round any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


def kid(a: Tensor, b: Tensor, *, chunk: int = 1024) -> float:
    """Kernel inception distance (Binkowski et al. 2018, eq. 4): unbiased MMD^2 with k(x, y) = (x.y / D + 1)^3.

    Its expectation is 0 for equal distributions at every sample size, so it may come out below 0.

    Args:
        a: features [N, D], N >= 2.
        b: features [M, D], M >= 2.
        chunk: rows of the kernel matrix at a time.

    Raises:
        ValueError: features of unlike width, not finite, or too few of them.
    """
    a, b = _feature_pair(a, b, least=2)

    def kernel_sum(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([(rows @ y.T / y.shape[1] + 1).pow(3).sum() for rows in x.split(chunk)]).sum()

    def mean_of_pairs(x: Tensor) -> Tensor:
        diagonal = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
        return (kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

    return (mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel_sum(a, b) / (len(a) * len(b))).item()


def inception_score(probabilities: Tensor) -> float:
    """exp E_x KL(p(y | x) || p(y)), in [1, C] (Salimans et al. 2016, sec. 4), over all images at once, not over splits.

    Args:
        probabilities: p(y | x) [N, C] of N >= 2 images.

    Raises:
        ValueError: fewer than 2 images, or rows that are not probabilities.
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
    """Both in [0, 1].

    Attributes:
        precision: share of fake samples that lie on the manifold of the real ones: their fidelity.
        recall: share of real samples that lie on the manifold of the fake ones: their variety.
    """

    precision: float
    recall: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, *, chunk: int = 1024) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2).

    The manifold of a set is the union of balls round its members, each reaching to the member's k-th nearest neighbour
    in the set. Both numbers depend on the sizes of the sets: compare only at equal ones.

    Args:
        real: features [N, D], N > k.
        fake: features [M, D], M > k.
        k: which neighbour.
        chunk: rows of the distance matrix at a time.

    Raises:
        ValueError: k < 1, features of unlike width, not finite, or not more than k of them.
    """
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    real, fake = _feature_pair(real, fake, least=k + 1)
    centre = real.mean(0)  # far from the origin |x|^2 - 2 x.y + |y|^2, which cdist computes, cancels badly
    real, fake = real - centre, fake - centre
    precision = _share_covered(fake, real, _radii(real, k, chunk), chunk)
    return PrecisionRecall(precision, _share_covered(real, fake, _radii(fake, k, chunk), chunk))


@dataclass(frozen=True)
class Interval:
    """An estimate and how far to trust it.

    Attributes:
        value: the statistic of the samples as they are.
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
    """Confidence interval from random halves of the samples, reflected: [2 v - q_high, 2 v - q_low].

    v is the statistic of the whole and q are quantiles over `halves`. Where v is biased by b/n, as Frechet distances
    are, the halves are off from v by just that: the reflected interval is about the value of infinitely many samples.
    Hence v need not lie inside, and an end may pass a bound that the statistic has. Redrawing with replacement would
    not do here: a copy makes a pair with its original, which `kid` must not count. Precision and recall change with
    n, but not by b/n: hold the manifold fixed, as in `bootstrap(lambda part: precision_recall(real, part).precision,
    fake, ...)`. What belongs together, such as the same noise under two samplers, goes into one sample, stacked along
    the second axis.

    Args:
        statistic: maps tensors like `samples` to a number.
        samples: [N_i, ...] each, at least 2 members, halved along the first axis.
        draws: number of halves, at least 2 / (1 - level), so that the quantiles are not just the extremes.
        seed: of the draws.
        level: of confidence, in (0, 1).

    Raises:
        ValueError: no samples, fewer than 2 members, or `draws` or `level` out of range.
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
    """The statistic of random halves of the samples, drawn without replacement, every sample for itself; [draws].

    A half's deviation from the whole has the variance of the whole's from the truth, 1/(n/2) - 1/n = 1/n, so that their
    standard deviation is the statistic's standard error (the delete-half jackknife: Shao & Wu 1989). The same seed
    takes the same halves of samples of the same sizes: differences of what two of them give are paired.

    Raises:
        ValueError: no samples, or fewer than 2 members.
    """
    _sizes(samples)
    generator = torch.Generator().manual_seed(seed)

    def half(sample: Tensor) -> Tensor:
        return sample[torch.randperm(len(sample), generator=generator)[: len(sample) // 2].to(sample.device)]

    repeats = [float(statistic(*(half(sample) for sample in samples))) for _ in range(draws)]
    return torch.tensor(repeats, dtype=torch.float64)


def _sizes(samples: tuple[Tensor, ...]) -> tuple[int, ...]:
    """How many each sample holds; enough to halve them."""
    sizes = tuple(len(sample) for sample in samples)
    if not sizes or min(sizes) < 2:
        raise ValueError(f"a bootstrap needs one sample or more, of at least 2 members each, got sizes {list(sizes)}")
    return sizes


def _feature_pair(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both in float64, checked."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < least:
        raise ValueError(f"need at least {least} feature vectors in each set, got {len(a)} and {len(b)}")
    if not bool(a.isfinite().all()) or not bool(b.isfinite().all()):
        raise ValueError("features must be finite: the images or the evaluator network overflowed")
    return a.double(), b.double()


def _radii(x: Tensor, k: int, chunk: int) -> Tensor:
    """Distance of each member to its k-th nearest other member, [N]."""
    parts = []
    for start in range(0, len(x), chunk):
        distances = torch.cdist(x[start : start + chunk], x)
        rows = torch.arange(len(distances), device=x.device)
        distances[rows, start + rows] = math.inf  # itself
        parts.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(parts)


def _share_covered(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    """Share of `points` within the radius of any of `centres`."""
    covered = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(chunk)]
    return torch.cat(covered).double().mean().item()
