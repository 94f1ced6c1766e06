"""Inpainting and editing: masks, known pixels on the way down (replacement, RePaint), the fine-tuned model, SDEdit.

A mask is [B, 1, H, W], True (or 1) where a pixel is known and False where it is hidden, as in `Conditioning`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ddpm.gaussian import DiagonalGaussian, ReverseVariance, p_reverse, q_sample, q_transition
from ddpm.noise import Purpose, words
from ddpm.prediction import Conditioning, Denoiser, coefficients
from ddpm.samplers.common import Sample, StepNoise, predict, time_grid
from ddpm.schedule import NoiseSchedule

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


def repaint_levels(grid: Sequence[float], *, jump_length: int, resamplings: int) -> list[float]:
    """Every level that RePaint visits, in order; a rise is one jump forward (Lugmayr et al. 2022, algorithm 1).

    The grid has N steps, and position n is the one from which n are left. On reaching a position b = 1 + i jump_length
    with b + jump_length <= N, the chain jumps up to b + jump_length and comes down again, resamplings - 1 times. With
    jump_length = 1 this is algorithm 1 with U = resamplings, with any other the authors' `get_schedule_jump`.
    In all there are N + (resamplings - 1) jump_length floor((N - 1) / jump_length) steps down.

    Args:
        grid: strictly decreasing levels that end at 0, `schedule.timesteps(steps)` for example.
        jump_length: in steps of the grid, at least 1.
        resamplings: how often each stretch is come down, at least 1, which jumps nowhere.

    Raises:
        ValueError: numbers out of range, a jump that the grid is too short for, or a grid that does not fall to 0.
    """
    steps = len(grid) - 1
    if jump_length < 1 or resamplings < 1:
        raise ValueError(
            f"need jump_length >= 1 and resamplings >= 1, got jump_length={jump_length} and resamplings={resamplings}"
        )
    if steps < 1 or grid[-1] != 0 or any(s >= t for t, s in itertools.pairwise(grid)):
        raise ValueError(f"levels must fall strictly and end at 0, where known pixels are clean, got {list(grid)}")
    if resamplings > 1 and jump_length > steps - 1:
        raise ValueError(
            f"jump_length={jump_length} does not fit into {steps} steps: use jump_length <= {steps - 1}, more steps, "
            f"or resamplings=1"
        )
    jumps = dict.fromkeys(range(1, steps - jump_length + 1, jump_length), resamplings - 1)
    levels, position = [grid[0]], steps
    while position > 0:
        position -= 1
        levels.append(grid[steps - position])
        if jumps.get(position, 0) > 0:
            jumps[position] -= 1
            position += jump_length
            levels.append(grid[steps - position])
    return levels


def repaint(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    known: Tensor,
    mask: Tensor,
    cond: Conditioning | None = None,
    *,
    steps: int = 250,
    jump_length: int = 10,
    resamplings: int = 10,
    noise: StepNoise,
    variance: ReverseVariance = "small",
    timesteps: Sequence[float] | None = None,
) -> Iterator[Sample]:
    """RePaint (Lugmayr et al. 2022, algorithm 1), one `Sample` per network evaluation; jumps are not given out.

    A step down draws hidden pixels from p(x_s | x_t) and known ones from q(x_s | known) (eq. 8). A jump up draws x_t
    from q(x_t | x_s) over both levels at once: what the hidden pixels were lives on, and the next way down brings it
    closer to what is known. The last sample has the known pixels exactly as given.

    Args:
        denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`; it sees `known` only if cond says so.
        x_T: standard normal noise [B, C, H, W].
        known: clean images [B, C, H, W]; hidden pixels may hold anything.
        mask: [B, 1, H, W], True (or 1) where known.
        cond: what else the denoiser is conditioned on.
        steps: steps from T to 0, 1..schedule.num_steps. There are steps + (resamplings - 1) jump_length
            floor((steps - 1) / jump_length) network evaluations, 2,410 of them at the defaults, which are the authors'.
        jump_length: in steps. Pixels agree only down to the level that a jump reaches: with few steps, make it short.
        resamplings: how often each stretch is come down; 1 is `replacement`.
        noise: key -> standard normal noise like x_T. The key is the number, from 0, of the transition in
            `repaint_levels`, jumps included: no two share one. A step's known and hidden pixels are of the same draw.
        variance: the fixed one of p, the posterior's ("small") or beta ("large"); a learned one takes its place.
        timesteps: real levels to visit instead, strictly decreasing, from the level of x_T to 0.

    Raises:
        ValueError: shapes that do not fit each other, numbers out of range, or `timesteps` that do not fall to 0.
    """
    _same_shape(x_T, known, "x_T and known")
    mask, known = _checked_mask(mask, known).to(x_T.device), known.to(x_T)
    grid = time_grid(schedule, steps, timesteps)
    levels = repaint_levels(grid, jump_length=jump_length, resamplings=resamplings)
    x_t = x_T
    for i, (t, s) in enumerate(itertools.pairwise(levels)):
        if s > t:
            x_t = q_transition(x_t, t, s, schedule).sample(noise(i))
            continue
        pred = predict(denoiser, x_t, t, cond)
        p = p_reverse(pred, x_t, t, s, schedule, variance)
        x_t = _with_known(p, known, mask, s, schedule).sample(noise(i)) if s > 0 else paste(known, p.mean, mask)
        yield Sample(x_t, pred.x0, s)


def replacement(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    known: Tensor,
    mask: Tensor,
    cond: Conditioning | None = None,
    *,
    steps: int | None = None,
    noise: StepNoise,
    variance: ReverseVariance = "small",
    timesteps: Sequence[float] | None = None,
) -> Iterator[Sample]:
    """Ancestral sampling, known pixels redrawn from q(x_s | known) at every level (Song et al. 2021b, app. I.2).

    Takes `steps` network evaluations; None is every step of the schedule. Hidden pixels see the known ones under fresh
    noise, and only once a level: more steps do not take away the bias against the data's own conditional, `repaint`
    does, at a price (Lugmayr et al. 2022, sec. 4.2). Arguments and errors are those of `repaint`, keys 0, 1, 2, ...
    """
    return repaint(
        denoiser,
        schedule,
        x_T,
        known,
        mask,
        cond,
        steps=schedule.num_steps if steps is None else steps,
        jump_length=1,
        resamplings=1,
        noise=noise,
        variance=variance,
        timesteps=timesteps,
    )


def _with_known(
    p: DiagonalGaussian, known: Tensor, mask: Tensor, s: float, schedule: NoiseSchedule
) -> DiagonalGaussian:
    """q(x_s | known) where known and p elsewhere: given x_t, pixels are independent, so one draw serves both."""
    alpha, sigma = coefficients(schedule, s, known)
    return DiagonalGaussian(torch.where(mask, alpha * known, p.mean), torch.where(mask, sigma.square(), p.variance))


def inpainting_condition(known: Tensor, mask: Tensor, cond: Conditioning | None = None) -> Conditioning:
    """What a fine-tuned model sees of an image: the mask, and the image with its hidden pixels at 0.

    Args:
        known: clean images [B, C, H, W]; hidden pixels may hold anything.
        mask: [B, 1, H, W], True (or 1) where known.
        cond: labels and text to go with it.

    Raises:
        ValueError: a mask that does not fit.
    """
    mask = _checked_mask(mask, known)
    # Not known * mask: hidden pixels may be nan, and 0 * nan is.
    return replace(cond or Conditioning(), mask=mask, context=torch.where(mask, known, 0.0))


def paste(known: Tensor, sample: Tensor, mask: Tensor) -> Tensor:
    """The known pixels, bit for bit, and the sample's elsewhere, [B, C, H, W].

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _same_shape(known, sample, "known and sample")
    return torch.where(_checked_mask(mask, known), known, sample)


def extend_for_inpainting(weights: Mapping[str, Tensor], context_channels: int) -> dict[str, Tensor]:
    """A trained `UNet`'s weights for the same network with `context_channels`, which computes the same.

    conv_in gets inputs for mask and context behind those of x_t, with weights of 0 (GLIDE, Nichol et al. 2021,
    "Image Inpainting"): fine-tuning starts out from the trained model. All other tensors are shared, not copied.

    Args:
        weights: of a `UNet` without context: conv_in.weight [width, C, 3, 3], conv_out.weight [C or 2 C, width, 3, 3].
        context_channels: of the new configuration, at least 1: the image's C.

    Raises:
        ValueError: not such weights, or already extended ones.
    """
    if context_channels < 1:
        raise ValueError(f"context_channels must be >= 1 (the image's channels), got {context_channels}")
    missing = [name for name in ("conv_in.weight", "conv_out.weight") if name not in weights]
    if missing:
        raise ValueError(f"not the weights of a UNet: {', '.join(missing)} missing; pass unet.state_dict()")
    conv_in = weights["conv_in.weight"]
    inputs, outputs = conv_in.shape[1], len(weights["conv_out.weight"])
    if outputs not in (inputs, 2 * inputs):
        raise ValueError(
            f"conv_in takes {inputs} channels where conv_out gives {outputs}: these weights are extended already; "
            f"load them into a UNet with context_channels as they are"
        )
    zeros = conv_in.new_zeros(len(conv_in), 1 + context_channels, *conv_in.shape[2:])
    return {**weights, "conv_in.weight": torch.cat([conv_in, zeros], dim=1)}


def noised_start(
    schedule: NoiseSchedule, image: Tensor, strength: float, noise: Tensor, *, steps: int = 50
) -> tuple[Tensor, list[float]]:
    """Where SDEdit starts (Meng et al. 2022, algorithm 1, for a variance-preserving process): (x_t0, timesteps).

    The image, noised to t0 = strength T, and the levels from there to 0 for a sampler of `steps` steps:
        x_t0, timesteps = noised_start(schedule, image, 0.5, noise)
        ddim(denoiser, schedule, x_t0, timesteps=timesteps)
    They are the table's, spaced as by `schedule.timesteps` (the same list at strength 1), unless steps > t0.

    Args:
        image: clean images [B, C, H, W].
        strength: in (0, 1]. Near 0 the image comes back; at 1 nothing is kept of it but alpha_T's share.
        noise: standard normal, like the image.
        steps: at least 1.

    Raises:
        ValueError: `strength` or `steps` out of range, or noise of another shape.
    """
    if not 0 < strength <= 1 or steps < 1:
        raise ValueError(f"need strength in (0, 1] and steps >= 1, got strength={strength} and steps={steps}")
    _same_shape(image, noise, "image and noise")
    t0 = strength * schedule.num_steps
    timesteps = [i * t0 / steps for i in range(steps, -1, -1)]
    timesteps = [float(round(t)) for t in timesteps] if t0 >= steps else timesteps
    return q_sample(image, timesteps[0], noise, schedule), timesteps


def masked_error(sample: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Root mean square error over each image's hidden pixels, [B].

    Raises:
        ValueError: shapes that do not fit each other, or an image without hidden pixels.
    """
    _same_shape(sample, truth, "sample and truth")
    hidden = ~_checked_mask(mask, truth)
    return _mean_where((sample - truth).square().flatten(2), hidden.flatten(2), "hidden pixel").sqrt()


def seam_error(sample: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """How differently sample and truth step across the mask's edge, [B]: 0 where no seam shows.

    The mean over pairs of neighbours (a, b), up, down, left and right, one known and one hidden, and over channels, of
        |(sample_a - sample_b) - (truth_a - truth_b)|.

    Raises:
        ValueError: shapes that do not fit each other, or an image without such pairs.
    """
    _same_shape(sample, truth, "sample and truth")
    mask, error = _checked_mask(mask, truth), sample - truth
    steps = torch.cat([error.diff(dim=axis).abs().flatten(2) for axis in (2, 3)], dim=2)
    edge = torch.cat([mask.diff(dim=axis).flatten(2) for axis in (2, 3)], dim=2)  # of bool: exclusive or
    return _mean_where(steps, edge, "edge of the mask")


def _mean_where(values: Tensor, where: Tensor, what: str) -> Tensor:
    """Each image's mean of values [B, C, N] where `where` [B, 1, N] is true, [B]."""
    count = where.sum(dim=(1, 2))
    if bool((count == 0).any()):
        raise ValueError(f"no {what} in image {int((count == 0).nonzero()[0])} of the batch: leave it out")
    return torch.where(where, values, 0.0).mean(dim=1).sum(dim=1) / count


def _checked_mask(mask: Tensor, image: Tensor) -> Tensor:
    """The mask as bool, on the device of the images [B, C, H, W] that it has to fit."""
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


def _same_shape(one: Tensor, other: Tensor, names: str) -> None:
    if one.shape != other.shape:
        raise ValueError(f"{names} must have one shape [B, C, H, W], got {list(one.shape)} and {list(other.shape)}")
