"""Masks of inpainting: random ones, the condition of a fine-tuned model, pasting, and errors where pixels are hidden.

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

_SEGMENTS = 8  # at most, of a stroke
_BOX, _HALF, _STROKE = 1, 5, 6  # first word of each kind; part of the trace: append only
_WORDS = _STROKE + 4 + 2 * _SEGMENTS


def random_mask(seed: int, ordinals: Tensor, size: tuple[int, int], kind: MaskKind = "any") -> Tensor:
    """Random masks, bool [B, 1, H, W], True where known: a pure function of (seed, ordinal), the same on every device.

    All arithmetic is on integers, so no device rounds differently. Every mask has known and hidden pixels. With "any"
    a sample gets one of the three kinds, the very mask that it gets when that kind is asked for:
        box: a rectangle is hidden, each side a quarter to three quarters of the image's, anywhere;
        stroke: a polyline of 2 to 8 segments is hidden, an eighth to a quarter of the shorter side thick, which walks
            at random and is reflected at the borders (after the free-form masks of Yu et al. 2019, algorithm 1);
        half: the upper, lower, left or right half is hidden.

    Args:
        seed: 0 <= seed < 2^64.
        ordinals: the samples' numbers, int64 [B], non-negative.
        size: (H, W), 4 to 16384 each.
        kind: one kind for all, or "any".

    Raises:
        ValueError: `size` or `kind` that is not allowed, or ordinals that are not [B].
    """
    if len(size) != 2 or not all(4 <= side <= 1 << 14 for side in size):
        raise ValueError(f"size must be (H, W) with both in 4..16384, got {size}")
    if kind not in get_args(MaskKind):
        raise ValueError(f"unknown kind of mask {kind!r}; allowed: {', '.join(get_args(MaskKind))}")
    if ordinals.dim() != 1:
        raise ValueError(f"ordinals must be [B], one number per sample, got {list(ordinals.shape)}: flatten them")
    # Each decision has a word at a place of its own, so what a kind draws does not depend on the others.
    word = words(seed, ordinals, Purpose.MASK, _WORDS)
    kinds = {"box": _box, "stroke": _stroke, "half": _half}
    if kind != "any":
        return ~kinds[kind](word, size).unsqueeze(1)
    each = torch.stack([hidden(word, size) for hidden in kinds.values()])
    choice = _draw(word[:, 0], 0, len(kinds) - 1)
    return ~each[choice, torch.arange(len(word), device=word.device)].unsqueeze(1)


def _draw(word: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """An integer in [low, high] from a random 32-bit word, biased by at most (high - low + 1) / 2^32."""
    return low + ((word * (high - low + 1)) >> 32)


def _grid(size: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers [H, 1] and column numbers [1, W]."""
    rows, columns = (torch.arange(side, device=like.device) for side in size)
    return rows.unsqueeze(1), columns.unsqueeze(0)


def _box(word: Tensor, size: tuple[int, int]) -> Tensor:
    """Where a random rectangle lies, bool [B, H, W]."""
    inside = torch.ones_like(word[:1, :1, None], dtype=torch.bool)
    for axis, (side, place) in enumerate(zip(size, _grid(size, word), strict=True)):
        length = _draw(word[:, _BOX + 2 * axis], -(-side // 4), 3 * side // 4)
        first = _draw(word[:, _BOX + 2 * axis + 1], 0, side - length)
        first, length = first.reshape(-1, 1, 1), length.reshape(-1, 1, 1)
        inside = inside & (place >= first) & (place < first + length)
    return inside


def _half(word: Tensor, size: tuple[int, int]) -> Tensor:
    """One of the four halves, bool [B, H, W]; of odd sides the smaller half."""
    which = _draw(word[:, _HALF], 0, 3).reshape(-1, 1, 1)
    (height, width), (row, column) = size, _grid(size, word)
    rows = torch.where(which == 0, row < height // 2, row >= height - height // 2)
    columns = torch.where(which == 2, column < width // 2, column >= width - width // 2)
    return torch.where(which < 2, rows, columns)


def _stroke(word: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixels within half a thickness of a random polyline, bool [B, H, W]; a half where that is every pixel."""
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
        # The nearest point is an end where the projection falls outside the segment (always, if it has no length).
        along = from_a_y * dy + from_a_x * dx
        across = from_a_y * dx - from_a_x * dy  # the distance times the length
        near_side = (along > 0) & (along < length2) & (4 * across.square() <= thickness2 * length2)
        to_end2 = torch.minimum(from_a_y.square() + from_a_x.square(), from_b_y.square() + from_b_x.square())
        hidden |= (near_side | (4 * to_end2 <= thickness2)) & (i < segments)
    return torch.where(hidden.all(2, keepdim=True).all(1, keepdim=True), _half(word, size), hidden)


def _walk(start: Tensor, steps: Tensor, side: int) -> Tensor:
    """Coordinates in [0, side) of a random walk [B, segments + 1], steps of up to half the side, walls that reflect."""
    first = _draw(start, 0, side - 1).unsqueeze(1)
    place = torch.cat([first, first + _draw(steps, -(side // 2), side // 2).cumsum(1)], dim=1)
    folded = place.remainder(2 * (side - 1))
    return torch.minimum(folded, 2 * (side - 1) - folded)


def inpainting_condition(known: Tensor, mask: Tensor, cond: Conditioning | None = None) -> Conditioning:
    """What a fine-tuned model sees of an image: the mask, and the image with its hidden pixels at 0.

    Args:
        known: clean images [B, C, H, W]; hidden pixels may hold anything.
        mask: [B, 1, H, W], True (or 1) where known.
        cond: labels and text to go with it.

    Raises:
        ValueError: a mask that does not fit.
    """
    mask = checked_mask(mask, known)
    # Not known * mask: hidden pixels may be nan, and 0 * nan is.
    return replace(cond or Conditioning(), mask=mask, context=torch.where(mask, known, 0.0))


def paste(known: Tensor, sample: Tensor, mask: Tensor) -> Tensor:
    """The known pixels, bit for bit, and the sample's elsewhere, [B, C, H, W].

    Raises:
        ValueError: shapes that do not fit each other.
    """
    same_shape(known, sample, "known and sample")
    return torch.where(checked_mask(mask, known), known, sample)


def masked_error(sample: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Root mean square error over each image's hidden pixels, [B].

    Raises:
        ValueError: shapes that do not fit each other, or an image without hidden pixels.
    """
    same_shape(sample, truth, "sample and truth")
    hidden = ~checked_mask(mask, truth)
    return _mean_where((sample - truth).square().flatten(2), hidden.flatten(2), "hidden pixel").sqrt()


def seam_error(sample: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """How differently sample and truth step across the mask's edge, [B]: 0 where no seam shows.

    The mean over pairs of neighbours (a, b), up, down, left and right, one known and one hidden, and over channels, of
        |(sample_a - sample_b) - (truth_a - truth_b)|.

    Raises:
        ValueError: shapes that do not fit each other, or an image without such pairs.
    """
    same_shape(sample, truth, "sample and truth")
    mask, error = checked_mask(mask, truth), sample - truth
    steps = torch.cat([error.diff(dim=axis).abs().flatten(2) for axis in (2, 3)], dim=2)
    edge = torch.cat([mask.diff(dim=axis).flatten(2) for axis in (2, 3)], dim=2)  # of bool: exclusive or
    return _mean_where(steps, edge, "edge of the mask")


def _mean_where(values: Tensor, where: Tensor, what: str) -> Tensor:
    """Each image's mean of values [B, C, N] where `where` [B, 1, N] is true, [B]."""
    count = where.sum(dim=(1, 2))
    if bool((count == 0).any()):
        raise ValueError(f"no {what} in image {int((count == 0).nonzero()[0])} of the batch: leave it out")
    return torch.where(where, values, 0.0).mean(dim=1).sum(dim=1) / count


def checked_mask(mask: Tensor, image: Tensor) -> Tensor:
    """Return the mask as bool, on the device of the images [B, C, H, W] that it has to fit.

    Raises:
        ValueError: images that are not floating point [B, C, H, W], or a mask of another shape or other values.
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
    """Refuse two tensors of different shapes.

    Raises:
        ValueError: they differ; `names` says which they are.
    """
    if one.shape != other.shape:
        raise ValueError(f"{names} must have one shape [B, C, H, W], got {list(one.shape)} and {list(other.shape)}")
