"""Samples whose bytes were overwritten in the shards of a dataset (`ddpm forget --erase`).

A blank image takes the place of the picture, spaces that of its text, and zeros that of what is not known. All have the
size of what was there, so that every other sample lies where it lay, and a training that is running goes on reading.
The digests of the shards and of the dataset change. A signed record says from which to which, and what was erased: by
it the order of earlier trainings can still be computed, and a version that was scored before is still verified.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.index import Dataset, ShardIndex, make_dataset, read_dataset
from pipelines.shards.quarantine import Quarantine, quarantine_of
from pipelines.signing import SignatureError, Trust, said, unseal
from pipelines.storage import Storage, join, layout


@dataclass(frozen=True)
class ImageFile:
    """An image, by what its file is recognised by."""

    size: int
    crc32: int
    sha256: str

    @classmethod
    def of(cls, data: bytes | memoryview) -> ImageFile:
        """Return what the bytes of a file are recognised by."""
        return cls(len(data), zlib.crc32(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class ErasedSample:
    """A sample whose bytes were overwritten.

    Attributes:
        shard, index, key: which it is, as in dataset.json and its sidecar.
        image: what its image was recognised by.
        blank: what the image in its place is recognised by.
        pixels: SHA-256 of the pixels that it had; "" where it could not be decoded.
    """

    shard: str
    index: int
    key: str
    image: ImageFile
    blank: ImageFile
    pixels: str = ""


@dataclass(frozen=True)
class Overwritten:
    """Bytes of a shard that others took the place of.

    Attributes:
        shard: name of the shard.
        offset, size: of the bytes in the file.
        begin: what is there now, in base64.
        fill: the byte that is repeated behind that.
        member: (extension, index of the sample) in the sidecar.
        crc32: of what is there now.
    """

    shard: str
    offset: int
    size: int
    begin: str
    fill: int
    member: tuple[str, int]
    crc32: int

    def data(self) -> bytes:
        """Return what is there now."""
        return base64.b64decode(self.begin).ljust(self.size, bytes([self.fill]))


@dataclass(frozen=True)
class Erasure:
    """The record of samples that were erased from a dataset together.

    Attributes:
        before, after: digest of the dataset.
        shards: name -> SHA-256 of the file before and after.
        samples: the samples.
        overwritten: which bytes others took the place of.
        at: when it was asked for, in UTC.
    """

    before: str
    after: str
    shards: Mapping[str, tuple[str, str]]
    samples: tuple[ErasedSample, ...]
    overwritten: tuple[Overwritten, ...]
    at: str

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Erasure:
        """Return a record of JSON types.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        samples = tuple(
            ErasedSample(**{**each, "image": ImageFile(**each["image"]), "blank": ImageFile(**each["blank"])})
            for each in plain["samples"]
        )
        overwritten = tuple(
            Overwritten(**{**each, "member": (each["member"][0], int(each["member"][1]))})
            for each in plain["overwritten"]
        )
        shards = {name: (before, after) for name, (before, after) in plain["shards"].items()}
        return cls(plain["before"], plain["after"], shards, samples, overwritten, plain["at"])

    def undone(self, dataset: Dataset) -> Dataset | None:
        """Return the dataset as it was before, without the bytes; None where this erasure did not lead to it.

        That it was this one is proven by its digest, whoever wrote the record.
        """
        earlier = with_digests(dataset, {name: before for name, (before, _) in self.shards.items()})
        return earlier if dataset.digest == self.after and earlier.digest == self.before else None


def erasures(uri: str, storage: Storage, trust: Trust | None = None) -> list[Erasure]:
    """Return the records of what was erased from a dataset, or is about to be.

    Args:
        trust: leave out those that nobody who is trusted has signed; None to leave out none.
    """
    found = []
    for entry in storage.list(join(uri, layout.ERASURES)):
        content, digest = storage.read(entry.uri), entry.uri.rpartition("/")[2].removesuffix(".json")
        place = layout.erasure_file(digest)
        with suppress(SignatureError, KeyError, TypeError, ValueError):
            found.append(Erasure.of_plain(said(content) if trust is None else unseal(content, place, trust)))
    return found


def erased_samples(dataset: Dataset, storage: Storage) -> dict[tuple[str, int], ErasedSample]:
    """Return the erased samples of a dataset by (shard, index): those in whose place the blank of a record is."""
    records = {(each.shard, each.index): each for one in erasures(dataset.uri, storage) for each in one.samples}
    shards = {shard.name: shard for split in dataset.splits for shard in dataset.shards(split)}
    found = {}
    for name in {shard for shard, _ in records} & shards.keys():
        index = ShardIndex.from_json(storage.read(layout.index_name(shards[name].address(dataset.uri))))
        for (shard, i), each in records.items():
            if shard == name and i < len(index.keys):
                members = index.members(i).values()
                if (each.blank.size, each.blank.crc32) in {(member.size, member.crc32) for member in members}:
                    found[shard, i] = each
    return found


def datasets_before(dataset: Dataset, storage: Storage, trust: Trust | None = None) -> Iterator[Dataset]:
    """Yield the dataset as it is, and then as it was before each erasure, without the bytes that are gone.

    Args:
        trust: go back only as far as somebody who is trusted has signed that nothing else was changed.
    """
    yield dataset
    todo = erasures(dataset.uri, storage, trust)
    while todo:
        earlier = next((found for each in todo if (found := each.undone(dataset)) is not None), None)
        if earlier is None:
            return
        yield earlier
        todo, dataset = [each for each in todo if each.before != earlier.digest], earlier


def stream_before(uri: str, digest: str, storage: Storage) -> tuple[Dataset, Quarantine | None] | None:
    """Return the dataset and the quarantine whose stream has a digest, as it is or as it was before erasures.

    Returns:
        None where the dataset was written again since, or the quarantine is not kept.

    Raises:
        DatasetError: there is no dataset, or it is damaged.
    """
    for dataset in datasets_before(read_dataset(uri, storage), storage):
        found = quarantine_of(dataset, digest, storage)
        if found is not None:
            return dataset, found[0]
    return None


def pixels_digest(pixels: NDArray[np.uint8]) -> bytes:
    """Return the digest of decoded pixels [H, W, channels]."""
    return hashlib.sha256(pixels.tobytes()).digest()


def with_digests(dataset: Dataset, digests: Mapping[str, str]) -> Dataset:
    """Return a dataset whose shards have other SHA-256."""
    splits = {
        split: [
            replace(shard, sha256=digests[shard.name]) if shard.name in digests else shard
            for shard in dataset.shards(split)
        ]
        for split in dataset.splits
    }
    content = {"splits": splits, "classes": dataset.classes, "channels": dataset.channels}
    more = {"image_size": dataset.image_size, "mean": dataset.mean, "std": dataset.std}
    return make_dataset(dataset.uri, **content, **more)
