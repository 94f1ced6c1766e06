"""Find a picture in datasets: the same file, the same pixels, or nearly the same picture, each said as such."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipelines.presentation.errors import ConfigError
from pipelines.provenance.prints import as_image, file_digest, read_images, read_prints
from pipelines.shards.audit.recorded import LOOKUPS, TarReading, read_sidecar
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
LIST = ".txt"
"""End of the name of a list."""
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
    """What is looked for: a picture, the key of a sample, a digest, or a list of such.

    Attributes:
        named: as the user gave it; of a picture, its SHA-256, because a record must not have the picture's name; of a
            list, the SHA-256 of what its lines are named.
        data: the bytes of a picture.
        key: key of a sample.
        digest: SHA-256 of an image file or of decoded pixels.
        listed: what a list has.
    """

    named: str
    data: bytes | None = None
    key: str | None = None
    digest: bytes | None = None
    listed: tuple[Query, ...] = ()

    @property
    def each(self) -> tuple[Query, ...]:
        """What is looked for, one by one."""
        return self.listed or (self,)

    @classmethod
    def parse(cls, text: str, storage: Storage) -> Query:
        """Return what a text names: a file or an address, 64 hexadecimal digits, else a key.

        A file whose name ends in `.txt` is a list, with one of these in each line.

        Raises:
            ConfigError: there is no such file, or it is no picture.
        """
        if text.endswith(LIST) and ("://" in text or Path(text).is_file()):
            return cls._of_list(text, storage)
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
    def _of_list(cls, where: str, storage: Storage) -> Query:
        try:
            lines = (storage.read(where) if "://" in where else Path(where).read_bytes()).decode().splitlines()
        except NotFoundError as error:
            raise ConfigError(f"{where}: there is no such list") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read as a list: {error}") from error
        found: dict[str, Query] = {}
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    one = cls.parse(line.strip(), storage)
                except ConfigError as error:
                    raise ConfigError(f"line {number} of {where}: {error}") from error
                if one.listed:
                    raise ConfigError(f"line {number} of {where} is a list again: write its lines here")
                found[one.named] = one
        if not found:
            raise ConfigError(f"{where} is empty: write a picture, a key or a SHA-256 in each line")
        named = hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()
        return cls(named, listed=tuple(found.values()))

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
        asked: what of that which was looked for it is, as that is named.
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
    asked: tuple[str, ...] = ()
    similarity: float = 1.0
    sha256: str = ""
    size: int = 0
    crc32: int = 0
    erased: bool = False


Way = tuple[How, tuple[str, ...]]
"""By what a sample is found, and what of that which is looked for it then is."""
T = TypeVar("T")


@dataclass(frozen=True)
class _Target:
    """Pictures in the form of a dataset.

    Attributes:
        files: digest of a file -> by what a sample with this file is found.
        pixels: digest of pixels -> by what a sample with these pixels is found.
        shown: fingerprints of the pictures and of their mirror images, with by what a similar sample is found.
    """

    files: Mapping[bytes, Way]
    pixels: Mapping[bytes, Way]
    shown: Sequence[tuple[Fingerprint, Way]]


def find(query: Query, dataset: Dataset, storage: Storage, reading: TarReading, *, near: bool = True) -> list[Match]:
    """Return the samples of a dataset that are what is looked for, in order of their splits and shards.

    Args:
        near: look for near-duplicates as well; without, only for the same file, pixels or key.

    Raises:
        DatasetError: an index is gone or damaged.
        StorageError: the store does not answer.
    """
    gone = erased_samples(dataset, storage)
    keys = {one.key for one in query.each if one.key is not None}
    found = [_as_it_was(match, gone) for match in _by_key(keys, dataset, storage)] if keys else []
    pictures = [one for one in query.each if one.key is None]
    if pictures:
        there = {(match.shard, match.index): match for match in found}
        for match in _by_content(pictures, dataset, storage, reading, gone, near=near):
            place = match.shard, match.index
            there[place] = replace(there[place], asked=there[place].asked + match.asked) if place in there else match
        found = list(there.values())
    names = {name: number for number, name in enumerate(dataset.splits)}
    places = {shard.name: at for split in dataset.splits for at, shard in enumerate(dataset.shards(split))}
    return sorted(found, key=lambda match: (names[match.split], places[match.shard], match.index))


def _by_content(
    pictures: Sequence[Query],
    dataset: Dataset,
    storage: Storage,
    reading: TarReading,
    gone: Mapping[tuple[str, int], ErasedSample],
    *,
    near: bool,
) -> Iterator[Match]:
    target = _target(pictures, dataset, storage)
    splits = {shard.name: split for split in dataset.splits for shard in dataset.shards(split)}
    for shard, prints in read_prints(dataset, storage, reading):
        hits: dict[int, Way] = {}
        for field, digests in (("file", target.files), ("pixels", target.pixels)):
            for digest, way in digests.items():
                for i in prints.equal(field, digest).tolist():
                    _add(hits, i, *way)
        similar = {i for shown, _ in (target.shown if near else ()) for i in prints.near(shown.hash, BITS).tolist()}
        if hits or similar:
            for match in _confirm(dataset, shard, splits[shard.name], hits, similar, target, storage):
                if (match.shard, match.index) not in gone:
                    yield match
    yield from _among_erased(gone.values(), target, dataset.uri, splits)


def _add(ways: dict[T, Way], what: T, how: How, names: tuple[str, ...]) -> None:
    """Say how something is found; where that is said already, it is these as well."""
    surest, others = ways.get(what, (how, ()))
    ways[what] = surest, others + tuple(name for name in names if name not in others)


def _as_it_was(match: Match, gone: Mapping[tuple[str, int], ErasedSample]) -> Match:
    """Return a match with what its image was recognised by before it was erased."""
    sample = gone.get((match.shard, match.index))
    return match if sample is None else replace(match, **asdict(sample.image), erased=True)


def _among_erased(
    gone: Iterable[ErasedSample], target: _Target, uri: str, splits: Mapping[str, str]
) -> Iterator[Match]:
    """Yield the erased samples whose file or pixels were those that are looked for."""
    for each in gone:
        way = target.files.get(bytes.fromhex(each.image.sha256)) or target.pixels.get(bytes.fromhex(each.pixels))
        if way is not None and each.shard in splits:
            plain = Match(uri, splits[each.shard], each.shard, each.index, each.key, *way)
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


def _target(pictures: Sequence[Query], dataset: Dataset, storage: Storage) -> _Target:
    files: dict[bytes, Way] = {}
    pixels: dict[bytes, Way] = {}
    shown: list[tuple[Fingerprint, Way]] = []
    form = form_of(dataset, storage)
    for one in pictures:
        named = (one.named,)
        if one.data is None:
            assert one.digest is not None
            _add(files, one.digest, "file", named)
            _add(pixels, one.digest, "pixels", named)
            continue
        _add(files, file_digest(one.data), "file", named)
        try:
            encoded = encode_image(one.data, form)
            _add(files, file_digest(encoded.data), "ingested", named)
            array = encoded.pixels
        except UnreadableError:  # of another size than a dataset that keeps its images as they are
            array = encode_image(one.data, ImageFormat(form.size, form.channels)).pixels
        _add(pixels, pixels_digest(array), "pixels", named)
        _add(pixels, pixels_digest(array[:, ::-1]), "pixels, mirrored", named)
        image = as_image(array)
        ways: list[tuple[Image.Image, How]] = [(image, "near"), (ImageOps.mirror(image), "near, mirrored")]
        prints = [(fingerprint(turned), how) for turned, how in ways]
        shown += [(found, (how, named)) for found, how in prints if found is not None]
    return _Target(files, pixels, shown)


def _confirm(
    dataset: Dataset,
    shard: ShardInfo,
    split: str,
    hits: Mapping[int, Way],
    similar: set[int],
    target: _Target,
    storage: Storage,
) -> Iterator[Match]:
    """Yield the samples of a shard that were found by a digest, and those of similar hashes that look alike."""
    index = read_sidecar(shard, dataset.uri, storage)
    places = sorted(hits.keys() | similar)
    for at, name, data in read_images(index.select(places), shard.address(dataset.uri), storage):
        i = places[at]
        match = _match(dataset, split, shard, i, index.keys[i], hits.get(i, ("near", ())), data)
        likeness = _likeness(name, data, dataset, target) if i in similar else []
        alike = sorted((each for each in likeness if each[0] > ALIKE), reverse=True)
        asked = tuple(dict.fromkeys([*match.asked, *(name for _, (_, names) in alike for name in names)]))
        if i in hits:
            yield replace(match, asked=asked)
        elif alike:
            yield replace(match, how=alike[0][1][0], asked=asked, similarity=round(alike[0][0], 4))


def _match(dataset: Dataset, split: str, shard: ShardInfo, index: int, key: str, way: Way, data: memoryview) -> Match:
    return Match(dataset.uri, split, shard.name, index, key, *way, **asdict(ImageFile.of(data)))


def _likeness(name: str, data: memoryview, dataset: Dataset, target: _Target) -> list[tuple[float, Way]]:
    try:
        pixels: NDArray[np.uint8] = decode_pixels({name: data}, dataset.image_size, dataset.channels)
    except FlawError:
        return []
    theirs = fingerprint(as_image(pixels))
    return [] if theirs is None else [(float(ours.small @ theirs.small), way) for ours, way in target.shown]


def _by_key(keys: Set[str], dataset: Dataset, storage: Storage) -> Iterator[Match]:
    """Yield the samples of these keys; `SHARD/KEY` names one where several shards have samples of the same key."""
    shards = [(split, shard) for split in dataset.splits for shard in dataset.shards(split)]

    def look(each: tuple[str, ShardInfo]) -> tuple[ShardIndex, list[int]]:
        index = read_sidecar(each[1], dataset.uri, storage)
        return index, [i for i, there in enumerate(index.keys) if keys & {there, f"{each[1].name}/{there}"}]

    with ThreadPoolExecutor(LOOKUPS, thread_name_prefix="keys") as pool:
        for (split, shard), (index, at) in zip(shards, ahead(pool, look, shards, LOOKUPS), strict=True):
            for i, _, data in read_images(index.select(at), shard.address(dataset.uri), storage) if at else ():
                key = index.keys[at[i]]
                asked = tuple(name for name in (key, f"{shard.name}/{key}") if name in keys)
                yield _match(dataset, split, shard, at[i], key, ("key", asked), data)


def plain(match: Match) -> dict[str, Any]:
    """Return a match as JSON types."""
    return {**vars(match), "found_by": EXPLAINED[match.how]}
