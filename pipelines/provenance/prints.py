"""Digests and fingerprints of all samples of a dataset, by which a picture is found in it.

They are computed from the stored images, and so are there for datasets of any origin. Those of a tar are recorded below
the dataset in `prints/`, and computed again where the tar has changed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm.image_size import ImageSize
from pipelines.shards.audit.recorded import (
    Advance,
    Tar,
    TarReading,
    image_members,
    read_members,
    read_shards,
    read_sidecar,
    stamp,
)
from pipelines.shards.erased import pixels_digest
from pipelines.shards.index import Dataset, ShardIndex, ShardInfo
from pipelines.shards.ingest.alike import fingerprint
from pipelines.shards.members import FlawError, decode_pixels
from pipelines.storage import Storage, layout

DIGEST_BYTES = 16
_ROW = np.dtype([("file", "V16"), ("pixels", "V16"), ("hash", "<i8")])


@dataclass(frozen=True, eq=False)
class Prints:
    """What identifies the images of a tar, in the order of its samples.

    Attributes:
        rows: [samples] with the first 16 bytes of the SHA-256 of the file (`file`) and of its pixels (`pixels`), 0
            where there is no image that can be read; and the perceptual hash (`hash`), -1 for uniform images.
    """

    rows: NDArray[np.void]

    def equal(self, field: str, digest: bytes) -> NDArray[np.int64]:
        """Return the indices of the samples with this digest.

        Args:
            field: "file" or "pixels".
            digest: SHA-256, or its first bytes.
        """
        wanted = np.frombuffer(digest[:DIGEST_BYTES], "V16")[0]
        return np.flatnonzero(self.rows[field] == wanted)

    def near(self, value: int, most: int) -> NDArray[np.int64]:
        """Return the indices of the samples whose perceptual hash differs in at most so many bits."""
        hashes = self.rows["hash"]
        differing = np.bitwise_count((hashes ^ np.int64(value)).view(np.uint64))
        return np.flatnonzero((hashes >= 0) & (differing <= most))


def file_digest(data: bytes | memoryview) -> bytes:
    """Return the digest of an image file."""
    return hashlib.sha256(data).digest()


def as_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return pixels [H, W, channels] as an image of Pillow."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


@dataclass(frozen=True)
class PrintTar:
    """Compute what identifies the images of a tar.

    Attributes:
        uri: folder of the dataset.
        storage: the store.
        size: height and width of its images, one number for square ones.
        channels: of its images.
    """

    uri: str
    storage: Storage
    size: ImageSize
    channels: int

    def inputs(self, tar: Tar) -> Any:
        """Return what decides the result besides the tar."""
        return ["prints", self.size, self.channels, stamp(tar.sidecar)]

    def __call__(self, tar: Tar, advance: Advance) -> Prints:
        """Read the images of the tar.

        Raises:
            DatasetError: its index is gone or damaged.
        """
        assert tar.expected is not None
        index = read_sidecar(tar.expected, self.uri, self.storage)
        rows = np.zeros(len(index), _ROW)
        rows["hash"] = -1
        for i, name, data in read_images(index, tar.entry.uri, self.storage):
            rows["file"][i] = file_digest(data)[:DIGEST_BYTES]
            try:
                pixels = decode_pixels({name: data}, self.size, self.channels)
            except FlawError:  # `ddpm check` says so; its bytes are known
                continue
            rows["pixels"][i] = pixels_digest(pixels)[:DIGEST_BYTES]
            if (found := fingerprint(as_image(pixels))) is not None:
                rows["hash"][i] = found.hash
        advance(tar.entry.size)
        return Prints(rows)

    def to_plain(self, result: Prints) -> Any:
        """Return the prints as text."""
        return base64.b64encode(result.rows.tobytes()).decode()

    def from_plain(self, plain: Any, tar: Tar) -> Prints:
        """Return the prints of a record.

        Raises:
            ValueError: it is damaged.
        """
        rows = np.frombuffer(base64.b64decode(plain), _ROW)
        if tar.expected is None or len(rows) != tar.expected.samples:
            raise ValueError("a record of another number of samples")
        return Prints(rows)


def read_prints(dataset: Dataset, storage: Storage, reading: TarReading) -> Iterator[tuple[ShardInfo, Prints]]:
    """Yield what identifies the images of each shard of a dataset, as soon as it is known.

    Shards that are not there are left out; `ddpm check` names them.

    Args:
        reading: where tars without a record are read, and who is told.
    """
    work = PrintTar(dataset.uri, storage, dataset.image_size, dataset.channels)
    yield from read_shards(dataset, work, layout.PRINTS, storage, reading)


def read_images(index: ShardIndex, uri: str, storage: Storage) -> Iterator[tuple[int, str, memoryview]]:
    """Yield (index of the sample, extension, bytes) of each sample with an image, in the order of the tar."""
    yield from read_members(image_members(index), uri, storage)
