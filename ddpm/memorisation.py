"""Memorisation: are generated images copies of training images?

A search (`pixel_neighbours`, `feature_neighbours`) finds the training images nearest to each image, and `memorisation`
compares what it found for generated images with what it found for real images that were held out of the training::

    samples = pixel_neighbours(generated, training)
    found = memorisation(samples, pixel_neighbours(held_out, training))
    samples.closest(8)  # for a picture
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray[Any, Any]
_BYTES = 1 << 26  # of one operand of a product; the search holds about three of them


@dataclass(frozen=True)
class Pair:
    """An image and a training image near it.

    Attributes:
        image: index of the image.
        training: index of the training image.
        mirrored: whether the image was mirrored left to right before it was compared.
        shift: (down, right) in pixels by which the image was then moved.
        distance: of the two, in the unit of the search.
    """

    image: int
    training: int
    mirrored: bool
    shift: tuple[int, int]
    distance: float


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The training images nearest to each of N images, nearest first.

    Attributes:
        distance: float32 [N, k]; grey levels of 0..255 (root mean square) for pixels, Euclidean for features.
        index: of the training image, int64 [N, k].
        mirrored: whether the image was mirrored left to right before it was compared, bool [N, k].
        shift: (down, right) in pixels by which the image was then moved, int64 [N, k, 2].
        n_train: number of training images that were searched.
    """

    distance: Tensor
    index: Tensor
    mirrored: Tensor
    shift: Tensor
    n_train: int

    def __len__(self) -> int:
        return len(self.distance)

    def relative(self) -> Tensor:
        """Return `relative_distance` of each image, float64 [N]."""
        return relative_distance(self.distance)

    def closest(self, count: int) -> list[Pair]:
        """Return the `count` images of least relative distance, each with its training image, least first."""
        pairs = []
        for i in self.relative().argsort(stable=True)[:count].tolist():
            down, right = self.shift[i, 0].tolist()
            distance, mirrored = self.distance[i, 0].item(), bool(self.mirrored[i, 0])
            pairs.append(Pair(i, int(self.index[i, 0]), mirrored, (down, right), distance))
        return pairs


def relative_distance(distance: Tensor) -> Tensor:
    """Return the distance to the nearest over the mean distance to the other k - 1, float64 [N], in [0, 1].

    It is about the same for dense and sparse parts of the training set, and for sharp and smooth images, and small only
    where one training image stands out from its neighbours. It is 0 for an exact copy.

    Args:
        distance: of the k nearest training images of each image, nearest first, [N, k].

    Raises:
        ValueError: there is only one neighbour of each image.

    Example:
        >>> relative_distance(torch.tensor([[1.0, 4.0, 6.0], [4.0, 4.0, 4.0]]))
        tensor([0.2000, 1.0000], dtype=torch.float64)
    """
    if distance.shape[1] < 2:
        raise ValueError("a relative distance needs k >= 2 neighbours of each image")
    nearest, others = distance[:, 0].double(), distance[:, 1:].double().mean(1)
    return torch.where(nearest > 0, nearest / others, 0.0)


@dataclass(frozen=True)
class Memorisation:
    """How many of a model's samples lie closer to a training image than real images do.

    Attributes:
        copies: whether the samples are named copies: `bound` exceeds `tolerance`.
        ratio: `share` over `level`: about 1 for real images that the model was not trained on, 1 / level at most.
        bound: lower end of a one-sided 95 % confidence interval of the ratio, over both sets.
        tolerance: the ratio above which samples are named copies.
        share: share of the samples whose relative distance is below `threshold`, or where that is 0, of those that
            match a training image exactly. With c copies among real images it is about c + level (1 - c).
        level: share of the held-out images whose relative distance is at most `threshold`.
        threshold: in relative distance, `relative_distance`.
        authenticity: share of the samples that are farther from their nearest training image than that image is from
            the other training images (Alaa et al. 2022), about 1/2 for real images; None where not computed.
        n: number of samples.
        n_held_out: number of held-out images.
        n_train: number of training images.
    """

    copies: bool
    ratio: float
    bound: float
    tolerance: float
    share: float
    level: float
    threshold: float
    authenticity: float | None
    n: int
    n_held_out: int
    n_train: int


def memorisation(
    samples: Neighbours,
    held_out: Neighbours,
    *,
    own: Neighbours | None = None,
    level: float = 0.01,
    tolerance: float = 2.0,
) -> Memorisation:
    """Return whether more samples than held-out images lie unusually close to a training image.

    Unusually close is a relative distance below that of all but the closest `level` of the held-out images. Real images
    that are neither in the training set nor held out are below it with a probability of about `level`, whatever the
    data. Relative distances do not call a model a copier only because its samples are smoother or more typical than
    real images. The bound divides the lower end of an exact interval of the share of the samples (Clopper & Pearson
    1934) by the upper end of one of the probability of held-out images, which has the distribution of an order
    statistic, Beta(j, H + 1 - j); each fails with a probability of 2.5 %. Where the closest `level` of the held-out
    images match a training image exactly, the shares of exact matches are compared instead.

    An image that the training set holds more than about four times stands out less from its neighbours, so altered
    copies of it may be missed: remove duplicates, or search for more neighbours.

    Args:
        samples: neighbours of generated images.
        held_out: neighbours of real images in the same training set, by the same search. They must not be in it.
        own: nearest training image of each sample's nearest training image except itself, for the authenticity:
            `search(training[i], training, k=1, exclude=i)` with i = samples.index[:, 0].
        level: share of held-out images taken as unusually close; at least one image is.
        tolerance: the ratio above which samples are named copies.

    Raises:
        ValueError: a set is empty, the searches differ, or an option is out of range.

    Examples:
        >>> training = torch.arange(40.0).unsqueeze(1)
        >>> held_out, copies = torch.arange(20.0).unsqueeze(1) + 0.5, training[:20]
        >>> found = memorisation(feature_neighbours(copies, training), feature_neighbours(held_out, training))
        >>> found.share, found.copies
        (1.0, True)
    """
    if min(len(samples), len(held_out)) < 1:
        raise ValueError(f"need samples and held-out images, got {len(samples)} and {len(held_out)}")
    if (samples.n_train, samples.distance.shape[1]) != (held_out.n_train, held_out.distance.shape[1]):
        raise ValueError(
            "samples and held-out images must be searched for in the same training images, with the same k"
        )
    if own is not None and len(own) != len(samples):
        raise ValueError(f"own must have one row for each of the {len(samples)} samples, got {len(own)}")
    if not 0 < level < 1 or tolerance < 1:
        raise ValueError(f"level must be in (0, 1) and tolerance >= 1, got {level} and {tolerance}")
    n, held = len(samples), len(held_out)
    place = max(1, math.floor(level * (held + 1)))
    threshold = held_out.relative().sort().values[place - 1].item()
    level = place / (held + 1)
    close, highest = int((samples.relative() < threshold).sum()), _probability_at(place, held, 0.975)
    if threshold == 0:  # none is closer than an exact match, so that all exact ones count, here and there
        place, close = (int((found.relative() <= 0).sum()) for found in (held_out, samples))
        level, highest = place / (held + 1), _probability_at(place + 1, held, 0.975)
    bound = _probability_at(close, n, 0.025) / highest
    authentic = None
    if own is not None:
        authentic = (samples.distance[:, 0] > own.distance[:, 0]).double().mean().item()
    return Memorisation(
        copies=bound > tolerance,
        ratio=close / n / level,
        bound=bound,
        tolerance=tolerance,
        share=close / n,
        level=level,
        threshold=threshold,
        authenticity=authentic,
        n=n,
        n_held_out=held,
        n_train=samples.n_train,
    )


def _probability_at(count: int, n: int, tail: float) -> float:
    """Return the p for which a binomial number of n trials is `count` or more with probability `tail`, by bisection.

    It is also the `tail` quantile of Beta(count, n + 1 - count).
    """
    if count == 0:
        return 0.0
    k = torch.arange(count, n + 1, dtype=torch.float64)
    top = torch.tensor(n + 1.0, dtype=torch.float64)
    choose = torch.lgamma(top) - torch.lgamma(k + 1) - torch.lgamma(top - k)
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        reached = (choose + k * math.log(p) + (n - k) * math.log1p(-p)).exp().sum().item()
        low, high = (p, high) if reached < tail else (low, p)
    return low


@dataclass(frozen=True)
class _View:
    """A way to look at an image before it is compared: mirrored or not, then moved."""

    mirrored: bool
    down: int
    right: int

    def of(self, images: Tensor) -> Tensor:
        """Return the images [N, C, H, W] as seen, 0 where nothing was moved to."""
        if self.mirrored:
            images = images.flip(3)
        seen = torch.zeros_like(images)
        (to_rows, from_rows), (to_cols, from_cols) = _overlap(self.down), _overlap(self.right)
        seen[:, :, to_rows, to_cols] = images[:, :, from_rows, from_cols]
        return seen


def _overlap(move: int) -> tuple[slice, slice]:
    """Return the places along an axis that are reached by a move, and where their content came from."""
    if move == 0:
        return slice(None), slice(None)
    if move > 0:
        return slice(move, None), slice(None, -move)
    return slice(None, move), slice(-move, None)


def pixel_neighbours(
    images: Array,
    training: Array,
    *,
    k: int = 6,
    mirror: bool = True,
    shift: int = 1,
    exclude: Tensor | None = None,
) -> Neighbours:
    """Return the training images nearest to each image in pixels, up to mirroring and a shift.

    The distance is the root mean square difference in grey levels, of the way of mirroring and moving for which it is
    least. A moved image is compared where it overlaps the training image, so whatever a moved copy has at the edge that
    it uncovered, its distance is 0.

    Args:
        images: uint8 [N, C, H, W].
        training: uint8 [M, C, H, W]; a numpy memory map is read in parts.
        k: neighbours of each image.
        mirror: whether images are also compared mirrored left to right.
        shift: largest move in pixels, in each direction.
        exclude: index of the training image that is not to be found for each image, int64 [N]: of itself, for a
            training image.

    Raises:
        ValueError: the shapes or types do not fit, or there are too few training images.

    Examples:
        >>> training = torch.arange(3 * 16, dtype=torch.uint8).reshape(3, 1, 4, 4)
        >>> found = pixel_neighbours(training[1:2].flip(3), training, k=1)  # a mirrored copy
        >>> found.index.item(), found.mirrored.item(), found.distance.item()
        (1, True, 0.0)
    """
    if images.ndim != 4 or training.ndim != 4 or images.shape[1:] != training.shape[1:]:
        raise ValueError(
            f"images and training must be [N, C, H, W] of one size, got {tuple(images.shape)} and "
            f"{tuple(training.shape)}: make thumbnails of one size first"
        )
    if not (_is_uint8(images) and _is_uint8(training)):
        raise ValueError(f"pixels must be uint8, got {images.dtype} and {training.dtype}")
    if not 0 <= shift < min(images.shape[2:]):
        raise ValueError(f"shift must be >= 0 and less than the image's {tuple(images.shape[2:])}, got {shift}")
    moves = sorted(range(-shift, shift + 1), key=abs)
    views = [
        _View(m, down, right) for m in ((False, True) if mirror else (False,)) for down in moves for right in moves
    ]
    return _search(images, training, views, k, exclude)


def feature_neighbours(features: Array, training: Array, *, k: int = 6, exclude: Tensor | None = None) -> Neighbours:
    """Return the training images nearest to each image in Euclidean distance of their features.

    Args:
        features: [N, D], of any floating type.
        training: [M, D]; a numpy memory map is read in parts.
        k, exclude: as for `pixel_neighbours`.

    Raises:
        ValueError: the shapes do not fit, a feature is not finite, or there are too few training images.

    Examples:
        >>> found = feature_neighbours(torch.tensor([[0.0, 0.0]]), torch.tensor([[6.0, 8.0], [3.0, 4.0]]), k=2)
        >>> found.index.tolist(), found.distance.round(decimals=4).tolist()
        ([[1, 0]], [[5.0, 10.0]])
    """
    if features.ndim != 2 or training.ndim != 2 or features.shape[1] != training.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], got {tuple(features.shape)} and {tuple(training.shape)}")
    views, root = [_View(False, 0, 0)], features.shape[1] ** 0.5
    return _search(features[:, :, None, None], training[:, :, None, None], views, k, exclude, unit=root)


def _search(
    images: Array, training: Array, views: list[_View], k: int, exclude: Tensor | None, unit: float = 1.0
) -> Neighbours:
    """Return the k nearest in `unit` times the root mean square difference, of the view for which it is least."""
    least = k + (exclude is not None)
    if k < 1 or len(training) < least:
        raise ValueError(f"{k} neighbours need k >= 1 and at least {least} training images, got {len(training)}")
    search = _Search(views, training, centre=_floats(training[:1024]).mean(0))
    rows = max(1, min(1024, _BYTES // (4 * search.centre.numel() * len(views))))
    parts = []
    for start in range(0, len(images), rows):
        span = slice(start, start + rows)
        parts.append(search.nearest(_floats(images[span]), k, None if exclude is None else exclude[span]))
    distance, index, view = (torch.cat(part) for part in zip(*parts, strict=True))
    mirrored = torch.tensor([v.mirrored for v in views])
    moved = torch.tensor([(v.down, v.right) for v in views])
    return Neighbours(unit * distance, index, mirrored[view], moved[view], len(training))


class _Search:
    """Nearest training images by |a|^2 - 2 a.b + |b|^2, in float32, which cancels badly far from `centre`."""

    def __init__(self, views: list[_View], training: Array, centre: Tensor) -> None:
        self.views, self.training, self.centre = views, training, centre
        unmoved = torch.ones_like(centre)[None]
        masks = torch.stack([_View(False, v.down, v.right).of(unmoved).flatten() for v in views])
        self.weights = masks / masks.sum(1, keepdim=True)  # [V, D]; of a mean over the overlap

    def nearest(self, block: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return distance, index and view of the k training images nearest to each image, [B, k] each."""
        # Centred where a training image has its pixels, so that the overlap cuts both alike.
        pairs = zip(self.views, self.weights, strict=True)
        seen = torch.stack([(v.of(block) - self.centre).flatten(1) * (weight > 0) for v, weight in pairs])
        squared = torch.full((len(block), k), math.inf)
        index, view = torch.zeros(len(block), k, dtype=torch.long), torch.zeros(len(block), k, dtype=torch.long)
        columns = max(1, min(4096, _BYTES // (8 * self.centre.numel())))
        for start in range(0, len(self.training), columns):
            near, near_view = self._to_chunk(seen, slice(start, start + columns))
            if exclude is not None:
                own = (exclude >= start) & (exclude < start + near.shape[1])
                near[own, exclude[own] - start] = math.inf
            near, place = near.topk(min(k, near.shape[1]), largest=False)
            squared, order = torch.cat([squared, near], 1).topk(k, largest=False)
            index = torch.cat([index, place + start], 1).gather(1, order)
            view = torch.cat([view, near_view.gather(1, place).long()], 1).gather(1, order)
        return self._exact(seen, index, view)

    def _to_chunk(self, seen: Tensor, span: slice) -> tuple[Tensor, Tensor]:
        """Return the least squared distance over the views and its view, [B, T], to a part of the training images."""
        chunk = (_floats(self.training[span]) - self.centre).flatten(1)
        norms = self.weights @ chunk.square().T  # [V, T]
        least = torch.full((seen.shape[1], len(chunk)), math.inf)
        view = torch.zeros(least.shape, dtype=torch.int16)
        for number, (part, weight) in enumerate(zip(seen, self.weights, strict=True)):
            squared = torch.addmm(norms[number], part, chunk.T, alpha=-2 * weight.max().item())
            squared += (part.square() @ weight)[:, None]
            view.masked_fill_(squared < least, number)
            torch.minimum(least, squared, out=least)
        return least, view

    def _exact(self, seen: Tensor, index: Tensor, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return distance, index and view in order, with the distances of the differences themselves."""
        k, parts = index.shape[1], []
        rows = max(1, (_BYTES >> 4) // (4 * k * self.centre.numel()))
        for start in range(0, len(index), rows):
            at, which = index[start : start + rows], view[start : start + rows]
            training = (_floats(self.training[at.flatten()]) - self.centre).flatten(1)
            image = torch.arange(start, start + len(at)).repeat_interleave(k)
            differences = (seen[which.flatten(), image] - training).square() * self.weights[which.flatten()]
            parts.append(differences.sum(1).sqrt().reshape(-1, k))
        distance, order = torch.cat(parts).sort(dim=1, stable=True)
        return distance, index.gather(1, order), view.gather(1, order)


def _floats(part: Array) -> Tensor:
    """Return images or features in float32; a part of a memory map is read here."""
    floats = (part if isinstance(part, Tensor) else torch.tensor(part)).float()
    if not bool(floats.isfinite().all()):
        raise ValueError("features must be finite: the images or the evaluator network overflowed")
    return floats


def _is_uint8(images: Array) -> bool:
    return images.dtype in (torch.uint8, np.uint8)
