"""Preparation of images for networks that were trained on other images: channels, size and scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preparation:
    """How images come to the size and the scale that a network was trained on.

    Attributes:
        size: height and width, in pixels.
        mean: subtracted from pixels in [0, 1], per channel; one value for a network that takes grey images.
        std: by which they are divided then.
    """

    size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, images: Tensor) -> Tensor:
        """Return images uint8 [N, C, H, W] as float32 [N, len(mean), size, size]."""
        x = rgb(images) if len(self.mean) == 3 else images
        x = x.float() / 255
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values, device=x.device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    @property
    def words(self) -> str:
        """A description of the preparation, for a person."""
        channels = "grey repeated to three channels; " if len(self.mean) == 3 else ""
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{channels}resized to {self.size} pixels (bicubic, antialiased); scaled to [0, 1], less {mean}, by {std}"
        )


def rgb(images: Tensor) -> Tensor:
    """Return images [N, 1 or 3, H, W] with three channels."""
    return images.expand(-1, 3, -1, -1)
