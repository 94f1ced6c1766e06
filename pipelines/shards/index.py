"""`dataset.json` and the sidecar of each shard: what a dataset holds, so that no reader ever scans a tar."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.storage import NotFoundError, Storage, join

SCHEMA_VERSION = 1


class DatasetError(ValueError):
    """A dataset that is missing, of another version, or not what was asked for."""


@dataclass(frozen=True)
class ShardInfo:
    """One tar file: name beside dataset.json, samples, bytes and SHA-256 of the whole file."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """The content of `dataset.json`.

    Attributes:
        uri: the folder it was read from.
        splits: name -> shards in order, such as "train" and "test".
        classes: class names; a sample's `cls` is an index into them. Empty for data without labels.
        channels: 1 or 3.
        image_size: height and width in pixels.
        mean: of the train split's pixels in [-1, 1], per channel.
        std: likewise.
        digest: SHA-256 over everything above but `uri`.
    """

    uri: str
    splits: dict[str, tuple[ShardInfo, ...]]
    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str

    def samples(self, split: str) -> int:
        """Number of samples of a split."""
        return sum(shard.samples for shard in self.shards(split))

    def shards(self, split: str) -> tuple[ShardInfo, ...]:
        """The shards of a split.

        Raises:
            DatasetError: there is no such split.
        """
        if split not in self.splits:
            raise DatasetError(f"{self.uri} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def to_json(self) -> str:
        """`dataset.json`."""
        return json.dumps({**_content(self), "digest": self.digest}, indent=1)


def make_dataset(uri: str, **content: Any) -> Dataset:
    """A `Dataset` with its digest filled in."""
    draft = Dataset(uri=uri, digest="", **content)
    digest = hashlib.sha256(json.dumps(_content(draft), sort_keys=True).encode()).hexdigest()
    return Dataset(uri=uri, digest=digest, **content)


def _content(dataset: Dataset) -> dict[str, Any]:
    plain = asdict(dataset)
    del plain["uri"], plain["digest"]
    return {"schema_version": SCHEMA_VERSION, **plain}


def read_dataset(uri: str, storage: Storage) -> Dataset:
    """The dataset in a folder.

    Raises:
        DatasetError: none there, of an unknown version, or damaged.
    """
    try:
        plain = json.loads(storage.read(join(uri, "dataset.json")))
    except NotFoundError as error:
        raise DatasetError(f"no dataset at {uri} (dataset.json is missing): write one with `ddpm ingest`") from error
    except json.JSONDecodeError as error:
        raise DatasetError(f"{uri}/dataset.json is damaged: {error}") from error
    version = plain.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise DatasetError(f"{uri}: dataset.json has version {version}, this release reads {SCHEMA_VERSION}")
    recorded = plain.pop("digest")
    splits = {name: tuple(ShardInfo(**s) for s in shards) for name, shards in plain.pop("splits").items()}
    dataset = make_dataset(uri, splits=splits, **{k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()})
    if dataset.digest != recorded:
        raise DatasetError(f"{uri}: dataset.json does not match its own digest: it was edited or damaged")
    return dataset


@dataclass(frozen=True)
class Member:
    """Where a member's bytes lie in the tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class ShardIndex:
    """The sidecar `SHARD.index.json`: for each sample in order its key and members by extension."""

    keys: tuple[str, ...]
    members: tuple[dict[str, Member], ...]

    def to_json(self) -> str:
        """The sidecar's text."""
        samples = [
            {"key": key, "members": {ext: [m.offset, m.size] for ext, m in members.items()}}
            for key, members in zip(self.keys, self.members, strict=True)
        ]
        return json.dumps({"schema_version": SCHEMA_VERSION, "samples": samples}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: bytes | str) -> ShardIndex:
        """Read a sidecar."""
        plain = json.loads(text)
        if plain["schema_version"] != SCHEMA_VERSION:
            raise DatasetError(
                f"a shard index has version {plain['schema_version']}, this release reads {SCHEMA_VERSION}"
            )
        return cls(
            tuple(sample["key"] for sample in plain["samples"]),
            tuple({ext: Member(*span) for ext, span in sample["members"].items()} for sample in plain["samples"]),
        )


def sidecar(shard: str) -> str:
    """The name of a shard's index."""
    return shard.removesuffix(".tar") + ".index.json"


def index_tar(path: Path) -> ShardIndex:
    """Scan a tar once. Members of one sample share the name up to its first dot (WebDataset's rule)."""
    keys: list[str] = []
    members: list[dict[str, Member]] = []
    with tarfile.open(path) as tar:
        for info in tar:
            if not info.isfile():
                continue
            folder, _, base = info.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not keys or keys[-1] != key:
                keys.append(key)
                members.append({})
            members[-1][extension] = Member(info.offset_data, info.size)
    return ShardIndex(tuple(keys), tuple(members))
