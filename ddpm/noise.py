"""Random numbers as a pure function of (seed, purpose, ordinal): Philox 4x32-10, vectorised, the same on every device.

Training draws the timestep, noise, label drop and flip of sample n with this module, so they do not depend on the batch
or the rank that computes them, nor on restarts. Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3") maps a 128-bit counter and a 64-bit key to 128 random bits; ours are
    counter = (block, purpose, ordinal low, ordinal high),   key = (seed low, seed high).
Every function takes one seed for all ordinals, 0 <= seed < 2^64, or int64 [B] with a seed for each, 0 <= seed < 2^63.
int64 arithmetic wraps, and its low 64 bits are those of the unsigned product, so one code serves CPU and GPU.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Seed = int | Tensor
"""One seed for all ordinals, or int64 [B] with a seed for each."""


class Purpose(IntEnum):
    """The purpose of a random stream; streams are independent. Stored runs depend on the numbers: append only."""

    TIMESTEP = 0
    NOISE = 1
    LABEL_DROP = 2
    FLIP = 3
    SAMPLING = 4
    SAMPLING_STEP = 5
    DEQUANTIZE = 6
    MASK = 7
    STRATUM = 8
    CAPTION = 9
    FEATURES = 10
    WEIGHTS = 11


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Seed, Seed]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply ten rounds of Philox 4x32 to int64 tensors of 32-bit words, which are broadcast together.

    Examples:
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> [f"{word.item():08x}" for word in philox((zero, zero, zero, zero), (0, 0))]  # the authors' known answer
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: Seed, ordinals: Tensor, purpose: Purpose, count: int, *, draw: int = 0) -> Tensor:
    """Return `count` random 32-bit words for each ordinal, int64 [len(ordinals), count].

    Args:
        seed: one in [0, 2^64), or int64 [B] with one in [0, 2^63) for each ordinal.
        ordinals: int64 [B], non-negative.
        draw: index of the draw, >= 0; different draws are independent.

    Raises:
        ValueError: a seed is out of range, or the number of seeds is not that of the ordinals.

    Examples:
        >>> a, b = (words(7, torch.tensor(ids), Purpose.NOISE, 2) for ids in ([0, 1, 2], [2, 5]))
        >>> a.shape, torch.equal(a[2], b[0])
        (torch.Size([3, 2]), True)
    """
    if isinstance(seed, Tensor):
        if seed.shape != ordinals.shape or bool((seed < 0).any()):
            raise ValueError(
                f"seeds must be in [0, 2^63), one for each of {len(ordinals)} ordinals, got {seed.tolist()}"
            )
        seed = seed.long().to(ordinals.device).unsqueeze(1)
    elif not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    n = ordinals.long().unsqueeze(1)
    blocks = (torch.arange((count + 3) // 4, device=n.device) + draw * ((count + 3) // 4)).unsqueeze(0)
    zero = torch.zeros_like(n + blocks)
    out = philox((zero + blocks, zero + int(purpose), zero + (n & _MASK), zero + (n >> 32)), (seed & _MASK, seed >> 32))
    return torch.stack(out, dim=-1).flatten(1)[:, :count]


def uniform(seed: Seed, ordinals: Tensor, purpose: Purpose, count: int = 1) -> Tensor:
    """Return uniform float64 numbers in (0, 1), [B, count]: centres of 2^32 equal cells, never 0 or 1.

    Examples:
        >>> u = uniform(7, torch.arange(1000), Purpose.TIMESTEP)
        >>> u.shape, bool((0 < u.min()) & (u.max() < 1))
        (torch.Size([1000, 1]), True)
    """
    return (words(seed, ordinals, purpose, count).double() + 0.5) * 2.0**-32


def normal(seed: Seed, ordinals: Tensor, purpose: Purpose, shape: tuple[int, ...], *, draw: int = 0) -> Tensor:
    """Return standard normal float32 numbers [B, *shape] by Box and Muller (1958), independent of the batch.

    Args:
        draw: index of the draw, >= 0; see `words`.

    Examples:
        >>> eps = normal(7, torch.arange(100), Purpose.NOISE, (1, 8, 8))
        >>> eps.shape, torch.equal(eps[3:5], normal(7, torch.tensor([3, 4]), Purpose.NOISE, (1, 8, 8)))
        (torch.Size([100, 1, 8, 8]), True)
        >>> round(eps.std().item(), 1)
        1.0
    """
    count = math.prod(shape)
    bits = words(seed, ordinals, purpose, count + count % 2, draw=draw)
    pairs = ((bits.double() + 0.5) * 2.0**-32).float().unflatten(1, (-1, 2))
    # float32 rounds values within 2^-25 of 1 up to 1, where the radius is 0, which is harmless; log never gets 0.
    radius = torch.sqrt(-2 * pairs[..., 0].log())
    angle = (2 * math.pi) * pairs[..., 1]
    both = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
    return both[:, :count].unflatten(1, shape) if shape else both[:, 0]


def slerp(start: Tensor, end: Tensor, fraction: Tensor) -> Tensor:
    """Return noise on the arc from `start` to `end`, [B, ...]: spherical interpolation (Song et al. 2021a, eq. 66).

    Unlike a straight line, the arc between two draws of N(0, I) stays at the norm that such draws have. Fraction 0 is
    exactly `start` and 1 exactly `end`.

    Args:
        start, end: noise [B, ...].
        fraction: fraction of the arc, in [0, 1], [B].

    Examples:
        >>> start, end = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> middle = slerp(start, end, torch.tensor([0.5]))
        >>> round(middle.norm().item(), 6), round(((start + end) / 2).norm().item(), 6)  # the line leaves the sphere
        (1.0, 0.707107)
    """
    a, b = start.flatten(1).double(), end.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    angle, share = cosine.acos().unsqueeze(1), fraction.to(a).reshape(-1, 1)
    sine = angle.sin()
    near = sine < 1e-6  # nearly parallel: the arc is a line
    safe = torch.where(near, 1, sine)
    weight_a = torch.where(near, 1 - share, ((1 - share) * angle).sin() / safe)
    weight_b = torch.where(near, share, (share * angle).sin() / safe)
    return (weight_a * a + weight_b * b).to(start.dtype).reshape(start.shape)


def integers(seed: Seed, ordinals: Tensor, purpose: Purpose, high: int) -> Tensor:
    """Return int64 [B] in [0, high), floor(word * high / 2^32), biased by at most high / 2^32; high <= 2^31.

    Examples:
        >>> drawn = integers(7, torch.arange(100), Purpose.TIMESTEP, high=4)
        >>> drawn.unique().tolist()
        [0, 1, 2, 3]
    """
    if not 1 <= high <= 1 << 31:
        raise ValueError(f"high must be in 1..2^31, got {high}")
    return (words(seed, ordinals, purpose, 1)[:, 0] * high) >> 32
