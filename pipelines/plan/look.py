"""Examination of a source of images: counts from its listing, sizes and colours from a few opened images."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.environment.scratch import temporary_folder
from pipelines.plan.facts import Mirror, SourceFacts
from pipelines.plan.mirror import tell_mirrored
from pipelines.presentation.errors import ConfigError
from pipelines.shards.ingest.encode import ImageFormat, open_image
from pipelines.shards.ingest.manifest import Manifest, SourceImage
from pipelines.shards.ingest.readers import UnreadableError
from pipelines.shards.ingest.sources import Source, open_source
from pipelines.shards.ingest.tasks import seconds_of_image
from pipelines.shards.text import DEFAULT_ENCODER, TextEncoder
from pipelines.storage import Storage

OPENED, LEAST_OPENED = 1_000, 16
"""Largest number of opened images, and the smallest, regardless of time."""
LOOKING_S = 8.0
SIDE = 16
"""Height and width of the images in the test of mirror images."""
COLOUR = 6
"""Difference of two channels, of 0..255, from which on a pixel counts as coloured; JPEG artefacts are smaller."""


@dataclass(frozen=True)
class OpenedImage:
    """Properties of one opened image.

    Attributes:
        size: width and height in pixels, upright.
        coloured: whether any pixel is coloured.
        small: uint8 [SIDE, SIDE, 3].
        label: class index; None without labels.
    """

    size: tuple[int, int]
    coloured: bool
    small: NDArray[np.uint8]
    label: int | None


def look(source: str, storage: Storage, *, test_fraction: float = 0.1, encoder: str | None = "auto") -> SourceFacts:
    """Return the facts about a source, from its listing and as many images as can be opened in a few seconds.

    Args:
        source: source of images, as for `ingest`.
        test_fraction: share of test images if the source has no test split.
        encoder: text encoder of captions: a hub name or folder, None for none, "auto" for the default.

    Raises:
        DatasetError: there is no such source, or it has no images.
        ConfigError: the captions need a text encoder that cannot be loaded here.
    """
    with temporary_folder("look") as scratch:
        return _facts(source, open_source(source, storage, f"file://{scratch}", test_fraction), storage, encoder)


def _facts(source: str, listed: Source, storage: Storage, encoder: str | None) -> SourceFacts:
    if not listed.images:
        raise ConfigError(f"{source} has no images: {'; '.join(listed.unused) or 'it is empty'}")
    opened, unreadable = _open_some(listed.images, storage)
    sides = [min(image.size) for image in opened] or [0]
    sizes = {image.size for image in opened}
    captions = [image.caption for image in listed.images if image.caption]
    name, width, caption_s = _encoder(source, captions, encoder)
    counts = Counter(image.label for image in listed.images)
    low, usual, high = (int(side) for side in np.quantile(sides, (0.1, 0.5, 0.9), method="nearest"))
    coloured = sum(image.coloured for image in opened)
    return SourceFacts(
        source=source,
        images=len(listed.images),
        test_images=sum(image.split == "test" for image in listed.images),
        class_counts={name: counts[i] for i, name in enumerate(listed.classes)},
        captions=len(captions),
        shorter_sides=(low, usual, high),
        one_size=sizes.pop() if len(sizes) == 1 else None,
        grey=bool(opened) and coloured <= len(opened) // 100,
        opened=len(opened) + unreadable,
        unreadable=unreadable,
        write_s=seconds_of_image(listed.images, storage, ImageFormat(max(8, min(low, 64)), 3)),
        mirror=_mirror(opened),
        names_sides=_share_with_sides(captions) > 0.01,
        encoder=name,
        encoder_width=width,
        caption_s=caption_s,
    )


def _open_some(images: Manifest, storage: Storage) -> tuple[list[OpenedImage], int]:
    """Open the first images of a list for a few seconds; return them, and the number that cannot be opened."""
    began, unreadable = time.monotonic(), 0
    opened: list[OpenedImage] = []
    for image in images.first(OPENED):
        if time.monotonic() - began > LOOKING_S and len(opened) + unreadable >= LEAST_OPENED:
            break
        try:
            opened.append(_opened(image, storage))
        except UnreadableError:
            unreadable += 1
    return opened, unreadable


def _opened(image: SourceImage, storage: Storage) -> OpenedImage:
    picture = open_image(image.read(storage), reduced_to=4 * SIDE)
    rgb = picture.image.convert("RGB")
    pixels = np.asarray(rgb.resize((4 * SIDE, 4 * SIDE), Image.Resampling.BOX), dtype=np.int16)
    spread = pixels.max(-1) - pixels.min(-1)
    small = np.asarray(rgb.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.uint8)
    return OpenedImage(picture.size, bool((spread > COLOUR).mean() > 0.001), small, image.label)


def _mirror(opened: Sequence[OpenedImage]) -> Mirror:
    if len(opened) < 2 * LEAST_OPENED:
        return Mirror(0.5, 0)
    images = np.stack([image.small for image in opened])
    labels = np.array([image.label or 0 for image in opened])
    return tell_mirrored(images, labels)


def _share_with_sides(captions: Sequence[str]) -> float:
    return sum(bool(re.search(r"\b(left|right)\b", text.lower())) for text in captions) / max(len(captions), 1)


def _encoder(source: str, captions: Sequence[str], encoder: str | None) -> tuple[str | None, int, float]:
    """Return name and width of the text encoder, and seconds per caption; the name is None without captions.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if not captions or encoder is None:
        return None, 0, 0.0
    name = DEFAULT_ENCODER if encoder == "auto" else encoder
    try:
        text_encoder = TextEncoder(name)
    except ValueError as error:
        raise ConfigError(
            f"{source} has captions, and their text encoder cannot be loaded: {error}. Name another with "
            "data.text_encoder=FOLDER, or ignore the captions with data.text_encoder=null"
        ) from error
    some = list(captions[:32])
    began = time.monotonic()
    text_encoder(some)
    return name, text_encoder.dim, (time.monotonic() - began) / len(some)
