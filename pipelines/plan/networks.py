"""The image sizes and networks that a plan chooses from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.plan.calibration import CALIBRATION
from pipelines.plan.facts import SourceFacts, UserOverrides

SIZES = (32, 64, 128, 256)
LARGEST_NATIVE = 64
"""Largest size at which images that all have the same size are used unscaled."""
WIDTHS = {"narrow": (32, 64), "plain": (64, 64), "wide": (64, 128), "widest": (128, 256)}
"""Network -> channels of the finest level and of the others."""


@dataclass(frozen=True)
class Candidate:
    """A network at an image size.

    Attributes:
        size: height and width in pixels.
        network: its name in `WIDTHS`, or "hand" for the user's own.
        settings: fields of the configuration that define it; empty for the user's own.
    """

    size: int
    network: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Key of the candidate among the measured speeds."""
        return f"{self.network}@{self.size}"

    @property
    def effort(self) -> float:
        """Factor of training images relative to 32 pixels: larger images need more."""
        return max(1.0, (self.size / 32) ** 2)

    @property
    def needed(self) -> int:
        """Smallest number of images that it should see."""
        return round(CALIBRATION.networks.images_needed[self.network] * self.effort)


def candidates(source: SourceFacts, user: UserOverrides) -> tuple[Candidate, ...]:
    """Return the candidates worth measuring, by size and then by network, smallest first."""
    sizes = (int(user.get("data.image_size", 0)),) if "data.image_size" in user.settings else image_sizes(source)
    if user.sets_network():
        return tuple(Candidate(size, "hand") for size in sizes)
    return tuple(Candidate(size, name, unet(size, *widths)) for size in sizes for name, widths in WIDTHS.items())


def image_sizes(source: SourceFacts) -> tuple[int, ...]:
    """Return the sizes at which a source could be trained, in pixels.

    None is above that of its median image; the smallest is 8 pixels, however small the images are.
    """
    native = native_size(source)
    if native is not None:
        return (32, native) if native > 32 else (native,)
    _, median, _ = source.shorter_sides
    fitting = tuple(size for size in SIZES if size <= median)
    return fitting or (max(8, median - median % 4),)


def native_size(source: SourceFacts) -> int | None:
    """Return the common size if all images are square, small, and of a size that networks can halve twice; else
    None."""
    if source.one_size is None or source.one_size[0] != source.one_size[1]:
        return None
    size = source.one_size[0]
    return size if size <= LARGEST_NATIVE and size >= 8 and size % 4 == 0 else None


def unet(size: int, first: int, others: int) -> dict[str, Any]:
    """Return the settings of a UNet that halves images down to 4 to 8 pixels, with attention at 16 pixels or less."""
    levels = 2
    while size % 2**levels == 0 and size // 2**levels >= 7:
        levels += 1
    sides = [size >> level for level in range(levels)]
    attends = next((level for level, side in enumerate(sides) if level and side <= 16), levels - 1)
    return {
        "model.kind": "unet",
        "model.channels": [first, *[others] * (levels - 1)],
        "model.attention": [level == attends for level in range(levels)],
        "model.head_dim": 32 if first == 32 else 64,
    }
