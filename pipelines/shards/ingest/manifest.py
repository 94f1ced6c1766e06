"""The manifest of a source: its images in the order in which they are written, as Parquet parts at the destination.

A part holds the images whose hashes begin with the same bits, so that an image that comes or goes changes one part.
Nobody holds more than a few parts at a time.
"""

from __future__ import annotations

import hashlib
import io
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, groupby, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shards.ingest.readers import Read, as_columns, from_columns
from pipelines.shards.ingest.spool import ahead
from pipelines.storage import Storage, join, layout

IMAGES_IN_A_PART = 1024
"""Largest mean number of images in a part."""
RANK_BITS = 64
WRITES_AT_ONCE = 8
_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("label", pa.int64()),
        ("caption", pa.string()),
        ("origin", pa.string()),
        ("stamp", pa.string()),
        ("reader", pa.string()),
        ("uri", pa.binary()),
        ("place", pa.list_(pa.int64())),
        ("data", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image to ingest, not yet opened.

    Attributes:
        split: "train" or "test".
        label: index into the classes; None for data without labels.
        caption: caption; None where the source has none.
        origin: path within the source, for reports and the sample's json.
        stamp: text that changes when the bytes of the file change.
        read: returns the bytes of the file.
    """

    split: str
    label: int | None
    caption: str | None
    origin: str
    stamp: str
    read: Read


@dataclass(frozen=True)
class Manifest:
    """All images of a source, in the order in which they are written.

    Attributes:
        uri: address of the folder of the parts.
        storage: storage that holds them.
        numbers: numbers of the parts that hold an image, ascending.
        sizes: images in each of them.
    """

    uri: str
    storage: Storage
    numbers: array[int]
    sizes: array[int]

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(self.sizes)

    def __iter__(self) -> Iterator[SourceImage]:
        """Yield the images of all splits, in order."""
        for number in self.numbers:
            yield from self.part(number)

    def first(self, count: int) -> tuple[SourceImage, ...]:
        """Return the first images, or all of them where there are fewer."""
        return tuple(islice(self, count))

    def part(self, number: int) -> list[SourceImage]:
        """Return the images of a part."""
        table = pq.read_table(io.BytesIO(self.storage.read(join(self.uri, layout.parquet_part(number)))))
        return [_image(row) for row in table.to_pylist()]

    def starts(self) -> array[int]:
        """Return for each part the position of its first image among all."""
        return array("Q", accumulate(self.sizes[:-1], initial=0)) if self.sizes else array("Q")

    def place(self, position: int) -> tuple[int, int]:
        """Return which of the parts holds the image at a position, and its place in that part."""
        starts = self.starts()
        number = bisect_right(starts, position) - 1
        return number, position - starts[number]


def rank(path: str) -> str:
    """Return the hash by which images are ordered, so that shards mix all classes."""
    return hashlib.sha256(path.encode()).hexdigest()


def write_manifest(images: Iterable[tuple[str, SourceImage]], most: int, uri: str, storage: Storage) -> Manifest:
    """Write the parts of a manifest.

    Args:
        images: (rank, image), in the order of the ranks.
        most: number of images, or a little more; decides the number of parts.
        uri: address of the folder of the parts.
        storage: storage to write them to.
    """
    bits = max(0, (max(most, 1) - 1).bit_length() - (IMAGES_IN_A_PART.bit_length() - 1))
    numbers, sizes = array("Q"), array("Q")

    def parts() -> Iterator[tuple[int, list[SourceImage]]]:
        for number, found in groupby(images, key=lambda ranked: int(ranked[0][:16], 16) >> (RANK_BITS - bits)):
            part = [image for _, image in found]
            numbers.append(number)
            sizes.append(len(part))
            yield number, part

    def write(part: tuple[int, list[SourceImage]]) -> None:
        number, listed = part
        table = pa.Table.from_pylist([_row(image) for image in listed], _SCHEMA)
        storage.write(join(uri, layout.parquet_part(number)), parquet(table))

    with ThreadPoolExecutor(WRITES_AT_ONCE, thread_name_prefix="manifest") as pool:
        for _ in ahead(pool, write, parts(), WRITES_AT_ONCE):
            pass
    return Manifest(uri, storage, numbers, sizes)


def parquet(table: pa.Table) -> bytes:
    """Return a table as a Parquet file; equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_statistics=False)
    return buffer.getvalue()


def _row(image: SourceImage) -> dict[str, Any]:
    named = {name: getattr(image, name) for name in ("split", "label", "caption", "origin", "stamp")}
    return named | as_columns(image.read)


def _image(row: dict[str, Any]) -> SourceImage:
    read = from_columns(row)
    return SourceImage(row["split"], row["label"], row["caption"], row["origin"], row["stamp"], read)
