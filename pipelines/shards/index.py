"""`dataset.json` and the index of each shard, which describe a dataset so that no reader has to scan a tar."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from ddpm.image_size import ImageSize, height_width
from pipelines.presentation.errors import PipelineError
from pipelines.shards.columns import PARTS, Texts, member_column, member_rows, without_numbers
from pipelines.storage import NotFoundError, Storage, join, layout

SCHEMA_VERSION = 1
SIDECAR_VERSION = 2


class DatasetError(PipelineError):
    """A dataset is missing, damaged, of another version, or does not have what was requested."""


@dataclass(frozen=True)
class MixtureSource:
    """One of the datasets of a mixture.

    Attributes:
        name: name of the source.
        uri: folder of the dataset.
        digest: digest of its stream: of the dataset and of its quarantine.
        weights: ordinal -> weight from there on.
        labels: number of the class in the mixture for each class of the dataset; empty for data without labels.
    """

    name: str
    uri: str
    digest: str
    weights: Mapping[int, float]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class ShardInfo:
    """One tar file of a dataset.

    Attributes:
        name: path relative to the folder of dataset.json; in a mixture it comes after the name of the source and a
            colon, so that names differ, and say nothing of where the dataset lies.
        samples: number of samples.
        bytes: size of the file.
        sha256: SHA-256 of the file.
        source: of a shard of a mixture, the dataset that it is of.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    source: MixtureSource | None = None

    def address(self, folder: str) -> str:
        """Return the address of the file.

        Args:
            folder: of the dataset.
        """
        if self.source is None:
            return join(folder, self.name)
        own_name = self.name.removeprefix(f"{self.source.name}:")
        return join(self.source.uri, own_name)

    def folder(self, folder: str) -> str:
        """Return the folder of the dataset that the shard is of: that of its source in a mixture, else the given
        one."""
        return folder if self.source is None else self.source.uri


class ShardTable(Sequence[ShardInfo]):
    """The shards of a split in columns of some 70 bytes a shard; each `ShardInfo` is made when it is asked for.

    Args:
        names: of the shards.
        samples: of each shard, int64 [n].
        sizes: of the files in bytes, int64 [n].
        sha256: digests of the files, uint8 [n, 32]; as texts where they are none.
        sources: the datasets of a mixture that the shards are of.
        source_of: index into `sources`, int16 [n]; -1 for a shard that is of none.
    """

    def __init__(
        self,
        names: Texts,
        samples: NDArray[np.int64],
        sizes: NDArray[np.int64],
        sha256: Texts | NDArray[np.uint8],
        sources: tuple[MixtureSource, ...],
        source_of: NDArray[np.int16],
    ) -> None:
        self.names, self.samples, self.sizes, self.sha256 = names, samples, sizes, sha256
        self.sources, self.source_of = sources, source_of

    @classmethod
    def of(cls, shards: Iterable[ShardInfo]) -> ShardTable:
        """Return shards as a table."""
        if isinstance(shards, ShardTable):
            return shards
        shards = tuple(shards)
        digests = [shard.sha256 for shard in shards]
        whole = all(map(_DIGEST.match, digests))
        raw = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32) if whole else None
        sources = {shard.source.name: shard.source for shard in shards if shard.source is not None}
        numbers = {name: number for number, name in enumerate(sources)}
        return cls(
            Texts.of(shard.name for shard in shards),
            np.array([shard.samples for shard in shards], np.int64),
            np.array([shard.bytes for shard in shards], np.int64),
            Texts.of(digests) if raw is None else raw,
            tuple(sources.values()),
            np.array([-1 if shard.source is None else numbers[shard.source.name] for shard in shards], np.int16),
        )

    def take(self, numbers: NDArray[np.int64], samples: NDArray[np.int64]) -> ShardTable:
        """Return some of the shards, with other numbers of samples."""
        sha256 = Texts.of(self.sha256[n] for n in numbers) if isinstance(self.sha256, Texts) else self.sha256[numbers]
        names = Texts.of(self.names[n] for n in numbers)
        return ShardTable(names, samples, self.sizes[numbers], sha256, self.sources, self.source_of[numbers])

    def of_source(self, source: MixtureSource) -> NDArray[np.int64]:
        """Return the numbers of the shards that are of a dataset of a mixture."""
        number = self.sources.index(source) if source in self.sources else len(self.sources)
        return np.flatnonzero(self.source_of == number)

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self.samples)

    @overload
    def __getitem__(self, i: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[ShardInfo, ...]: ...
    def __getitem__(self, i: int | slice) -> ShardInfo | tuple[ShardInfo, ...]:
        """Return a shard, or some of them."""
        if isinstance(i, slice):
            return tuple(self[each] for each in range(len(self))[i])
        digest = self.sha256[i]
        return ShardInfo(
            self.names[i],
            int(self.samples[i]),
            int(self.sizes[i]),
            digest if isinstance(digest, str) else digest.tobytes().hex(),
            None if self.source_of[i] < 0 else self.sources[self.source_of[i]],
        )

    def __eq__(self, other: object) -> bool:
        """Return whether both are the same shards in the same order."""
        return isinstance(other, ShardTable) and len(self) == len(other) and all(map(ShardInfo.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def plain(self) -> list[dict[str, Any]]:
        """Return the shards as `dataset.json` has them."""
        digests = self.sha256 if isinstance(self.sha256, Texts) else (each.tobytes().hex() for each in self.sha256)
        columns = zip(self.names, self.samples.tolist(), self.sizes.tolist(), digests, strict=True)
        return [{"name": name, "samples": n, "bytes": size, "sha256": digest} for name, n, size, digest in columns]


_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class Dataset:
    """The content of `dataset.json`.

    Attributes:
        uri: the folder from which it was read.
        splits: name, such as "train" or "test" -> shards in order, kept as `ShardTable`.
        classes: class names; a sample's `cls` is an index into them. Empty for data without labels.
        channels: 1 (grey) or 3 (RGB).
        image_size: height and width in pixels; one number for square images.
        mean: mean of the train split's pixels in [-1, 1], per channel.
        std: standard deviation of these pixels, per channel.
        digest: SHA-256 over all of the above except `uri`.
        sources: of a mixture, the datasets that its split "train" is of; its other splits are those at `uri`.
        reference_digest: of a mixture, the digest of the stream at `uri`.
    """

    uri: str
    splits: Mapping[str, Sequence[ShardInfo]]
    classes: tuple[str, ...]
    channels: int
    image_size: ImageSize
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    sources: tuple[MixtureSource, ...] = ()
    reference_digest: str = ""

    def __post_init__(self) -> None:
        """Keep the shards as tables."""
        object.__setattr__(self, "splits", {name: ShardTable.of(shards) for name, shards in self.splits.items()})

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        return self.channels, *height_width(self.image_size)

    def samples(self, split: str) -> int:
        """Return the number of samples of a split."""
        return int(self.shards(split).samples.sum())

    def shards(self, split: str) -> ShardTable:
        """Return the shards of a split.

        Raises:
            DatasetError: there is no such split.
        """
        if split not in self.splits:
            raise DatasetError(f"{self.uri} has no split {split!r}; it has {', '.join(self.splits)}")
        return ShardTable.of(self.splits[split])

    def to_json(self) -> str:
        """Return the text of `dataset.json`."""
        return json.dumps({**_content(self), "digest": self.digest}, indent=1)


def make_dataset(uri: str, **content: Any) -> Dataset:
    """Return a `Dataset` with its digest filled in."""
    draft = Dataset(uri=uri, digest="", **content)
    digest = hashlib.sha256(json.dumps(_content(draft), sort_keys=True).encode()).hexdigest()
    return Dataset(uri=uri, digest=digest, **content)


def _content(dataset: Dataset) -> dict[str, Any]:
    """Return the part of `dataset.json` that the digest covers."""
    others = ("uri", "digest", "sources", "reference_digest")
    plain = {field.name: getattr(dataset, field.name) for field in fields(dataset) if field.name not in others}
    plain["splits"] = {split: dataset.shards(split).plain() for split in dataset.splits}
    return {"schema_version": SCHEMA_VERSION, **plain}


def read_dataset(uri: str, storage: Storage) -> Dataset:
    """Read the dataset in a folder.

    Raises:
        DatasetError: there is none, or it is of an unknown version or damaged.
    """
    try:
        plain = json.loads(storage.read(join(uri, layout.DATASET)))
    except NotFoundError as error:
        raise DatasetError(
            f"no dataset at {uri} (dataset.json is missing): write one with `ddpm ingest`, or describe the tars "
            f"that are there with `ddpm index {uri}`"
        ) from error
    except ValueError as error:
        raise DatasetError(f"{uri}/dataset.json is damaged: {error}") from error
    try:
        version = plain.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise DatasetError(f"{uri}: dataset.json has version {version}, this release reads {SCHEMA_VERSION}")
        recorded = plain.pop("digest")
        splits = {name: ShardTable.of(ShardInfo(**s) for s in shards) for name, shards in plain.pop("splits").items()}
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        dataset = make_dataset(uri, splits=splits, **fields)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DatasetError(f"{uri}/dataset.json is damaged ({error!r}): it was edited, or not written whole") from error
    if dataset.digest != recorded:
        raise DatasetError(f"{uri}: dataset.json does not match its own digest: it was edited or damaged")
    return dataset


class Member(NamedTuple):
    """The position and size of a member's bytes in the tar, and their CRC-32 (`zlib.crc32`)."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The content of a sidecar, `SHARD.index.json`: the key of each sample, and the positions of its members.

    It is stored in columns: a reader needs a few members of thousands of samples, and has no object for each.

    Attributes:
        keys: keys of the samples, in the order of the tar.
        columns: extension -> the samples' members, [samples] of `columns.COLUMN`; see `rows`.
    """

    keys: Sequence[str]
    columns: dict[str, NDArray[np.void]]

    @classmethod
    def of(cls, keys: Sequence[str], members: Sequence[Mapping[str, Member]]) -> ShardIndex:
        """Return the index of samples with these keys and members."""
        rows: dict[str, NDArray[np.int64]] = {}
        for i, sample in enumerate(members):
            for extension, member in sample.items():
                if extension not in rows:
                    rows[extension] = np.full((len(keys), 3), -1, np.int64)
                rows[extension][i] = member.offset, member.size, member.crc32
        return cls(tuple(keys), {extension: member_column(each) for extension, each in rows.items()})

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.keys)

    def __eq__(self, other: object) -> bool:
        """Return whether both have the same samples at the same positions."""
        if not isinstance(other, ShardIndex) or tuple(self.keys) != tuple(other.keys):
            return False
        if self.columns.keys() != other.columns.keys():
            return False
        return all(np.array_equal(column, other.columns[name]) for name, column in self.columns.items())

    __hash__ = None  # type: ignore[assignment]

    def members(self, i: int) -> dict[str, Member]:
        """Return the members of sample i by extension, in the order of the tar."""
        rows = {name: self.rows(name, [i])[0] for name in self.columns}
        there = {name: Member(*row) for name, row in rows.items() if row[0] >= 0}
        return dict(sorted(there.items(), key=lambda item: item[1].offset))

    def rows(self, extension: str, at: Sequence[int] | slice = slice(None)) -> list[list[int]]:
        """Return offset, size and CRC-32 of some samples' members; all -1 where a sample has no such member."""
        return member_rows(self.columns[extension][at]).tolist()

    def select(self, kept: Sequence[int]) -> ShardIndex:
        """Return the index of some of the samples."""
        return ShardIndex(tuple(self.keys[i] for i in kept), {name: c[list(kept)] for name, c in self.columns.items()})

    def to_json(self) -> str:
        """Return the text of the sidecar."""
        columns = {
            name: dict(zip(PARTS, member_rows(column).T.tolist(), strict=True))
            for name, column in sorted(self.columns.items())
        }
        plain = {"schema_version": SIDECAR_VERSION, "keys": tuple(self.keys), "members": columns}
        return json.dumps(plain, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: bytes | str) -> ShardIndex:
        """Read a sidecar.

        Raises:
            DatasetError: it is of another version, or damaged.
        """
        try:
            rest, numbers = without_numbers(text.encode() if isinstance(text, str) else text)
            plain = json.loads(rest)
            version = plain["schema_version"]
            if version == SIDECAR_VERSION:
                keys = tuple(map(str, plain["keys"]))
                rows = {
                    str(name): np.array(
                        [numbers[c] if isinstance(c := column[part], int) else c for part in PARTS], np.int64
                    ).T
                    for name, column in plain["members"].items()
                }
                if all(each.shape == (len(keys), 3) for each in rows.values()):
                    return cls(keys, {name: member_column(each) for name, each in rows.items()})
                raise ValueError("its columns are not as long as its keys")
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise DatasetError(f"the shard index is damaged: {error}") from error
        raise DatasetError(f"the shard index has version {version}, this release reads {SIDECAR_VERSION}")


_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, extension) of a tar entry by WebDataset's rule, or None where WebDataset skips the entry.

    The key ends at the first dot after the last slash, so dots of folders belong to it. Extensions are lower case.
    Names without an extension and entries such as `__meta__/x.json` are no samples (`webdataset.tariterators`, 1.0).
    """
    found = _NAME.match(name)
    return None if found is None or _META.match(name) else (found.group(1), found.group(2).lower())


def index_tar(path: Path) -> ShardIndex:
    """Scan a tar just written by an ingest; `scan.scan_shard` is for tars that may be damaged."""
    keys: list[str] = []
    members: list[dict[str, Member]] = []
    with tarfile.open(path) as tar, path.open("rb") as file:
        for info in tar:
            parts = split_name(info.name) if info.isfile() else None
            if parts is None:
                continue
            key, extension = parts
            if not keys or keys[-1] != key:
                keys.append(key)
                members.append({})
            file.seek(info.offset_data)
            members[-1][extension] = Member(info.offset_data, info.size, zlib.crc32(file.read(info.size)))
    return ShardIndex.of(keys, members)
