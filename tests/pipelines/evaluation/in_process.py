"""Actors of an evaluation in this process, one call after another, without Ray; and an encoder that keeps images."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from torch import Tensor

from pipelines.evaluation import actors
from pipelines.evaluation.evaluators.base import Encoded, FeatureEncoder


class Reference:
    """A value in the object store, equal to no other."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Pool:
    """What an `ActorPool` of one actor does."""

    def __init__(self, kind: Any, arguments: tuple[Any, ...], *_: Any) -> None:
        self.actor = kind(*(getattr(given, "value", given) for given in arguments))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, method: str, calls: Any) -> Any:
        """Yield (place, result) of each call."""
        for place, arguments in enumerate(calls):
            yield place, self.actor.call(method, *arguments)


class Keeping:
    """An encoder that keeps the images that it is given."""

    def __init__(self, encoder: FeatureEncoder) -> None:
        self.encoder, self.width = encoder, encoder.width
        self.seen: list[NDArray[np.uint8]] = []

    def __call__(self, images: Tensor) -> Encoded:
        self.seen.append(images.permute(0, 2, 3, 1).cpu().numpy())
        return self.encoder(images)

    def to(self, device: Any) -> Keeping:
        """Return it where it is."""
        return self

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """All that it was given, uint8 [N, H, W, C]."""
        return np.concatenate(self.seen)


def draw_here(monkeypatch: Any) -> None:
    """Let samples be drawn in this process."""
    monkeypatch.setattr(ray, "put", Reference)
    for function in ("packed", "unpacked"):  # tests look into the model that draws
        monkeypatch.setattr(actors, function, lambda value: value)
    monkeypatch.setattr(ray, "get", lambda reference: reference.value)
    monkeypatch.setattr(actors, "alive_nodes", lambda: [{"CPU": 1.0}])
    monkeypatch.setattr(actors, "ActorPool", Pool)
