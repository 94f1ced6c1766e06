"""Random numbers of pictures: a function of each picture's seed and id, or interpolated between two seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from ddpm.noise import slerp
from ddpm.samplers import StepNoise, initial_noise, step_noise


@dataclass(frozen=True)
class Noise:
    """The random numbers of N pictures, each a function of its own seed and id; the first axis of every tensor is N.

    Attributes:
        seeds: seed of each picture, int64 [N] in [0, 2^63).
        ids: number of each picture among those of its seed, int64 [N].
        other: seeds at the far end of an interpolation, int64 [N]; None where there is none.
        fraction: of the way from `seeds` to `other`, in [0, 1], float64 [N].

    Examples:
        >>> one, arc = Noise.of([7, 8]), Noise.between(7, 8, 3)
        >>> ends = arc.initial((1, 8, 8))[[0, -1]]
        >>> torch.equal(ends, one.initial((1, 8, 8)))
        True
    """

    seeds: Tensor
    ids: Tensor
    other: Tensor | None = None
    fraction: Tensor | None = None

    @classmethod
    def of(cls, seeds: Sequence[int]) -> Self:
        """Return the noise of one picture for each seed, with id 0."""
        return cls(torch.tensor(seeds, dtype=torch.int64), torch.zeros(len(seeds), dtype=torch.int64))

    @classmethod
    def numbered(cls, seed: int, count: int) -> Self:
        """Return the noise of `count` pictures of one seed, with ids from 0."""
        return cls(torch.full((count,), seed, dtype=torch.int64), torch.arange(count))

    @classmethod
    def between(cls, start: int, end: int, count: int) -> Self:
        """Return `count` noises on the arc from that of one seed to that of another; ids are 0."""
        both = torch.tensor([start, end], dtype=torch.int64).repeat(count, 1)
        return cls(
            both[:, 0], torch.zeros_like(both[:, 0]), both[:, 1], torch.linspace(0, 1, count, dtype=torch.float64)
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return the noise of all pictures of several parts; either all are interpolations or none is."""
        there = [field.name for field in fields(cls) if getattr(parts[0], field.name) is not None]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in there})

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.ids)

    def map(self, f: Callable[[Tensor], Tensor]) -> Self:
        """Return the noise with f applied to every tensor, for example to move, slice or join it."""
        there = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: f(tensor) for name, tensor in there.items() if tensor is not None})

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        """Return x_T ~ N(0, I), [N, *shape]."""
        return self._blend(lambda seeds: initial_noise(seeds, self.ids, shape))

    def steps(self, shape: tuple[int, ...]) -> StepNoise:
        """Return the noise of a sampler's steps."""
        return lambda key: self._blend(lambda seeds: step_noise(seeds, self.ids, shape)(key))

    def _blend(self, draw: Callable[[Tensor], Tensor]) -> Tensor:
        if self.other is None or self.fraction is None:
            return draw(self.seeds)
        return slerp(draw(self.seeds), draw(self.other), self.fraction)
