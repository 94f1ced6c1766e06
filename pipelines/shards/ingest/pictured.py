"""Pictures inside Parquet files, as the Hugging Face Hub stores datasets of images.

Parquet is read by row groups, of which each holds hundreds of pictures, so that single ones in an order of hashes would
be read hundreds of times. Row groups are therefore put into an order of hashes, a few of them at a time are a *block*,
and only the pictures of a block are mixed: a shard reads few row groups, and each row group is read a few times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.collect import UNREAD_COLUMN, Draft, Filters, Notes, named_splits
from pipelines.shards.ingest.manifest import RANK_BITS, rank
from pipelines.shards.ingest.places import File
from pipelines.shards.ingest.readers import ParquetImage, StoredFile, open_parquet, picture_column
from pipelines.shards.ingest.report import BadImage
from pipelines.shards.ingest.spool import Spool, ahead
from pipelines.shards.ingest.tabled import Tabled
from pipelines.shards.ingest.tables import READ, ImageRow, parse_row
from pipelines.storage import Storage

BLOCK_BYTES = 128 << 20
"""Bytes of pictures that are mixed with each other."""
READS_AT_ONCE = 8


@dataclass(frozen=True)
class _Group:
    """A row group: of which file it is, its number there, and the bytes of its pictures."""

    file: str
    number: int
    bytes: int


@dataclass(frozen=True)
class _Described:
    """A file: its row groups, what is read of it besides pictures, and the names of its classes where it has them."""

    file: File
    uri: str
    groups: tuple[_Group, ...]
    read: tuple[str, ...]
    unread: tuple[str, ...]
    classes: tuple[str, ...]


def has_pictures(file: File, storage: Storage) -> bool:
    """Return whether a Parquet file holds pictures; else it may be a table of paths.

    Raises:
        DatasetError: it is no Parquet file.
    """
    return picture_column(_opened(file, storage).schema_arrow) is not None


def from_parquet(
    files: Mapping[str, File], spool: Spool, storage: Storage, notes: Notes, test_fraction: float, filters: Filters
) -> Draft:
    """Return the source of the pictures in Parquet files.

    Args:
        files: path of each file.
        spool: an empty spool.
        storage: storage that holds them.
        notes: gets what cannot be used.
        test_fraction: see `open_source`.
        filters: leave out rows.

    Raises:
        DatasetError: a file cannot be read, or has no column of pictures.
    """
    splits = named_splits(files, notes)
    with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="parquet") as pool:
        used = (files[name] for name in splits)
        described = [*ahead(pool, lambda file: _describe(file, storage, filters), used, READS_AT_ONCE)]
        order = _order([group for each in described for group in each.groups])
        tabled = Tabled(spool, notes, filters, order)
        groups = [(each, group) for each in described for group in each.groups]
        reads = ahead(pool, lambda item: _read(*item, storage), groups, READS_AT_ONCE)
        for (each, group), values in zip(groups, reads, strict=True):
            for row in range(len(values)):
                path = f"{each.file.name}/{group.number}/{row}"
                image = ParquetImage(each.uri, each.file.size, group.number, row)
                spool.add(order(path), File(path, each.file.stamp, image))
            tabled.add(_rows(each, group, values, splits[each.file.name], filters.column))
    for column in sorted({column for each in described for column in each.unread}):
        notes.unuse(UNREAD_COLUMN, column)
    return tabled.draft((), test_fraction, by_folder=False)


def _opened(file: File, storage: Storage) -> pq.ParquetFile:
    assert isinstance(file.read, StoredFile)
    try:
        return open_parquet(file.read.uri, file.size, storage)
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{file.name} is not a readable Parquet file ({error}): write it again") from error


def _describe(file: File, storage: Storage, filters: Filters) -> _Described:
    """Return what is read of a file.

    Raises:
        DatasetError: it cannot be read, or has no column of pictures or of scores.
    """
    assert isinstance(file.read, StoredFile)
    parquet = _opened(file, storage)
    schema, metadata = parquet.schema_arrow, parquet.metadata
    pictures = picture_column(schema)
    if pictures is None:
        raise DatasetError(
            f"{file.name} has the columns {', '.join(schema.names) or 'nothing'}; it needs one with the bytes of "
            "pictures, such as `image` of the library datasets"
        )
    if filters.column is not None and filters.column not in schema.names:
        raise DatasetError(
            f"{file.name} has no column {filters.column}, by which data.min_score leaves out images: name another one"
        )
    known = {*READ, filters.column} - {"path", "file_name"}
    read = tuple(name for name in schema.names if name in known)
    unread = tuple(name for name in schema.names if name not in known and name != pictures.partition(".")[0])
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    at = paths.index(pictures)
    groups = tuple(
        _Group(file.name, number, metadata.row_group(number).column(at).total_compressed_size)
        for number in range(metadata.num_row_groups)
    )
    return _Described(file, file.read.uri, groups, read, unread, _class_names(schema))


def _class_names(schema: pa.Schema) -> tuple[str, ...]:
    """Return the names of the classes that the library `datasets` records for the column `label`."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features["label"]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def _order(groups: list[_Group]) -> Callable[[str], str]:
    """Return a function from the path of a picture, FILE/GROUP/ROW, to its rank: by its block, then by its hash."""
    blocks: dict[str, int] = {}
    block, held = 0, 0
    for group in sorted(groups, key=lambda each: rank(f"{each.file}/{each.number}")):
        if held and held + group.bytes > BLOCK_BYTES:
            block, held = block + 1, 0
        blocks[f"{group.file}/{group.number}"] = block
        held += group.bytes

    def key(path: str) -> str:
        own, count = rank(path), block + 1
        first = (blocks[path.rpartition("/")[0]] << RANK_BITS) // count
        return f"{first + int(own[:16], 16) // count:016x}{own}"

    return key


def _read(each: _Described, group: _Group, storage: Storage) -> list[dict[str, Any]]:
    """Return the values of a row group besides pictures, one row after the other."""
    parquet = _opened(each.file, storage)
    if not each.read:
        return [{} for _ in range(parquet.metadata.row_group(group.number).num_rows)]
    rows: list[dict[str, Any]] = parquet.read_row_group(group.number, columns=list(each.read)).to_pylist()
    return rows


def _rows(
    each: _Described, group: _Group, values: list[dict[str, Any]], split: str | None, score: str | None
) -> Iterator[ImageRow | BadImage]:
    """Yield the rows of a row group, and those that cannot be used."""
    for row, found in enumerate(values):
        path, label = f"{each.file.name}/{group.number}/{row}", found.get("label")
        if isinstance(label, int) and 0 <= label < len(each.classes):
            found["label"] = each.classes[label]
        try:
            yield parse_row(path, {**found, "path": path, "split": found.get("split") or split}, "", score)
        except ValueError as error:
            yield BadImage(path, str(error))
