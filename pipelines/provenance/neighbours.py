"""Search of tars for the images nearest to others, by the pixels of small copies; equal pictures count as one."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.image_size import ImageSize
from ddpm.memorisation import pixel_neighbours
from pipelines.evaluation.images import thumbnails
from pipelines.provenance.prints import read_images
from pipelines.shards.audit.recorded import Advance, Tar, read_sidecar
from pipelines.shards.members import FlawError, decode_pixels
from pipelines.storage import Storage

NEIGHBOURS = 6
"""Training images that are found: the nearest, and those whose mean distance its own is compared with."""
AT_ONCE = 256
"""Images that are made small at a time."""


@dataclass(frozen=True, eq=False)
class Found:
    """The training images nearest to each of N images, nearest first; equal ones are one.

    Attributes:
        distance: in grey levels of 0..255, float32 [N, k]; infinite where there are fewer training images.
        digest: of the small copy, up to mirroring, uint64 [N, k].
        mirrored: whether the image was mirrored before it was compared, bool [N, k].
        places: digest -> where the images nearest to the first image are, as (dataset, shard, index).
        count: number of training images that were looked at.
    """

    distance: NDArray[np.float32]
    digest: NDArray[np.uint64]
    mirrored: NDArray[np.bool_]
    places: Mapping[int, tuple[tuple[str, str, int], ...]]
    count: int

    @classmethod
    def nothing(cls, images: int) -> Found:
        """Return what is found where there is no training image."""
        shape = (images, NEIGHBOURS)
        none = np.full(shape, np.inf, np.float32)
        return cls(none, np.zeros(shape, np.uint64), np.zeros(shape, np.bool_), {}, 0)

    def __add__(self, other: Found) -> Found:
        """Return what is found among the training images of both."""
        distance, digest, mirrored = (
            np.concatenate([getattr(self, name), getattr(other, name)], 1)
            for name in ("distance", "digest", "mirrored")
        )
        # The same picture in both: the later one counts no more.
        again = (self.digest[:, :, None] == other.digest[:, None, :]) & np.isfinite(self.distance)[:, :, None]
        distance[:, NEIGHBOURS:][again.any(1)] = np.inf
        order = np.argsort(distance, 1, kind="stable")[:, :NEIGHBOURS]
        distance, digest, mirrored = (np.take_along_axis(each, order, 1) for each in (distance, digest, mirrored))
        near = {int(each) for each, far in zip(digest[0], distance[0], strict=True) if np.isfinite(far)}
        places = {each: self.places.get(each, ()) + other.places.get(each, ()) for each in near}
        return Found(distance, digest, mirrored, places, self.count + other.count)


@dataclass(frozen=True, eq=False)
class NearestTar:
    """Find the images of a tar that are nearest to images.

    Attributes:
        uri: folder of the dataset.
        storage: the store.
        left_out: shard -> indices of its samples that are not looked at; None for all.
        size: height and width of its images.
        channels: of its images.
        images: small copies, uint8 [N, C, h, w].
    """

    uri: str
    storage: Storage
    left_out: Mapping[str, Collection[int] | None]
    size: ImageSize
    channels: int
    images: NDArray[np.uint8]

    def __call__(self, tar: Tar, advance: Advance) -> Found:
        """Read the images of the tar.

        Raises:
            DatasetError: its index is gone or damaged.
        """
        assert tar.expected is not None
        small, indices = self._read(tar)
        advance(tar.entry.size)
        if not len(small):
            return Found.nothing(len(self.images))
        digests = np.array([picture_digest(each) for each in small], np.uint64)
        distinct, first = np.unique(digests, return_index=True)
        k = min(NEIGHBOURS, len(first))
        near = pixel_neighbours(torch.from_numpy(self.images), torch.from_numpy(small[first]), k=k)
        index, rest = near.index.numpy(), ((0, 0), (0, NEIGHBOURS - k))
        places = {
            int(distinct[at]): tuple((self.uri, tar.name, indices[i]) for i in np.flatnonzero(digests == distinct[at]))
            for at in index[0]
        }
        return Found(
            distance=np.pad(near.distance.numpy(), rest, constant_values=np.inf),
            digest=np.pad(distinct[index], rest),
            mirrored=np.pad(near.mirrored.numpy(), rest),
            places=places,
            count=len(small),
        )

    def _read(self, tar: Tar) -> tuple[NDArray[np.uint8], list[int]]:
        """Return small copies of the images of a tar, uint8 [M, C, h, w], and the index of each in the tar."""
        assert tar.expected is not None
        out = self.left_out.get(tar.name, ())
        index = read_sidecar(tar.expected, self.uri, self.storage)
        kept = [] if out is None else [i for i in range(len(index)) if i not in out]
        parts, pixels, indices = [self.images[:0]], list[NDArray[np.uint8]](), []
        for at, name, data in read_images(index.select(kept), tar.entry.uri, self.storage):
            try:
                pixels.append(decode_pixels({name: data}, self.size, self.channels))
            except FlawError:  # which training leaves out, too
                continue
            indices.append(kept[at])
            if len(pixels) == AT_ONCE:
                parts.append(small_copies(pixels))
                pixels = []
        return np.concatenate([*parts, *([small_copies(pixels)] if pixels else [])]), indices


def small_copies(pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return small copies, uint8 [N, C, h, w], of images [H, W, C]."""
    return thumbnails(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))


def picture_digest(small: NDArray[np.uint8]) -> int:
    """Return a digest of a small copy [C, h, w] that is the same for its mirror image."""
    both = (np.ascontiguousarray(each).tobytes() for each in (small, small[:, :, ::-1]))
    return min(int.from_bytes(hashlib.blake2b(each, digest_size=8).digest(), "little") for each in both)
