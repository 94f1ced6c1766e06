"""Confidence intervals of statistics: from the influence of each sample, or from random halves of the samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor


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


@dataclass(frozen=True, eq=False)
class Measured:
    """A score with the first-order influence of each sample on it, from which standard errors follow.

    The difference between the score and its expectation at this n is about the mean of N independent influences, so its
    standard error is their standard deviation over sqrt(N) (the infinitesimal jackknife, Jaeckel 1972; Efron 1982). The
    influence is over the samples of one set, while everything else that the score compares them with is fixed.
    Statistics with a bias of b/n keep it: compare only scores of the same n.

    Attributes:
        value: the score.
        influence: how much each sample moves the score, times N, float64 [N] with mean 0.
        over: the set whose samples are meant: recall and coverage are averages over real images.

    Examples:
        >>> right = Measured.mean(torch.tensor([1.0, 0.0, 1.0, 1.0]))
        >>> right.value, right.standard_error
        (0.75, 0.25)
        >>> (right - right).standard_error  # what pairs have in common cancels
        0.0
    """

    value: float
    influence: Tensor
    over: Literal["generated", "real"] = "generated"

    @classmethod
    def mean(cls, values: Tensor, over: Literal["generated", "real"] = "generated") -> Measured:
        """Return the mean of a value of each sample [N], such as whether its class is right."""
        values = values.double()
        return cls(values.mean().item(), values - values.mean(), over)

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.influence)

    @property
    def standard_error(self) -> float:
        """The standard deviation of the score over new samples.

        Raises:
            ValueError: there are fewer than 2 samples.
        """
        if self.n < 2:
            raise ValueError(f"a standard error needs at least 2 samples, got {self.n}")
        return self.influence.std().item() / self.n**0.5

    def interval(self, level: float = 0.95) -> Interval:
        """Return the normal confidence interval, around the expectation of the score at this n.

        It may exceed the range of the score, and is too narrow for shares of a few samples in N or of all but a few.

        Raises:
            ValueError: the level is not in (0, 1), or there are fewer than 2 samples.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be in (0, 1), got {level}")
        half = NormalDist().inv_cdf((1 + level) / 2) * self.standard_error
        return Interval(self.value, self.value - half, self.value + half, (self.n,))

    def __sub__(self, other: Measured) -> Measured:
        """Return the difference of two scores paired by sample: the i-th of both have the same label and noise.

        What the pairs have in common cancels. Where they have nothing in common, this is still right.

        Raises:
            ValueError: the numbers of samples differ, or the scores are over different sets.
        """
        if (self.n, self.over) != (other.n, other.over):
            raise ValueError(
                f"a paired difference needs the same samples, got {self.n} {self.over} and {other.n} {other.over} ones"
            )
        return Measured(self.value - other.value, self.influence - other.influence, self.over)


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

    Examples:
        >>> found = bootstrap(lambda part: part.mean().item(), torch.arange(100.0), draws=200, seed=0)
        >>> found.value, found.low < 49.5 < found.high, found.n
        (49.5, True, (100,))
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

    Examples:
        >>> values = torch.arange(100.0)
        >>> spread = halves(lambda part: part.mean().item(), values, draws=1000, seed=0).std().item()
        >>> abs(spread / (values.std().item() / 10) - 1) < 0.1  # the standard error of the mean
        True
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
