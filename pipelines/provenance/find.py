"""Find a picture in datasets: the same file, the same pixels, or nearly the same picture, each said as such."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipelines.presentation.errors import ConfigError
from pipelines.provenance.prints import as_image, file_digest, read_images, read_prints, read_sidecar
from pipelines.shards.audit.recorded import LOOKUPS, TarReading
from pipelines.shards.erased import ErasedSample, ImageFile, erased_samples, pixels_digest
from pipelines.shards.index import Dataset, ShardIndex, ShardInfo
from pipelines.shards.ingest.alike import ALIKE, BITS, Fingerprint, fingerprint
from pipelines.shards.ingest.encode import ImageFormat, encode_image
from pipelines.shards.ingest.readers import UnreadableError
from pipelines.shards.ingest.spool import ahead
from pipelines.shards.members import FlawError, decode_pixels
from pipelines.storage import NotFoundError, Storage, join, layout

How = Literal["key", "file", "ingested", "pixels", "pixels, mirrored", "near", "near, mirrored"]
"""By what a picture was found, the surest first; see `EXPLAINED`."""
EXPLAINED: dict[How, str] = {
    "key": "the sample of this key",
    "file": "the same file",
    "ingested": "the file that an ingest with the settings of this dataset makes of it",
    "pixels": "the same pixels",
    "pixels, mirrored": "the same pixels, mirrored",
    "near": "nearly the same picture",
    "near, mirrored": "nearly the same picture, mirrored",
}


@dataclass(frozen=True)
class Query:
    """What is looked for: a picture, the key of a sample, or a digest.

    Attributes:
        named: as the user gave it; of a picture, its SHA-256, because a record must not have the picture's name.
        data: the bytes of a picture.
        key: key of a sample.
        digest: SHA-256 of an image file or of decoded pixels.
    """

    named: str
    data: bytes | None = None
    key: str | None = None
    digest: bytes | None = None

    @classmethod
    def parse(cls, text: str, storage: Storage) -> Query:
        """Return what a text names: a file or an address, 64 hexadecimal digits, else a key.

        Raises:
            ConfigError: there is no such file, or it is no picture.
        """
        if "://" in text:
            try:
                return cls.of_picture(storage.read(text), text)
            except NotFoundError as error:
                raise ConfigError(f"{text}: there is no such picture") from error
        if Path(text).is_file():
            return cls.of_picture(Path(text).read_bytes(), text)
        if re.fullmatch(r"[0-9a-fA-F]{64}", text):
            return cls(text.lower(), digest=bytes.fromhex(text))
        if Path(text).suffix.lower() in Image.registered_extensions():
            raise ConfigError(
                f"{text}: there is no such file. Give a picture, the key of a sample such as train-00000012, or a "
                "SHA-256"
            )
        return cls(text, key=text)

    @classmethod
    def of_picture(cls, data: bytes, where: str) -> Query:
        """Return a picture.

        Raises:
            ConfigError: the bytes are no picture that an ingest reads.
        """
        try:
            encode_image(data, ImageFormat(8, 3))
        except UnreadableError as error:
            raise ConfigError(f"{where}: {error}") from error
        return cls(hashlib.sha256(data).hexdigest(), data=data)


@dataclass(frozen=True)
class Match:
    """A sample of a dataset that is what was looked for.

    Attributes:
        uri: folder of the dataset.
        split: name of the split.
        shard: name of the shard.
        index: of the sample in the shard, as its sidecar counts.
        key: of the sample.
        how: by what it was found.
        similarity: correlation of small grey copies; 1 where it is no near-duplicate.
        sha256, size, crc32: of the image file, as it was before it was erased.
        erased: whether a blank is there now.
    """

    uri: str
    split: str
    shard: str
    index: int
    key: str
    how: How
    similarity: float = 1.0
    sha256: str = ""
    size: int = 0
    crc32: int = 0
    erased: bool = False


@dataclass(frozen=True)
class _Target:
    """A picture in the form of a dataset.

    Attributes:
        files: digest of a file -> by what a sample with this file is found.
        pixels: digest of pixels -> by what a sample with these pixels is found.
        shown: fingerprint of the picture and of its mirror image -> by what a similar sample is found.
    """

    files: dict[bytes, How]
    pixels: dict[bytes, How]
    shown: list[tuple[Fingerprint, How]]


def find(query: Query, dataset: Dataset, storage: Storage, reading: TarReading, *, near: bool = True) -> list[Match]:
    """Return the samples of a dataset that are what is looked for, in order of their splits and shards.

    Args:
        near: look for near-duplicates as well; without, only for the same file, pixels or key.

    Raises:
        DatasetError: an index is gone or damaged.
        StorageError: the store does not answer.
    """
    gone = erased_samples(dataset, storage)
    if query.key is not None:
        return [_as_it_was(match, gone) for match in _by_key(query.key, dataset, storage)]
    target = _target(query, dataset, storage)
    splits = {shard.name: split for split in dataset.splits for shard in dataset.shards(split)}
    found: list[Match] = []
    for shard, prints in read_prints(dataset, storage, reading):
        hits: dict[int, How] = {}
        for field, digests in (("file", target.files), ("pixels", target.pixels)):
            for digest, how in digests.items():
                hits = dict.fromkeys(prints.equal(field, digest).tolist(), how) | hits
        others = {
            i for shown, _ in (target.shown if near else ()) for i in prints.near(shown.hash, BITS).tolist()
        } - hits.keys()
        if hits or others:
            found += _confirm(dataset, shard, splits[shard.name], hits, others, target, storage)
    found = [match for match in found if (match.shard, match.index) not in gone]
    found += _among_erased(gone.values(), target, dataset.uri, splits)
    names = {name: number for number, name in enumerate(splits)}
    return sorted(found, key=lambda match: (names[match.shard], match.index))


def _as_it_was(match: Match, gone: Mapping[tuple[str, int], ErasedSample]) -> Match:
    """Return a match with what its image was recognised by before it was erased."""
    sample = gone.get((match.shard, match.index))
    return match if sample is None else replace(match, **asdict(sample.image), erased=True)


def _among_erased(
    gone: Iterable[ErasedSample], target: _Target, uri: str, splits: Mapping[str, str]
) -> Iterator[Match]:
    """Yield the erased samples whose file or pixels were those that are looked for."""
    for each in gone:
        how = target.files.get(bytes.fromhex(each.image.sha256)) or target.pixels.get(bytes.fromhex(each.pixels))
        if how is not None and each.shard in splits:
            plain = Match(uri, splits[each.shard], each.shard, each.index, each.key, how)
            yield replace(plain, **asdict(each.image), erased=True)


def form_of(dataset: Dataset, storage: Storage) -> ImageFormat:
    """Return the format in which an ingest with the settings of a dataset stores images, by the report of its ingest.

    Other tools leave no report; then it is the default geometry at the size of the dataset.
    """
    form = ImageFormat(dataset.image_size, dataset.channels)
    try:
        settings = json.loads(storage.read(join(dataset.uri, layout.INGEST_REPORT)))["settings"]
        return ImageFormat(dataset.image_size, dataset.channels, settings["geometry"], settings["encoding"])
    except (NotFoundError, ValueError, KeyError, TypeError):
        return form


def _target(query: Query, dataset: Dataset, storage: Storage) -> _Target:
    if query.data is None:
        assert query.digest is not None
        return _Target({query.digest: "file"}, {query.digest: "pixels"}, [])
    files: dict[bytes, How] = {file_digest(query.data): "file"}
    form = form_of(dataset, storage)
    try:
        encoded = encode_image(query.data, form)
        files.setdefault(file_digest(encoded.data), "ingested")
        pixels = encoded.pixels
    except UnreadableError:  # of another size than a dataset that keeps its images as they are
        pixels = encode_image(query.data, ImageFormat(form.size, form.channels)).pixels
    image = as_image(pixels)
    ways: list[tuple[Image.Image, How]] = [(image, "near"), (ImageOps.mirror(image), "near, mirrored")]
    prints = [(fingerprint(turned), how) for turned, how in ways]
    shown = [(found, how) for found, how in prints if found is not None]
    same: dict[bytes, How] = {pixels_digest(pixels[:, ::-1]): "pixels, mirrored", pixels_digest(pixels): "pixels"}
    return _Target(files, same, shown)


def _confirm(
    dataset: Dataset,
    shard: ShardInfo,
    split: str,
    hits: dict[int, How],
    others: set[int],
    target: _Target,
    storage: Storage,
) -> Iterator[Match]:
    """Yield the samples of a shard that were found by a digest, and those of similar hashes that look alike."""
    index = read_sidecar(shard, dataset.uri, storage)
    some = index.select(sorted(hits.keys() | others))
    places = sorted(hits.keys() | others)
    for at, name, data in read_images(some, shard.address(dataset.uri), storage):
        i = places[at]
        match = _match(dataset, split, shard, i, index.keys[i], hits.get(i, "near"), data)
        if i in hits:
            yield match
            continue
        likeness, how = max(_likeness(name, data, dataset, target), default=(0.0, "near"))
        if likeness > ALIKE:
            yield replace(match, how=how, similarity=round(likeness, 4))


def _match(dataset: Dataset, split: str, shard: ShardInfo, index: int, key: str, how: How, data: memoryview) -> Match:
    file = ImageFile.of(data)
    return Match(dataset.uri, split, shard.name, index, key, how, 1.0, file.sha256, file.size, file.crc32)


def _likeness(name: str, data: memoryview, dataset: Dataset, target: _Target) -> list[tuple[float, How]]:
    try:
        pixels: NDArray[np.uint8] = decode_pixels({name: data}, dataset.image_size, dataset.channels)
    except FlawError:
        return []
    theirs = fingerprint(as_image(pixels))
    return [] if theirs is None else [(float(ours.small @ theirs.small), how) for ours, how in target.shown]


def _by_key(key: str, dataset: Dataset, storage: Storage) -> Iterator[Match]:
    """Yield the samples of a key; `SHARD/KEY` names one where several shards have samples of the same key."""
    shards = [(split, shard) for split in dataset.splits for shard in dataset.shards(split)]

    def look(each: tuple[str, ShardInfo]) -> tuple[ShardIndex, list[int]]:
        index = read_sidecar(each[1], dataset.uri, storage)
        return index, [i for i, there in enumerate(index.keys) if key in (there, f"{each[1].name}/{there}")]

    with ThreadPoolExecutor(LOOKUPS, thread_name_prefix="keys") as pool:
        for (split, shard), (index, at) in zip(shards, ahead(pool, look, shards, LOOKUPS), strict=True):
            for i, _, data in read_images(index.select(at), shard.address(dataset.uri), storage) if at else ():
                yield _match(dataset, split, shard, at[i], index.keys[at[i]], "key", data)


def plain(match: Match) -> dict[str, Any]:
    """Return a match as JSON types."""
    return {**vars(match), "found_by": EXPLAINED[match.how]}
