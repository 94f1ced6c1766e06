"""An evaluator: an encoder, which maps images to features, and a record that identifies it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from pipelines.evaluation.evaluators.share import TrainShare

PART = 256
"""Images that an encoder has on its device at a time."""


@dataclass(frozen=True)
class Encoded:
    """The output of an encoder for a batch of images.

    Attributes:
        features: float32 [N, width], on the CPU.
        probabilities: of the dataset's classes, or of the encoder's own, float32 [N, C] with rows that sum to 1, on the
            CPU; None for an encoder without classes.
    """

    features: Tensor
    probabilities: Tensor | None


class FeatureEncoder(Protocol):
    """Maps images to features; pickled to Ray tasks, and moved to their device by `to`.

    It prepares the images itself (size, channels, scale), so that whoever has them passes them as they are, and takes
    any number of them, in memory for a few at a time.
    """

    width: int

    def __call__(self, images: Tensor) -> Encoded:
        """Return the features of images uint8 [N, C, H, W], which may be on any device."""
        ...

    def to(self, device: torch.device) -> FeatureEncoder:
        """Return the encoder with its weights on a device."""
        ...


@dataclass(frozen=True)
class Evaluator:
    """An encoder with the record that every score carries; features of unlike evaluators are not comparable.

    Attributes:
        kind: "classifier", "contrastive", "inception" or "encoder"; "captions" for a matcher.
        digest: SHA-256 over the weights and over what prepares the images.
        source: where the weights came from, in words: the dataset that it was trained on, or a file's name.
        preparation: what is done to images before they are encoded, in words.
        labels: whether its probabilities are of the dataset's classes.
        accuracy: on the real test split, 0..1; of a matcher, with captions for classes. None without labels.
        share: of the train split, on which it was trained; None where it was trained on other data.
    """

    encoder: FeatureEncoder
    kind: str
    digest: str
    source: str
    preparation: str
    labels: bool
    accuracy: float | None
    share: TrainShare | None = None

    def record(self) -> dict[str, Any]:
        """Return all but the network, as JSON types."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("encoder", "share")}
        return plain | {"width": self.encoder.width, "share": None if self.share is None else asdict(self.share)}


@torch.no_grad()
def in_parts(
    images: Tensor, device: torch.device, encode: Callable[[Tensor], tuple[Tensor, Tensor | None]], part: int = PART
) -> Encoded:
    """Encode images uint8 [N, C, H, W] a part at a time.

    Args:
        device: to which a part is moved.
        encode: returns features and probabilities of a part.
        part: images in one.
    """
    found = [encode(images[i : i + part].to(device)) for i in range(0, max(len(images), 1), part)]
    features = torch.cat([features.float().cpu() for features, _ in found])
    probabilities = [probabilities.float().cpu() for _, probabilities in found if probabilities is not None]
    return Encoded(features, torch.cat(probabilities) if probabilities else None)
