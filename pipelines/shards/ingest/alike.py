"""Near-duplicates of a source, which are kept in one split: a model must not be tested on images it was trained on.

Two images are alike where their perceptual hashes differ in at most 6 of 63 bits and their small grey copies correlate
by more than `ALIKE`: resized, recompressed and slightly brighter copies are, different photographs are not. The hash
(pHash: the signs of the lowest frequencies of the DCT about their median) finds the pairs without comparing all with
all: one of its four parts has to be equal. An image joins the first similar one in the order of the source, and none
that is similar only to the joined one: so groups do not grow together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.shards.ingest.encode import open_image
from pipelines.shards.ingest.readers import UnreadableError
from pipelines.shards.ingest.sources import Source, SourceImage
from pipelines.storage import Storage

SIDE, LOWEST, SMALL = 32, 8, 12
ALIKE = 0.99
BITS = 6
PARTS = 4
MOST_IN_A_PART = 64
"""Largest number of images with an equal part of the hash that one is compared with: more are of a kind that the hash
does not distinguish, such as drawings on white."""
FLAT = 2.0
"""Standard deviation of grey levels, of 0..255, below which an image is too uniform to be compared."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The fingerprints by which images are compared.

    Attributes:
        hash: 63 bits.
        small: grey copy [144] of mean 0 and norm 1, float32.
    """

    hash: int
    small: NDArray[np.float32]


def fingerprint(image: Image.Image) -> Fingerprint | None:
    """Return the fingerprint of an upright image; None if it is uniform."""
    grey = image.convert("L")
    pixels = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64)
    small = np.asarray(grey.resize((SMALL, SMALL), Image.Resampling.BICUBIC), dtype=np.float32).ravel()
    if small.std() < FLAT:
        return None
    lowest = (_DCT @ pixels @ _DCT.T).ravel()[1:]
    bits = lowest > np.median(lowest)
    centred = small - small.mean()
    return Fingerprint(int("".join("1" if bit else "0" for bit in bits), 2), centred / np.linalg.norm(centred))


def fingerprints(images: Sequence[SourceImage], storage: Storage) -> list[Fingerprint | None]:
    """Return the fingerprint of each image; None if it cannot be read or is uniform."""
    found: list[Fingerprint | None] = []
    for image in images:
        try:
            found.append(fingerprint(open_image(image.read(storage), reduced_to=SIDE).image))
        except UnreadableError:
            found.append(None)
    return found


def keep_together(source: Source, prints: Sequence[Fingerprint | None]) -> tuple[Source, tuple[str, ...]]:
    """Move near-duplicates into the split of the first one; return the source and descriptions of the pairs.

    Args:
        source: source with random splits.
        prints: fingerprints of its images.

    Returns:
        The source, and a line for each image that is nearly the same as an earlier one.
    """
    images, said = list(source.images), []
    for number, leader in enumerate(leaders(prints)):
        if leader != number:
            images[number] = replace(images[number], split=images[leader].split)
            said.append(f"{images[number].origin} and {images[leader].origin}")
    return replace(source, images=tuple(images)), tuple(said)


def leaders(found: Sequence[Fingerprint | None]) -> list[int]:
    """Return for each image the index of the first similar one, or its own."""
    parts: dict[tuple[int, int], list[int]] = defaultdict(list)
    leader = []
    for number, own in enumerate(found):
        if own is None:
            leader.append(number)
            continue
        keys = [(part, own.hash >> (16 * part) & 0xFFFF) for part in range(PARTS)]
        near = sorted({other for key in keys for other in parts[key]})
        first = next((other for other in near if _alike(own, found[other])), number)
        leader.append(first)
        if first == number:
            for key in keys:
                if len(parts[key]) < MOST_IN_A_PART:
                    parts[key].append(number)
    return leader


def _alike(one: Fingerprint, other: Fingerprint | None) -> bool:
    return other is not None and (one.hash ^ other.hash).bit_count() <= BITS and float(one.small @ other.small) > ALIKE


def _cosines() -> NDArray[np.float64]:
    """Return the lowest rows of the matrix of the DCT-II, [8, 32]."""
    k, n = np.arange(LOWEST)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))


_DCT = _cosines()
