"""Pictures inside WebDataset tars, such as img2dataset writes: `KEY.jpg` with `KEY.txt`, `KEY.json` and `KEY.cls`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipelines.shards.audit.scan import ObjectStream, RawSample, TarFaultError, read_samples
from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.collect import SUFFIXES, Draft, Filters, Notes, named_splits
from pipelines.shards.ingest.places import File
from pipelines.shards.ingest.readers import StoredFile, TarMember
from pipelines.shards.ingest.report import BadImage
from pipelines.shards.ingest.spool import Spool, ahead
from pipelines.shards.ingest.tabled import Tabled
from pipelines.shards.ingest.tables import ImageRow, parse_row
from pipelines.storage import Storage

READS_AT_ONCE = 8


@dataclass
class _TarListing:
    """A tar: its pictures, the rows that its other members make, and what cannot be used."""

    pictures: list[File] = field(default_factory=list)
    rows: list[ImageRow] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)


def from_tars(
    files: Mapping[str, File], spool: Spool, storage: Storage, notes: Notes, test_fraction: float, filters: Filters
) -> Draft:
    """Return the source of the pictures in WebDataset tars, each of which is read once from end to end.

    Args:
        files: path of each tar.
        spool: an empty spool.
        storage: storage that holds them.
        notes: gets what cannot be used, such as what follows the damage of a tar.
        test_fraction: see `open_source`.
        filters: leave out samples; the column of scores is one of the `json` members.

    Raises:
        DatasetError: there is no sample, or none has the column of scores.
    """
    splits = named_splits(files, notes)
    tabled, scored = Tabled(spool, notes, filters), False
    with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="tars") as pool:
        used = (files[name] for name in splits)
        for listed in ahead(
            pool, lambda file: _list(file, splits[file.name], storage, filters.column), used, READS_AT_ONCE
        ):
            for picture in listed.pictures:
                spool.add(tabled.order(picture.name), picture)
            notes.bad += listed.bad
            tabled.add(listed.rows)
            scored = scored or bool(listed.rows)
    if not len(spool):
        reason = notes.bad[0].reason if notes.bad else "write it again"
        raise DatasetError(f"{', '.join([*files][:5])} holds no sample: {reason}")
    if filters.column is not None and not scored:
        raise DatasetError(
            f"no sample has a number {filters.column} in its json, by which data.min_score leaves out images: name "
            "another one"
        )
    return tabled.draft((), test_fraction, by_folder=False)


def _list(file: File, split: str | None, storage: Storage, score: str | None) -> _TarListing:
    """Return what a tar holds, up to its damage where it is damaged."""
    assert isinstance(file.read, StoredFile)
    listed = _TarListing()
    try:
        for sample in read_samples(ObjectStream(file.read.uri, file.size, storage)):
            suffix = next((own for own in SUFFIXES if own[1:] in sample.members), None)
            path = f"{file.name}/{sample.key}{suffix or ''}"
            if suffix is None:
                listed.bad.append(BadImage(path, f"has no picture ({', '.join(SUFFIXES)})"))
                continue
            member = sample.members[suffix[1:]]
            image = TarMember(file.read.uri, member.offset, member.size, member.crc32)
            listed.pictures.append(File(path, f"{member.size} {member.crc32:08x}", image))
            try:
                values = dict(_values(sample)) | {"path": path, "split": split}
                listed.rows.append(parse_row(path, values, "", score))
            except ValueError as error:
                listed.bad.append(BadImage(path, str(error)))
    except TarFaultError as error:
        listed.bad.append(BadImage(file.name, str(error)))
    return listed


def _values(sample: RawSample) -> Iterator[tuple[str, Any]]:
    """Yield (column, value) of the members beside the picture; a `txt` or `cls` is in front of the json's.

    Raises:
        ValueError: a member is not UTF-8, or its json is none.
    """
    contents = sample.contents
    if "json" in contents:
        try:
            found = json.loads(contents["json"])
        except RecursionError as error:
            raise ValueError(f"{sample.key}.json is nested too deeply") from error
        if not isinstance(found, dict):
            raise ValueError(f"{sample.key}.json is not a JSON object")
        yield from ((column, value) for column, value in found.items() if column not in ("path", "split"))
    if "txt" in contents:
        yield "text", contents["txt"].decode()
    if "cls" in contents:
        yield "label", contents["cls"].decode().strip()
