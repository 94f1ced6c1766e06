"""What the data that a model was trained on hold, in counts: the training-data summary of a model.

Most of it is in the indices of the shards: a class is known by the checksum of its number. Licences and addresses are
in members that other tools write (`.json`); a dataset of `ddpm ingest` has none of these, so that its shards are not
read. The counts of a tar are recorded below the dataset in `contents/`, and made again where the tar or its quarantine
has changed.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

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
from pipelines.shards.erased import erased_samples, stream_before
from pipelines.shards.index import Dataset, DatasetError, Member, ShardIndex, read_dataset
from pipelines.shards.members import FlawError, decode_label
from pipelines.shards.quarantine import read_quarantine
from pipelines.storage import NotFoundError, Storage, join, layout

TRAIN = "train"
LICENCES = ("license", "licence", "license_name", "rights")
ADDRESSES = ("url", "image_url", "original_url", "source_url")
"""Names under which metadata have the licence of a picture, and where it was, whatever their case."""
MOST, OTHERS = 1_000, "(others)"
"""Licences and hosts that are named, and the name of what is beyond."""


@dataclass(frozen=True, eq=False)
class Contents:
    """What the samples of a tar hold, without those in quarantine.

    Attributes:
        images: number of samples.
        classes: class index -> number of samples; -1 for those without a label.
        captions: number of samples with a caption.
        licences: licence, as it is written -> number of samples.
        hosts: host of the address from which a picture came -> number of samples.
        files: of each image file its size and CRC-32 in one number, uint64 [samples with an image].
    """

    images: int
    classes: Mapping[int, int]
    captions: int
    licences: Mapping[str, int]
    hosts: Mapping[str, int]
    files: NDArray[np.uint64]


@dataclass(frozen=True)
class CountTar:
    """Count what the samples of a tar hold.

    Attributes:
        uri: folder of the dataset.
        storage: the store.
        left_out: shard -> indices of its samples in quarantine; None for all.
        metadata: whether there may be licences and addresses.
    """

    uri: str
    storage: Storage
    left_out: Mapping[str, Collection[int] | None]
    metadata: bool

    def inputs(self, tar: Tar) -> Any:
        """Return what decides the result besides the tar."""
        out = self.left_out.get(tar.name, ())
        return ["contents", stamp(tar.sidecar), None if out is None else sorted(out), self.metadata]

    def __call__(self, tar: Tar, advance: Advance) -> Contents:
        """Count, from the index of the tar as far as it says.

        Raises:
            DatasetError: the index is gone or damaged.
        """
        assert tar.expected is not None
        index = read_sidecar(tar.expected, self.uri, self.storage)
        out = self.left_out.get(tar.name, ())
        index = index.select([] if out is None else [i for i in range(len(index)) if i not in out])
        licences: Counter[str] = Counter()
        hosts: Counter[str] = Counter()
        if self.metadata:
            for _, _, data in read_members(_members(index, "json"), tar.entry.uri, self.storage):
                licence, host = _origin(data)
                licences.update([licence] if licence else [])
                hosts.update([host] if host else [])
        advance(tar.entry.size)
        files = [member.size << 32 | member.crc32 for _, member in image_members(index).values()]
        captions = sum(member.size > 0 for _, member in _members(index, "txt").values())
        classes = self._classes(index, tar.entry.uri)
        return Contents(len(index), classes, captions, licences, hosts, np.array(files, dtype=np.uint64))

    def _classes(self, index: ShardIndex, address: str) -> dict[int, int]:
        """Return class index -> number of samples; numbers that are written in another way than usual are read."""
        there = _members(index, "cls")
        found: Counter[int] = Counter({-1: len(index) - len(there)})
        unusual: dict[int, tuple[str, Member]] = {}
        for i, (name, member) in there.items():
            number = _numbers(member.size).get(member.crc32)
            if number is None:
                unusual[i] = name, member
            else:
                found[number] += 1
        for _, _, data in read_members(unusual, address, self.storage):
            with suppress(FlawError):
                found[decode_label(bytes(data))] += 1
        return {number: count for number, count in sorted(found.items()) if count}

    def to_plain(self, result: Contents) -> Any:
        """Return the counts as JSON types."""
        return {**vars(result), "files": base64.b64encode(result.files.tobytes()).decode()}

    def from_plain(self, plain: Any, tar: Tar) -> Contents:
        """Return the counts of a record.

        Raises:
            ValueError, KeyError, TypeError: it is damaged.
        """
        files = np.frombuffer(base64.b64decode(plain["files"]), np.uint64)
        classes = {int(number): count for number, count in plain["classes"].items()}
        return Contents(**{**plain, "files": files, "classes": classes})


def _members(index: ShardIndex, name: str) -> dict[int, tuple[str, Member]]:
    rows = index.rows(name) if name in index.columns else []
    return {i: (name, Member(*row)) for i, row in enumerate(rows) if row[0] >= 0}


_BY_SIZE: dict[int, dict[int, int]] = {}


def _numbers(size: int) -> Mapping[int, int]:
    """Return CRC-32 -> number, for numbers of so many decimal digits, of which no two have the same up to 4 bytes."""
    if size not in range(1, 5):
        return {}
    if size not in _BY_SIZE:
        first = 10 ** (size - 1) if size > 1 else 0
        _BY_SIZE[size] = {zlib.crc32(str(number).encode()): number for number in range(first, 10**size)}
    return _BY_SIZE[size]


def _origin(data: memoryview) -> tuple[str | None, str | None]:
    """Return the licence of a picture and the host from which it came, as far as its metadata say."""
    try:
        plain = json.loads(bytes(data))
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(plain, dict):
        return None, None
    known = {str(name).lower(): value for name, value in plain.items() if isinstance(value, str) and value.strip()}
    licence = next((known[name].strip() for name in LICENCES if name in known), None)
    address = next((known[name] for name in ADDRESSES if name in known), "")
    with suppress(ValueError):
        return licence, urlsplit(address).hostname
    return licence, None


@dataclass(frozen=True)
class SourceContents:
    """What one dataset that a model was trained on holds, without what was in quarantine.

    Attributes:
        name: of the source in a mixture; "" for a dataset alone.
        uri: folder of the dataset.
        digest: of the stream of samples that was trained on.
        changed: whether the dataset was changed since, so that the counts are of what is there now.
        images: split -> number of samples.
        classes: class -> number of samples of the train split; "" for those without a label.
        captions: number of samples of the train split with a caption.
        licences: licence -> number of samples of the train split, as far as their metadata say.
        hosts: host from which pictures came -> number of samples of the train split.
        copies: samples of the train split whose image file is that of another one before.
        near_duplicates: pairs of nearly the same images that the ingest found; None where there was no ingest.
        left_out: kind of problem -> number of entries in the quarantine, of all splits.
        erased: number of samples that were erased, of all splits.
        weights: of a source, by the sample of the stream from which each holds.
    """

    name: str
    uri: str
    digest: str
    changed: bool
    images: dict[str, int]
    classes: dict[str, int]
    captions: int
    licences: dict[str, int]
    hosts: dict[str, int]
    copies: int
    near_duplicates: int | None
    left_out: dict[str, int]
    erased: int
    weights: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SourceContents:
        """Return what `asdict` gave.

        Raises:
            TypeError: it is none.
        """
        return cls(**plain)


def trained_contents(lineage: Mapping[str, Any], storage: Storage, reading: TarReading) -> tuple[SourceContents, ...]:
    """Return what the data hold that a model was trained on, by its lineage; one for each source of a mixture.

    Args:
        reading: where tars are read whose contents are not recorded, and who is told.

    Raises:
        DatasetError: a dataset is gone or damaged.
        StorageError: the store does not answer.
    """
    alone = {"name": "", "uri": lineage["dataset_uri"], "stream_digest": lineage["stream_digest"], "weights": {}}
    return tuple(_source(each, storage, reading) for each in lineage.get("sources") or [alone])


def _source(source: Mapping[str, Any], storage: Storage, reading: TarReading) -> SourceContents:
    uri, digest = str(source["uri"]), str(source["stream_digest"])
    found = stream_before(uri, digest, storage)
    dataset, quarantine = found or (read_dataset(uri, storage), read_quarantine(uri, storage))
    report = _ingest_report(dataset, storage)
    out = {} if quarantine is None else quarantine.by_shard
    left_out = {name: None if samples is None else frozenset(samples) for name, samples in out.items()}
    work = CountTar(uri, storage, left_out, metadata=report is None)
    splits = {shard.name: split for split in dataset.splits for shard in dataset.shards(split)}
    by_split: dict[str, list[Contents]] = {split: [] for split in dataset.splits}
    for shard, counted in read_shards(dataset, work, layout.CONTENTS, storage, reading):
        by_split[splits[shard.name]].append(counted)
    train = by_split.get(TRAIN, [])
    files = np.concatenate([each.files for each in train]) if train else np.zeros(0, np.uint64)
    classes = _added(each.classes for each in train)
    return SourceContents(
        name=str(source["name"]),
        uri=uri,
        digest=digest,
        changed=found is None,
        images={split: sum(each.images for each in counted) for split, counted in by_split.items()},
        classes={_class_name(number, dataset): count for number, count in sorted(classes.items())},
        captions=sum(each.captions for each in train),
        licences=_most_first(_added(each.licences for each in train)),
        hosts=_most_first(_added(each.hosts for each in train)),
        copies=len(files) - len(np.unique(files)),
        near_duplicates=None if report is None else int(report.get("alike", {}).get("count", 0)),
        left_out=_most_first(Counter(problem.kind for problem in (quarantine.excluded if quarantine else ()))),
        erased=len(erased_samples(dataset, storage)),
        weights=dict(source["weights"]),
    )


def _ingest_report(dataset: Dataset, storage: Storage) -> dict[str, Any] | None:
    try:
        return dict(json.loads(storage.read(join(dataset.uri, layout.INGEST_REPORT))))
    except NotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{join(dataset.uri, layout.INGEST_REPORT)} is damaged: {error}") from error


def _class_name(number: int, dataset: Dataset) -> str:
    if number < 0:
        return ""
    return dataset.classes[number] if number < len(dataset.classes) else str(number)


def _added(counts: Iterable[Mapping[Any, int]]) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for each in counts:
        total.update(each)
    return total


def _most_first(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts, the largest first; those beyond `MOST` as one."""
    found = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    others = sum(count for _, count in found[MOST:])
    return dict(found[:MOST]) | ({OTHERS: others} if others else {})


SHOWN = 8
"""Classes, licences and hosts that are shown."""


def contents_rows(source: SourceContents) -> list[tuple[str, str]]:
    """Return rows (property, value) about a source, for a page."""
    images = ", ".join(f"{count:,} {split}" for split, count in source.images.items())
    train = source.images.get(TRAIN, 0)
    without = source.classes.get("", 0)
    classes = {name: count for name, count in source.classes.items() if name}
    rows = [("images", f"{images}{' (as it is now: the dataset has changed since)' if source.changed else ''}")]
    rows += [("images of each class", _listed(classes))] if classes else []
    rows += [("without a class", f"{without:,}")] if without and classes else []
    rows += [("with a caption", f"{source.captions:,}")] if source.captions else []
    known = sum(source.licences.values())
    unknown = f"; {train - known:,} say none" if known else "their metadata say none"
    rows.append(("licences", f"{_listed(source.licences)}{unknown}"))
    if source.hosts:
        rows.append((f"from {len(source.hosts):,} host{'s' * (len(source.hosts) != 1)}", _listed(source.hosts)))
    alike = "" if source.near_duplicates is None else f"; {source.near_duplicates:,} pairs are nearly the same"
    rows.append(("copies of another file", f"{source.copies:,}{alike}"))
    rows.append(("left out by quarantine", _listed(source.left_out) or "none"))
    return [*rows, ("erased", f"{source.erased:,}")] if source.erased else rows


def _listed(counts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:SHOWN])
    return f"{shown} and {len(counts) - SHOWN:,} more" if len(counts) > SHOWN else shown


def plain_contents(sources: Sequence[SourceContents]) -> list[dict[str, Any]]:
    """Return the sources as JSON types."""
    return [asdict(source) for source in sources]
