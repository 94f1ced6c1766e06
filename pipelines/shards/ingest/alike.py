"""Near-duplicates of a source, which are kept in one split: a model must not be tested on images it was trained on.

Two images are alike where their perceptual hashes differ in at most 6 of 63 bits and their small grey copies correlate
by more than `ALIKE`: resized, recompressed and slightly brighter copies are, different photographs are not. The hash
(pHash: the signs of the lowest frequencies of the DCT about their median) finds all pairs within that distance without
comparing all with all, see `neighbours`. An image joins the first similar one in the order of the source, and none
that is similar only to the joined one: so groups do not grow together.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import merge
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipelines.shards.ingest.collect import Filters
from pipelines.shards.ingest.encode import open_image
from pipelines.shards.ingest.manifest import Manifest, SourceImage, parquet
from pipelines.shards.ingest.neighbours import near_groups
from pipelines.shards.ingest.readers import UnreadableError
from pipelines.shards.ingest.report import Names
from pipelines.storage import Storage, join, layout

SIDE, LOWEST, SMALL = 32, 8, 12
ALIKE = 0.99
BITS = 6
FLAT = 2.0
"""Standard deviation of grey levels, of 0..255, below which an image is too uniform to be compared."""

_SCHEMA = pa.schema(
    [
        ("file", pa.binary()),
        ("hash", pa.int64()),
        ("small", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


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


def fingerprint_part(number: int, images: Manifest, uri: str) -> None:
    """Store the fingerprints of the images of a part; those that are recorded for the same files are not made again.

    Args:
        number: number of the part.
        images: the manifest.
        uri: address of the folder of fingerprints.
    """
    listed, storage, address = images.part(number), images.storage, join(uri, layout.parquet_part(number))
    data = storage.find(address)
    known: dict[bytes, dict[str, Any]] = {}
    if data is not None:
        known = {row["file"]: row for row in pq.read_table(io.BytesIO(data)).to_pylist()}
    files = [hashlib.sha256(json.dumps([image.origin, image.stamp]).encode()).digest()[:16] for image in listed]
    if data is not None and files == list(known):
        return
    rows = [known.get(key) or _row(key, image, storage) for key, image in zip(files, listed, strict=True)]
    storage.write(address, parquet(pa.Table.from_pylist(rows, _SCHEMA)))


def _row(key: bytes, image: SourceImage, storage: Storage) -> dict[str, Any]:
    try:
        opened = open_image(image.read(storage), reduced_to=SIDE)
    except UnreadableError:
        return {"file": key}
    found, (width, height) = fingerprint(opened.image), opened.size
    hashed = {"hash": found.hash, "small": found.small.tobytes()} if found else {}
    return {"file": key, "width": width, "height": height, **hashed}


@dataclass(frozen=True)
class Fingerprints:
    """The stored fingerprints of the images of a manifest.

    Attributes:
        images: the manifest.
        uri: address of the folder of their parts.
        filters: images that these leave out by size are compared with none.
    """

    images: Manifest
    uri: str
    filters: Filters

    def hashes(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """Yield (positions among all images, hashes) of the images of a part that are compared."""
        for number, start in zip(self.images.numbers, self.images.starts(), strict=True):
            rows = self._part(number, "hash", "width", "height")
            kept = [
                (place, value)
                for place, (value, *size) in enumerate(zip(*(column.to_pylist() for column in rows), strict=True))
                if value is not None and self.filters.by_size(size) is None
            ]
            places, hashes = zip(*kept, strict=True) if kept else ((), ())
            yield start + np.array(places, np.int64), np.array(hashes, np.uint64)

    def leaders(self, scratch: Path) -> Iterator[tuple[int, int]]:
        """Yield (position of an image, position of the first similar one), in the order of the images.

        Args:
            scratch: an empty folder on this machine.
        """
        small = lru_cache(maxsize=64)(self._small)

        def alike(one: int, other: int) -> bool:
            return correlate(self._at(one, small), self._at(other, small))

        return leaders(near_groups(self.hashes(), BITS, scratch), alike)

    def _at(self, position: int, small: Callable[[int], list[bytes]]) -> NDArray[np.float32]:
        place, within = self.images.place(position)
        return np.frombuffer(small(place)[within], np.float32)

    def _small(self, place: int) -> list[bytes]:
        found: list[bytes] = self._part(self.images.numbers[place], "small")[0].to_pylist()
        return found

    def _part(self, number: int, *columns: str) -> list[pa.ChunkedArray]:
        data = self.images.storage.read(join(self.uri, layout.parquet_part(number)))
        table = pq.read_table(io.BytesIO(data), columns=list(columns))
        return [table.column(column) for column in columns]


def leaders(
    near: Iterator[tuple[int, tuple[Any, ...]]], alike: Callable[[int, int], bool]
) -> Iterator[tuple[int, int]]:
    """Yield (image, first similar one) of each image that joins another one.

    Args:
        near: see `near_groups`.
        alike: whether an image and an earlier one of a near group are similar.
    """
    alone: dict[int, list[int]] = {}  # group -> its images that joined no other, ascending
    for image, (group, others) in near:
        before = merge(*(alone.get(each, ()) for each in (group, *others)))
        leader = next((other for other in before if alike(image, other)), None)
        if leader is None:
            alone.setdefault(group, []).append(image)
        else:
            yield image, leader


def correlate(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    """Return whether two small copies correlate as those of similar images do."""
    return float(one @ other) > ALIKE


def keep_together(
    images: Manifest, leaders: Iterator[tuple[int, int]], alike: Names, *, remove: bool = False
) -> Iterator[SourceImage]:
    """Yield the images, near-duplicates in the split of the first one.

    Args:
        images: images of a source.
        leaders: see `Fingerprints.leaders`.
        alike: gets a line for each image that is nearly the same as an earlier one.
        remove: leave out the near-duplicates.
    """
    part = lru_cache(maxsize=8)(images.part)
    following = next(leaders, None)
    for position, image in enumerate(images):
        if following is None or following[0] != position:
            yield image
            continue
        place, within = images.place(following[1])
        leader = part(images.numbers[place])[within]
        alike.add(f"{image.origin} and {leader.origin}")
        if not remove:
            yield replace(image, split=leader.split)
        following = next(leaders, None)


def _cosines() -> NDArray[np.float64]:
    """Return the lowest rows of the matrix of the DCT-II, [8, 32]."""
    k, n = np.arange(LOWEST)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))


_DCT = _cosines()
