"""The first weights of a network, a pure function of (seed, name of the parameter, row).

A network is built on the meta device, where nothing is computed, while it is recorded from which distribution its
constructor fills each parameter. Any rows of a parameter can then be drawn by themselves: a rank that holds a part of a
network makes this part alone, and all ranks together have the same weights however they share them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm.noise import Purpose, normal, uniform

VERSION = 1
"""Counts up when the same settings come to give other first weights; models record it."""
DRAWN_AT_ONCE = 2**18
"""Numbers that are drawn at once: drawing takes about 100 bytes of memory for each."""


@dataclass(frozen=True)
class Distribution:
    """What the numbers of a fresh parameter are drawn from.

    Attributes:
        kind: "constant" a; "uniform" on [a, b); "normal" with mean a and standard deviation b.
    """

    kind: Literal["constant", "uniform", "normal"]
    a: float
    b: float = 0.0

    @torch.no_grad()
    def fill(self, rows: Tensor, seed: int, name: str, shape: tuple[int, ...], first: int) -> None:
        """Overwrite rows of a parameter with their first values.

        Args:
            rows: [rows, *shape[1:]]; of a parameter without dimensions, its value.
            seed: of the network.
            name: of the parameter.
            shape: of the whole parameter.
            first: index of the first row.

        Examples:
            >>> whole, part = torch.empty(4, 3), torch.empty(2, 3)
            >>> Distribution("normal", 0.0, 1.0).fill(whole, 0, "weight", (4, 3), 0)
            >>> Distribution("normal", 0.0, 1.0).fill(part, 0, "weight", (4, 3), 1)
            >>> torch.equal(whole[1:3], part)
            True
        """
        if self.kind == "constant":
            rows.fill_(self.a)
            return
        own = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
        target = rows if shape else rows[None]
        ordinals = torch.arange(first, first + len(target), device=rows.device)
        at_once = max(1, DRAWN_AT_ONCE // math.prod(shape[1:]))
        for part, numbers in zip(target.split(at_once), ordinals.split(at_once), strict=True):
            part.copy_(self._drawn(own, numbers, shape[1:]))

    def _drawn(self, seed: int, ordinals: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.kind == "normal":
            return self.a + self.b * normal(seed, ordinals, Purpose.WEIGHTS, shape)
        numbers = uniform(seed, ordinals, Purpose.WEIGHTS, math.prod(shape))
        return (self.a + (self.b - self.a) * numbers).float().view(-1, *shape)


class _Recorder(TorchDispatchMode):
    """Records which distribution each tensor on the meta device was last filled from."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Distribution] = {}
        self.kept: list[Any] = []  # tensors stay alive, so that no two of them have the same address

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        values = [float(value) for value in args[1:3] if isinstance(value, (int, float))]
        aten = torch.ops.aten
        made = {
            aten.uniform_.default: lambda: Distribution("uniform", *(values or [0.0, 1.0])),
            aten.normal_.default: lambda: Distribution("normal", *(values or [0.0, 1.0])),
            aten.fill_.Scalar: lambda: Distribution("constant", *values),
            aten.zero_.default: lambda: Distribution("constant", 0.0),
        }.get(func)
        if made is not None:
            target = args[0]
            if target.numel() * target.element_size() != target.untyped_storage().nbytes():
                raise ValueError("a part of a parameter is filled by itself: fill each parameter as a whole")
            self.kept.append(target.untyped_storage())
            self.found[target.untyped_storage()._cdata] = made()
        return func(*args, **(kwargs or {}))


def build_on_meta(build: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Distribution]]:
    """Return a network on the meta device, and what its parameters are to be filled from, by name.

    Args:
        build: returns a fresh network, whose constructor fills each parameter in place by functions of `torch.nn.init`.

    Raises:
        ValueError: it makes a parameter in another way, or has buffers.

    Examples:
        >>> network, fresh = build_on_meta(lambda: nn.Embedding(4, 2))
        >>> network.weight.device, fresh["weight"]
        (device(type='meta'), Distribution(kind='normal', a=0.0, b=1.0))
    """
    recorder = _Recorder()
    with torch.device("meta"), recorder:
        network = build()
    if buffers := [name for name, _ in network.named_buffers()]:
        raise ValueError(
            f"{buffers[0]} is a buffer, whose first value nobody has recorded: compute it where it is used"
        )
    fresh = {name: recorder.found.get(p.untyped_storage()._cdata) for name, p in network.named_parameters()}
    if unknown := [name for name, distribution in fresh.items() if distribution is None]:
        raise ValueError(f"nobody has recorded how {unknown[0]} is filled: make it empty and fill it by torch.nn.init")
    return network, {name: distribution for name, distribution in fresh.items() if distribution is not None}


class NoFirstWeights(TorchFunctionMode):
    """A context in which new parameters keep whatever is in memory: no page of theirs is taken before it is written.

    Examples:
        >>> with NoFirstWeights():
        ...     nn.Linear(3, 2).bias.shape
        torch.Size([2])
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        target = args[0] if args else given.get("tensor")  # by position, or as `torch.nn.init` passes it on
        name = func.__name__
        if isinstance(target, nn.Parameter) and name.endswith("_") and name != "requires_grad_" and name[:2] != "__":
            return target
        return func(*args, **given)
