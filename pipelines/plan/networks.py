"""The image sizes and networks that a plan chooses from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ddpm.image_size import ImageSize, as_setting, height_width, of_sides, parse_image_size
from pipelines.plan.calibration import CALIBRATION
from pipelines.plan.facts import SourceFacts, UserOverrides

SIZES = (32, 64, 128, 256)
LARGEST_NATIVE = 64
"""Largest size at which images that all have the same size are used unscaled."""
WIDTHS = {"narrow": (32, 64), "plain": (64, 64), "wide": (64, 128), "widest": (128, 256)}
"""Network -> channels of the finest level and of the others."""


@dataclass(frozen=True)
class Recipe:
    """A published training, which a plan follows as it is: its network, loss, path, optimizer and sampler.

    Attributes:
        title: of its network.
        source: who published it, and for what.
        size: height and width in pixels that it is for.
        images: that its shortest published training sees.
        batch: images per step.
        model: settings of the network.
        objective: settings of the loss.
        optim: settings of the optimizer but for its warm-up and average, which are parts of the training.
        sampler: settings of the sampler and of guidance.
        guidance_scale: of samples.
        evaluations: of the network for an unguided sample.
    """

    title: str
    source: str
    size: ImageSize
    images: int
    batch: int
    model: Mapping[str, Any]
    objective: Mapping[str, Any]
    optim: Mapping[str, Any]
    sampler: Mapping[str, Any]
    guidance_scale: float
    evaluations: int

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that decide how fast it trains and draws."""
        return {**self.model, **self.objective, "schedule": "flow", **self.optim}


JIT = Recipe(
    title="JiT-B/16",
    source="Li & He 2025, 200 epochs of ImageNet at 256 pixels",
    size=256,
    images=256_233_400,  # 200 epochs of 1,281,167 images
    batch=1024,
    model={"model": "jit_base"},
    objective={"objective": "jit"},
    optim={"optim.lr": 0.0002, "optim.betas": [0.9, 0.95], "optim.decay": "constant", "optim.grad_clip": None},
    sampler={"sampler": "heun", "sampler.steps": 50, "sampler.time": "flow", "guidance.interval": [0.0, 0.9]},
    guidance_scale=2.9,
    evaluations=99,
)


@dataclass(frozen=True)
class Candidate:
    """A network at an image size.

    Attributes:
        size: height and width in pixels; one number for square images.
        network: its name in `WIDTHS`, or "hand" for the user's own.
        settings: fields of the configuration that define it; empty for the user's own.
        recipe: the published training that it is a part of; None for those of `WIDTHS`.
    """

    size: ImageSize
    network: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None

    @property
    def key(self) -> str:
        """Key of the candidate among the measured speeds."""
        return f"{self.network}@{as_setting(self.size)}"

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return math.prod(height_width(self.size))

    @property
    def effort(self) -> float:
        """Factor of training images relative to 32 pixels: larger images need more."""
        return max(1.0, self.pixels / 32**2)

    @property
    def needed(self) -> int:
        """Smallest number of images that it should see."""
        if self.recipe is not None:
            return self.recipe.images
        return round(CALIBRATION.networks.images_needed[self.network] * self.effort)


def candidates(source: SourceFacts, user: UserOverrides) -> tuple[Candidate, ...]:
    """Return the candidates worth measuring, by size and then by network, smallest first."""
    given = user.get("data.image_size", None)
    sizes = image_sizes(source) if given is None else (parse_image_size(given),)
    if user.sets_network():
        return tuple(Candidate(size, "hand") for size in sizes)
    found: list[Candidate] = []
    for size in sizes:
        found += [Candidate(size, name, unet(size, *widths)) for name, widths in WIDTHS.items()]
        if size == JIT.size and not follows_own_method(user):
            found.append(Candidate(size, str(JIT.model["model"]), JIT.model, JIT))
    return tuple(found)


def follows_own_method(user: UserOverrides) -> bool:
    """Return whether the user has set a part of the method that a recipe gives."""
    return any(key.partition(".")[0] in ("objective", "schedule", "optim", "sampler") for key in user.settings)


def image_sizes(source: SourceFacts) -> tuple[ImageSize, ...]:
    """Return the sizes at which a source could be trained, in pixels.

    None is above that of its median image; the smallest is 8 pixels, however small the images are.
    """
    native = native_size(source)
    if native is not None:
        height, width = height_width(native)
        if max(height, width) <= 32:
            return (native,)
        times = 32 / max(height, width)
        return of_sides(*(max(8, int(side * times) // 4 * 4) for side in (height, width))), native
    _, median, _ = source.shorter_sides
    fitting = tuple(size for size in SIZES if size <= median)
    return fitting or (max(8, median - median % 4),)


def native_size(source: SourceFacts) -> ImageSize | None:
    """Return the common size if all images are small and of a size that networks can halve twice; else None."""
    if source.one_size is None:
        return None
    width, height = source.one_size
    fits = all(8 <= side <= LARGEST_NATIVE and side % 4 == 0 for side in (height, width))
    return of_sides(height, width) if fits else None


def unet(size: ImageSize, first: int, others: int) -> dict[str, Any]:
    """Return the settings of a UNet that halves images down to 4 to 8 pixels, with attention at 16 pixels or less."""
    sides, levels = height_width(size), 2
    while all(side % 2**levels == 0 and side // 2**levels >= 7 for side in sides):
        levels += 1
    longest = [max(sides) >> level for level in range(levels)]
    attends = next((level for level, side in enumerate(longest) if level and side <= 16), levels - 1)
    return {
        "model.kind": "unet",
        "model.channels": [first, *[others] * (levels - 1)],
        "model.attention": [level == attends for level in range(levels)],
        "model.head_dim": 32 if first == 32 else 64,
    }
