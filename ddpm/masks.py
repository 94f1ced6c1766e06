"""Inpainting masks: random masks, the condition of a fine-tuned model, pasting, and errors of the hidden pixels.

A mask is [B, 1, H, W], True (or 1) where a pixel is known and False where it is hidden, as in `Conditioning`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.noise import Purpose, words

MaskKind = Literal["any", "box", "stroke", "half"]

_SEGMENTS = 8  # largest number of segments of a stroke
_BOX, _HALF, _STROKE = 1, 5, 6  # first word of each kind; these fix the random masks of a seed: append only
_WORDS = _STROKE + 4 + 2 * _SEGMENTS


def random_mask(seed: int, ordinals: Tensor, size: tuple[int, int], kind: MaskKind = "any") -> Tensor:
    """Return random masks, bool [B, 1, H, W], True where known: a pure function of (seed, ordinal) on every device.

    All arithmetic is on integers, so rounding is the same on every device. Every mask has known and hidden pixels. With
    "any" each sample gets a random one of the three kinds, with the same mask as if that kind were requested:
        box: hides a rectangle at a random place, each side a quarter to three quarters of the image's;
        stroke: hides a polyline of 2 to 8 segments, an eighth to a quarter of the shorter side thick, that follows a
            random walk reflected at the borders (after the free-form masks of Yu et al. 2019, algorithm 1);
        half: hides the upper, lower, left or right half.

    Args:
        seed: 0 <= seed < 2^64.
        ordinals: ordinals of the samples, int64 [B], non-negative.
        size: (H, W), 4 to 16384 each.
        kind: one kind for all samples, or "any".

    Raises:
        ValueError: `size` or `kind` is not allowed, or `ordinals` is not [B].

    Examples:
        >>> mask = random_mask(0, torch.arange(3), (8, 8), "half")
        >>> mask.shape, mask.sum(dim=(1, 2, 3)).tolist()
        (torch.Size([3, 1, 8, 8]), [32, 32, 32])
        >>> torch.equal(mask[2:], random_mask(0, torch.tensor([2]), (8, 8), "half"))
        True
    """
    if len(size) != 2 or not all(4 <= side <= 1 << 14 for side in size):
        raise ValueError(f"size must be (H, W) with both in 4..16384, got {size}")
    if kind not in get_args(MaskKind):
        raise ValueError(f"unknown kind of mask {kind!r}; allowed: {', '.join(get_args(MaskKind))}")
    if ordinals.dim() != 1:
        raise ValueError(f"ordinals must be [B], one number per sample, got {list(ordinals.shape)}: flatten them")
    # Each decision uses a word of its own, so the mask of a kind does not depend on the other kinds.
    word = words(seed, ordinals, Purpose.MASK, _WORDS)
    kinds = {"box": _box, "stroke": _stroke, "half": _half}
    if kind != "any":
        return ~kinds[kind](word, size).unsqueeze(1)
    each = torch.stack([hidden(word, size) for hidden in kinds.values()])
    choice = _draw(word[:, 0], 0, len(kinds) - 1)
    return ~each[choice, torch.arange(len(word), device=word.device)].unsqueeze(1)


def _draw(word: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """Return an integer in [low, high] from a random 32-bit word, biased by at most (high - low + 1) / 2^32."""
    return low + ((word * (high - low + 1)) >> 32)


def _grid(size: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return row numbers [H, 1] and column numbers [1, W]."""
    rows, columns = (torch.arange(side, device=like.device) for side in size)
    return rows.unsqueeze(1), columns.unsqueeze(0)


def _box(word: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the pixels of a random rectangle, bool [B, H, W]."""
    inside = torch.ones_like(word[:1, :1, None], dtype=torch.bool)
    for axis, (side, place) in enumerate(zip(size, _grid(size, word), strict=True)):
        length = _draw(word[:, _BOX + 2 * axis], -(-side // 4), 3 * side // 4)
        first = _draw(word[:, _BOX + 2 * axis + 1], 0, side - length)
        first, length = first.reshape(-1, 1, 1), length.reshape(-1, 1, 1)
        inside = inside & (place >= first) & (place < first + length)
    return inside


def _half(word: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the pixels of one of the four halves, bool [B, H, W]; the smaller half if the side is odd."""
    which = _draw(word[:, _HALF], 0, 3).reshape(-1, 1, 1)
    (height, width), (row, column) = size, _grid(size, word)
    rows = torch.where(which == 0, row < height // 2, row >= height - height // 2)
    columns = torch.where(which == 2, column < width // 2, column >= width - width // 2)
    return torch.where(which < 2, rows, columns)


def _stroke(word: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the pixels of a random thick polyline, bool [B, H, W]; a half of the image if it covers every pixel."""
    draws, shorter = word[:, _STROKE:], min(size)
    segments = _draw(draws[:, 0], 2, _SEGMENTS).reshape(-1, 1, 1)
    thickness2 = _draw(draws[:, 1], max(1, shorter // 8), shorter // 4).reshape(-1, 1, 1).square()
    ys = _walk(draws[:, 2], draws[:, 4 : 4 + _SEGMENTS], size[0])
    xs = _walk(draws[:, 3], draws[:, 4 + _SEGMENTS :], size[1])
    row, column = _grid(size, word)
    hidden = torch.zeros(len(word), *size, dtype=torch.bool, device=word.device)
    for i in range(_SEGMENTS):
        ay, ax, by, bx = (v[:, j].reshape(-1, 1, 1) for j in (i, i + 1) for v in (ys, xs))
        dy, dx = by - ay, bx - ax
        length2 = dy.square() + dx.square()
        from_a_y, from_a_x, from_b_y, from_b_x = row - ay, column - ax, row - by, column - bx
        # If the projection falls outside the segment (always, for length 0), the nearest point is one of its ends.
        along = from_a_y * dy + from_a_x * dx
        across = from_a_y * dx - from_a_x * dy  # the distance times the length
        near_side = (along > 0) & (along < length2) & (4 * across.square() <= thickness2 * length2)
        to_end2 = torch.minimum(from_a_y.square() + from_a_x.square(), from_b_y.square() + from_b_x.square())
        hidden |= (near_side | (4 * to_end2 <= thickness2)) & (i < segments)
    return torch.where(hidden.all(2, keepdim=True).all(1, keepdim=True), _half(word, size), hidden)


def _walk(start: Tensor, steps: Tensor, side: int) -> Tensor:
    """Return coordinates in [0, side) of a reflected random walk [B, segments + 1] with steps up to half the side."""
    first = _draw(start, 0, side - 1).unsqueeze(1)
    place = torch.cat([first, first + _draw(steps, -(side // 2), side // 2).cumsum(1)], dim=1)
    folded = place.remainder(2 * (side - 1))
    return torch.minimum(folded, 2 * (side - 1) - folded)


def inpainting_condition(known: Tensor, mask: Tensor, cond: Conditioning | None = None) -> Conditioning:
    """Return the condition of a fine-tuned inpainting model: the mask, and the image with hidden pixels set to 0.

    Args:
        known: clean images [B, C, H, W]; the values of hidden pixels are ignored.
        mask: [B, 1, H, W], True (or 1) where known.
        cond: labels and text to keep in the result.

    Raises:
        ValueError: the mask does not fit the images.

    Examples:
        >>> mask = torch.tensor([[1.0, 0.0]]).reshape(1, 1, 1, 2)
        >>> cond = inpainting_condition(torch.tensor([[0.5, torch.nan]]).reshape(1, 1, 1, 2), mask)
        >>> cond.context.flatten().tolist(), cond.mask.flatten().tolist()
        ([0.5, 0.0], [True, False])
    """
    mask = checked_mask(mask, known)
    # Not known * mask: hidden pixels may be nan, and 0 * nan is nan.
    return replace(cond or Conditioning(), mask=mask, context=torch.where(mask, known, 0.0))


def paste(known: Tensor, sample: Tensor, mask: Tensor) -> Tensor:
    """Return the known pixels, bit for bit, and the sample's pixels elsewhere, [B, C, H, W].

    Raises:
        ValueError: the shapes do not fit each other.

    Examples:
        >>> known, sample = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
        >>> paste(known, sample, torch.tensor([True, False]).reshape(1, 1, 1, 2)).flatten().tolist()
        [0.0, 1.0]
    """
    same_shape(known, sample, "known and sample")
    return torch.where(checked_mask(mask, known), known, sample)


def masked_error(sample: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Return the root mean square error over each image's hidden pixels, [B].

    Raises:
        ValueError: the shapes do not fit each other, or an image has no hidden pixels.

    Examples:
        >>> sample, truth = torch.tensor([9.0, 3.0]).reshape(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
        >>> mask = torch.tensor([True, False]).reshape(1, 1, 1, 2)
        >>> masked_error(sample, truth, mask).tolist()  # hidden pixels only
        [3.0]
    """
    same_shape(sample, truth, "sample and truth")
    hidden = ~checked_mask(mask, truth)
    return _mean_where((sample - truth).square().flatten(2), hidden.flatten(2), "hidden pixel").sqrt()


def seam_error(sample: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Return the mean difference of pixel steps across the mask's edge between sample and truth, [B]; 0 is seamless.

    It is the mean, over channels and over pairs (a, b) of adjacent pixels of which one is known and one hidden, of
        |(sample_a - sample_b) - (truth_a - truth_b)|.

    Raises:
        ValueError: the shapes do not fit each other, or an image has no such pairs.

    Examples:
        >>> truth, mask = torch.zeros(1, 1, 1, 4), torch.tensor([1, 1, 0, 0]).reshape(1, 1, 1, 4)
        >>> seam_error(torch.tensor([0.0, 0.0, 0.5, 0.5]).reshape(1, 1, 1, 4), truth, mask).tolist()
        [0.5]
        >>> seam_error(truth + 0.5, truth, mask).tolist()  # brighter as a whole, but without a seam
        [0.0]
    """
    same_shape(sample, truth, "sample and truth")
    mask, error = checked_mask(mask, truth), sample - truth
    steps = torch.cat([error.diff(dim=axis).abs().flatten(2) for axis in (2, 3)], dim=2)
    edge = torch.cat([mask.diff(dim=axis).flatten(2) for axis in (2, 3)], dim=2)  # diff of bool is exclusive or
    return _mean_where(steps, edge, "edge of the mask")


def _mean_where(values: Tensor, where: Tensor, what: str) -> Tensor:
    """Return each image's mean of values [B, C, N] where `where` [B, 1, N] is true, [B]."""
    count = where.sum(dim=(1, 2))
    if bool((count == 0).any()):
        raise ValueError(f"no {what} in image {int((count == 0).nonzero()[0])} of the batch: leave it out")
    return torch.where(where, values, 0.0).mean(dim=1).sum(dim=1) / count


def checked_mask(mask: Tensor, image: Tensor) -> Tensor:
    """Return the mask as bool on the device of the images [B, C, H, W], after checking that it fits them.

    Raises:
        ValueError: the images are not floating point [B, C, H, W], or the mask has another shape or values besides 0
            and 1.

    Examples:
        >>> checked_mask(torch.tensor([1, 0]).reshape(1, 1, 1, 2), torch.zeros(1, 3, 1, 2)).flatten().tolist()
        [True, False]
    """
    if image.dim() != 4 or not image.is_floating_point():
        raise ValueError(f"images must be floating point [B, C, H, W], got {image.dtype} {list(image.shape)}")
    expected = [len(image), 1, *image.shape[2:]]
    if list(mask.shape) != expected:
        raise ValueError(
            f"mask must be [B, 1, H, W] = {expected} for images {list(image.shape)}, got {list(mask.shape)}: "
            f"one channel for all of the image's and one mask per image; mask.expand(B, 1, H, W) repeats one"
        )
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        low, high = mask.min().item(), mask.max().item()
        raise ValueError(f"mask must be 0 (hidden) or 1 (known), got {low}..{high}: mask > 0.5 makes it so")
    return mask.to(image.device) == 1


def same_shape(one: Tensor, other: Tensor, names: str) -> None:
    """Raise unless two tensors have the same shape.

    Raises:
        ValueError: the shapes differ; the message names the tensors by `names`.

    Examples:
        >>> same_shape(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), "image and noise")
        Traceback (most recent call last):
            ...
        ValueError: image and noise must have one shape [B, C, H, W], got [1, 3, 8, 8] and [1, 1, 8, 8]
    """
    if one.shape != other.shape:
        raise ValueError(f"{names} must have one shape [B, C, H, W], got {list(one.shape)} and {list(other.shape)}")
