"""Scores that are means over images or pairs of them: kernel inception distance, inception score, diversity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm.quality.features import checked_pair
from ddpm.quality.intervals import Measured


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

    Examples:
        >>> a = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> kid(a, a + 5) > kid(a, a + 1) > kid(a, a)
        True
    """
    return measured_kid(a, b, chunk=chunk).value


def measured_kid(real: Tensor, fake: Tensor, *, chunk: int = 1024) -> Measured:
    """Return `kid` with the influence of each fake image; the real images are fixed.

    The influence is the first-order projection of the U-statistic (Hoeffding 1948): twice the mean kernel of the image
    with the other fake ones less twice that with the real ones, less the mean of the whole.

    Args:
        real: features [N, D], N >= 2.
        fake: features [M, D], M >= 2.
        chunk: rows of the kernel matrix at a time.

    Raises:
        ValueError: as for `kid`.

    Examples:
        >>> real, fake = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [9.0]])
        >>> found = measured_kid(real, fake)
        >>> found.value == kid(real, fake), abs(found.influence.mean().item()) < 1e-9
        (True, True)
    """
    real, fake = checked_pair(real, fake, least=2)

    def kernel_sums(x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of each row of the kernel matrix."""
        return torch.cat([(rows @ y.T / y.shape[1] + 1).pow(3).sum(1) for rows in x.split(chunk)])

    def means_of_others(x: Tensor) -> Tensor:
        itself = (x.square().sum(1) / x.shape[1] + 1).pow(3)
        return (kernel_sums(x, x) - itself) / (len(x) - 1)

    among_fake, to_real = means_of_others(fake), kernel_sums(fake, real) / len(real)
    value = (means_of_others(real).mean() + among_fake.mean() - 2 * to_real.mean()).item()
    parts = 2 * (among_fake - to_real)
    return Measured(value, parts - parts.mean())


def inception_score(probabilities: Tensor) -> float:
    """Return exp E_x KL(p(y | x) || p(y)), in [1, C] (Salimans et al. 2016, sec. 4), over all images, without splits.

    Args:
        probabilities: p(y | x) [N, C] of N >= 2 images.

    Raises:
        ValueError: there are fewer than 2 images, or a row is not a probability distribution.

    Examples:
        >>> round(inception_score(torch.eye(10)), 6), round(inception_score(torch.full((10, 10), 0.1)), 6)
        (10.0, 1.0)
    """
    return measured_inception_score(probabilities).value


def measured_inception_score(probabilities: Tensor) -> Measured:
    """Return `inception_score` with the influence of each image: the score times KL(p(y | x) || p(y)) less its mean.

    Args, Raises: as for `inception_score`.

    Examples:
        >>> found = measured_inception_score(torch.eye(10))
        >>> round(found.value, 6), round(found.standard_error, 6)  # all images are alike in what they add
        (10.0, 0.0)
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
    score = math.exp(divergence.mean().item())
    return Measured(score, score * (divergence - divergence.mean()))


def measured_diversity(features: Tensor, labels: Tensor | None = None) -> Measured:
    """Return the mean squared distance between two images of the same class, averaged over the images.

    It is 0 where a model draws one and the same image for each class. For a class with features x_1 .. x_n the mean
    over its pairs is 2 n / (n - 1) times the mean of |x_i - mean|^2, so each image has its own part in it.

    Args:
        features: [N, D].
        labels: class of each image, int64 [N]; all are one class where None. Classes of a single image are left out.

    Raises:
        ValueError: no class has two images.

    Examples:
        >>> features = torch.tensor([[0.0], [2.0], [7.0], [7.0]])
        >>> measured_diversity(features, torch.tensor([0, 0, 1, 1])).value  # (2 - 0)^2 and 0, averaged
        2.0
    """
    features = features.double()
    groups = (torch.zeros(len(features)) if labels is None else labels).long().to(features.device)
    count = int(groups.max()) + 1 if len(groups) else 0
    sizes = torch.bincount(groups, minlength=count).double()
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, groups, features)
    centres = sums / sizes.clamp(min=1).unsqueeze(1)
    paired = sizes[groups] > 1
    if not bool(paired.any()):
        raise ValueError(f"diversity needs a class of at least 2 images, got {len(features)} images of {count} classes")
    factor = 2 * sizes / (sizes - 1).clamp(min=1)
    return Measured.mean((factor[groups] * (features - centres[groups]).square().sum(1))[paired])
