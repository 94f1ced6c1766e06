"""Read tables of images: metadata.jsonl, .csv or .parquet of a folder, or a separate one of paths."""

from __future__ import annotations

import codecs
import csv
import io
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.report import BadImage
from pipelines.storage import StorageError, check_address

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PATH = ("file_name", "path")
CAPTION = ("text", "caption")
ROWS = 4096
"""Rows of a Parquet table that are in memory."""
READ = (*PATH, *CAPTION, "label", "split")


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image of a table.

    Attributes:
        where: file and line, for messages.
        path: path relative to the source's root, an absolute path, or an address.
        label: class name or class index; None where there is none.
        caption: caption; None where there is none.
        split: "train" or "test"; None where the table has none.
        score: number in the column by which images are filtered.
    """

    where: str
    path: str
    label: str | int | None
    caption: str | None
    split: str | None
    score: float | None = None


def read_rows(name: str, file: BinaryIO, columns: set[str], score: str | None = None) -> Iterator[ImageRow | BadImage]:
    """Yield the rows of a table, and in their places those that cannot be used; paths are relative to its folder.

    Args:
        name: path of the table relative to the source's root, ending with .jsonl, .csv or .parquet.
        file: the table, at its beginning.
        columns: gets the names of the columns that are not used.
        score: name of the column of scores, if any.

    Raises:
        DatasetError: it is not UTF-8, has no row, no column of paths or of scores or one of them twice, or ends inside
            a quoted field.
    """
    empty, scored = True, False
    try:
        for where, values in _values(name, file):
            empty = False
            if isinstance(values, str):
                yield BadImage(where, values)
                continue
            columns |= values.keys() - {*READ, score}
            scored = scored or score in values
            try:
                row = parse_row(where, values, posixpath.dirname(name), score)
            except ValueError as error:
                yield BadImage(where, str(error))
            else:
                yield row
    except UnicodeDecodeError as error:
        raise DatasetError(f"{name} is not UTF-8 (byte {_first_bad_byte(file)}): save it as UTF-8") from error
    if empty:
        raise DatasetError(f"{name} has no row: give it a row with `path` for each image, or remove it")
    if score is not None and not scored:
        raise DatasetError(f"{name} has no column {score}, by which data.min_score leaves out images: name another one")


def _first_bad_byte(file: BinaryIO) -> int:
    """Return the place of the first byte of a file that no UTF-8 has there."""
    file.seek(0)
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    while chunk := file.read(1 << 20):
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as error:
            return before - held + error.start
        before += len(chunk)
    return before


def _values(name: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield (file and line, values) of each row, or (file and line, reason) of one that cannot be read."""
    if name.lower().endswith(".parquet"):
        return _parquet(name, file)
    parse = _csv if name.lower().endswith(".csv") else _jsonl
    return parse(name, io.TextIOWrapper(file, "utf-8-sig", newline="" if parse is _csv else "\n"))


def _parquet(name: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield (file and row, values) of each row."""
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{name} is not a readable Parquet file ({error}): write it again") from error
    columns = parquet.schema_arrow.names
    _check_paths(name, columns)
    row = 0
    for batch in parquet.iter_batches(ROWS):
        for values in batch.to_pylist():
            yield f"{name}:{row}", {column: value for column, value in values.items() if value is not None}
            row += 1


def _check_paths(name: str, columns: Sequence[str]) -> None:
    """Refuse a table without a column of paths.

    Raises:
        DatasetError: names the columns.
    """
    if not set(PATH) & set(columns):
        found = ", ".join(columns) or "nothing"
        raise DatasetError(f"{name} has the columns {found}; it needs `path`, and may have `label`, `caption`, `split`")


def _csv(name: str, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield (file and line, values) of each row, or (file and line, reason) of one that cannot be read."""
    reader = csv.DictReader(lines, strict=True)
    columns = [column or "" for column in reader.fieldnames or []]
    _check_paths(name, columns)
    twice = next((column for column in READ if columns.count(column) > 1), None)
    if twice is not None:
        raise DatasetError(f"{name} has the column {twice} {columns.count(twice)} times: one is enough")
    try:
        for values in reader:
            where = f"{name}:{reader.line_num}"
            if None in values or None in values.values():
                yield where, f"has not {len(columns)} fields as the first line has: quote fields that hold commas"
            else:
                yield where, {column: value for column, value in values.items() if value != ""}
    except csv.Error as error:
        raise DatasetError(f"{name}, after line {reader.line_num}: {error}: correct the quotes there") from error


def _jsonl(name: str, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield (file and line, values) of each row, or (file and line, reason) of one that cannot be read."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            values = json.loads(line.removesuffix("\n"))
        except (ValueError, RecursionError) as error:
            yield where, f"is not JSON: {error}"
            continue
        yield where, values if isinstance(values, dict) else f"is not a JSON object but {line.strip()[:40]}"


def parse_row(where: str, values: dict[str, Any], folder: str, score: str | None) -> ImageRow:
    """Return a row from its values.

    Args:
        where: file and line, for messages.
        values: column -> value.
        folder: path of the table's folder relative to the source's root, which paths are relative to.
        score: name of the column of scores, if any.

    Raises:
        ValueError: a value is missing or invalid.
    """
    path = next((values[column] for column in PATH if values.get(column) is not None), None)
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"has no path in {' or '.join(PATH)}")
    if "://" in path:
        try:
            check_address(path)
        except StorageError as error:
            raise ValueError(f"{error}; fetch the file and name its path") from error
    else:
        path = posixpath.normpath(posixpath.join(folder, path))
    caption = next((values[column] for column in CAPTION if values.get(column) is not None), None)
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{path} has the caption {caption!r}, which is not a text")
    label = values.get("label")
    for column, value in (("path", path), ("caption", caption), ("label", label)):
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"has the {column} {value!r}, of which a part is no character: write it again as UTF-8")
    if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
        raise ValueError(f"{path} has the label {label!r}: labels are class names, or class indices from 0")
    if isinstance(label, int) and label < 0:
        raise ValueError(f"{path} has the label {label}: class indices start at 0; leave the label out where none is")
    if isinstance(label, str):
        label = label.strip()
        if not label:
            raise ValueError(f"{path} has an empty label: write the name of its class, or no label in any row")
    split = values.get("split")
    if split not in (None, "train", "test"):
        raise ValueError(f"{path} has the split {split!r}: splits are train and test")
    return ImageRow(where, path, label, (caption or "").strip() or None, split, _score(path, values, score))


def _score(path: str, values: dict[str, Any], score: str | None) -> float | None:
    """Return the number in the column of scores.

    Raises:
        ValueError: there is none.
    """
    if score is None:
        return None
    value = values.get(score)
    try:
        return float(value)  # type: ignore[arg-type]  # whatever it is: that is what is found out here
    except (TypeError, ValueError):
        raise ValueError(f"{path} has the {score} {value!r}: images are filtered by numbers") from None
