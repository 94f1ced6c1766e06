"""Images that tables name: metadata in a folder or a zip, or a separate table of paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.collect import SPLIT_FOLDERS, TEST_FOLDERS, Draft, Filters, Notes, drawn_split
from pipelines.shards.ingest.manifest import SourceImage, rank
from pipelines.shards.ingest.places import File, find_local, resolve
from pipelines.shards.ingest.readers import StoredFile
from pipelines.shards.ingest.report import BadImage
from pipelines.shards.ingest.spool import Spool
from pipelines.shards.ingest.tables import ImageRow
from pipelines.storage import Entry, Storage, is_local, split_scheme

UNUSED_FILE = "not named by a good row of the metadata"


class Tabled:
    """The rows of tables beside the files that they name, and what decides splits and labels.

    Args:
        spool: holds (rank of the path, file); gets (rank of the path, row).
        notes: gets the rows that cannot be used.
        filters: leave out rows.
        order: returns the rank of a path.
    """

    def __init__(self, spool: Spool, notes: Notes, filters: Filters, order: Callable[[str], str] = rank) -> None:
        self.spool, self.notes, self.filters, self.order = spool, notes, filters, order
        self.labels, self.tops = _Labels(), set[str]()
        self.says_split = False

    def add(self, rows: Iterable[ImageRow | BadImage]) -> None:
        """Take the rows of a table."""
        for row in rows:
            if isinstance(row, BadImage):
                self.notes.bad.append(row)
                continue
            self.labels.add(row)
            top, slash, _ = row.path.partition("/")
            if slash and top in SPLIT_FOLDERS:
                self.tops.add(top)
            self.says_split = self.says_split or row.split is not None
            self.spool.add(self.order(row.path), row)

    def draft(self, tables: Iterable[str], test_fraction: float, *, by_folder: bool = True) -> Draft:
        """Return the source.

        Args:
            tables: paths of the tables, which are no unused files.
            test_fraction: see `open_source`.
            by_folder: take folders for classes where no row has a label.

        Raises:
            DatasetError: the labels of the rows do not go together.
        """
        test = next((name for name in TEST_FOLDERS if name in self.tops), None)
        folders = {"train": "train", test: "test"} if "train" in self.tops and test is not None else {}
        named = self._class_folders(folders) if by_folder and not self.labels.any else frozenset[str]()
        self.labels.names |= named
        classes, numbers = self.labels.numbered()
        images = self._images(folders, named, numbers, set(tables), test_fraction)
        return Draft(classes, images, len(self.spool), self.notes, drawn=not folders and not self.says_split)

    def _class_folders(self, folders: dict[str, str]) -> frozenset[str]:
        """Return the class folders, where every image is in one and there are several; else none."""
        used: set[str] = set()
        for _, files, rows in self._joined():
            for row in rows if files else ():
                below = _below(row.path, folders)
                if row.path.startswith("/") or "://" in row.path or len(below) != 2:
                    return frozenset()
                used.add(below[0])
        return frozenset(used) if len(used) > 1 else frozenset()

    def _joined(self) -> Iterator[tuple[str, list[File], list[ImageRow]]]:
        """Yield rank, files and rows of each path."""
        for key, records in self.spool.groups():
            found: list[Any] = [record[0] for record in records]
            files = [each for each in found if isinstance(each, File)]
            yield key, files, [each for each in found if isinstance(each, ImageRow)]

    def _images(
        self,
        folders: dict[str, str],
        by_folder: frozenset[str],
        numbers: dict[str, int],
        tables: set[str],
        test_fraction: float,
    ) -> Iterator[tuple[str, SourceImage]]:
        for key, files, rows in self._joined():
            good: str | None = None
            for row in rows:
                if by_folder:
                    row = replace(row, label=_below(row.path, folders)[0])
                top = row.path.partition("/")[0]
                split = row.split or (folders.get(top) if folders else drawn_split(row.path, test_fraction))
                if good is not None:
                    reason = f"repeats {row.path} of {good}"
                elif not files:
                    reason = f"{row.path}: no such file"
                elif numbers and row.label is None:
                    reason = f"{row.path} has no label while other rows have one"
                elif split is None:
                    reason = f"{row.path} is outside {' and '.join(f'{name}/' for name in folders)}"
                else:
                    good, label = row.where, None if row.label is None else numbers[str(row.label)]
                    if (filtered := self.filters.by_row(row.caption, row.score)) is not None:
                        self.notes.filtered[filtered] += 1
                        continue
                    yield key, SourceImage(split, label, row.caption, row.path, files[0].stamp, files[0].read)
                    continue
                self.notes.bad.append(BadImage(row.where, reason))
            if good is None and files and files[0].name not in tables:
                self.notes.unuse(UNUSED_FILE, files[0].name)


def find_named(base: str, rows: Iterable[ImageRow], spool: Spool, storage: Storage, joined: Spool) -> None:
    """Add the files that exist of those that rows name by paths that are relative to a folder, absolute, or addresses.

    An address outside the folder is not checked: where there is no such file, reading it fails.

    Args:
        base: address of the folder.
        rows: rows of a table.
        spool: gets (rank of the path, file).
        storage: storage that holds the files.
        joined: an empty spool, in which rows meet the listing of the store.

    Raises:
        DatasetError: a local file cannot be looked at.
    """
    common: str | None = None
    for row in rows:
        uri = resolve(base, row.path)
        if is_local(uri):
            file = find_local(uri, row.path)
        elif not uri.startswith(base + "/"):
            file = File(row.path, "", StoredFile(uri))
        else:
            folder = uri.rpartition("/")[0]
            common = folder if common is None else _common(common, folder)
            joined.add(uri, row.path)
            continue
        if file is not None:
            spool.add(rank(row.path), file)
    if common is None:
        return
    for entry in storage.scan(common):
        joined.add(entry.uri, entry)
    for uri, records in joined.groups():
        stamp = next((f"{each.size} {each.tag}" for (each,) in records if isinstance(each, Entry)), None)
        for (path,) in records:
            if stamp is not None and isinstance(path, str):
                spool.add(rank(path), File(path, stamp, StoredFile(uri)))


def _common(one: str, other: str) -> str:
    """Return the folder of a store that two of its folders lie in."""
    scheme, rest = split_scheme(one)
    return scheme + os.path.commonpath([rest, split_scheme(other)[1]])


def _below(path: str, folders: dict[str, str]) -> list[str]:
    parts = path.split("/")
    return parts[1:] if parts[0] in folders else parts


class _Labels:
    """The labels of rows, of which the names are in memory."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.number: ImageRow | None = None
        self.name: ImageRow | None = None

    @property
    def any(self) -> bool:
        """Return whether any row has a label."""
        return bool(self.names)

    def add(self, row: ImageRow) -> None:
        """Take the label of a row, if it has one."""
        if row.label is None:
            return
        self.names.add(str(row.label))
        if isinstance(row.label, int):
            self.number = self.number or row
        elif not _is_index(row.label):
            self.name = self.name or row

    def numbered(self) -> tuple[tuple[str, ...], dict[str, int]]:
        """Return class names and the index of each label; decimal labels are indices, names are sorted and numbered.

        Raises:
            DatasetError: some labels are numbers, as JSON has them, and others are names, or most indices have no
                image.
        """
        number, name = self.number, self.name
        if number is not None and name is not None:
            raise DatasetError(
                f"{number.where} has the label {number.label}, a class index, and {name.where} has {name.label!r}, a "
                "class name: write indices in all rows, or names in all, and numbers that are names as texts"
            )
        if not self.names or not all(map(_is_index, self.names)):
            names = sorted(self.names)
            return tuple(names), {name: i for i, name in enumerate(names)}
        long = next((label for label in self.names if len(label.lstrip("0")) > 18), None)
        if long is not None:
            raise DatasetError(f"the label {long[:18]}… is too long for a class index: number the classes from 0")
        indices = {label: int(label) for label in self.names}
        count = max(indices.values()) + 1
        if count > 10 * len(indices) + 100:
            raise DatasetError(
                f"the labels are class indices up to {count - 1:,}, but only {len(indices):,} of them are used: "
                "number the classes from 0, or give their names as labels"
            )
        return tuple(str(i) for i in range(count)), indices


def _is_index(label: str) -> bool:
    return label.isdecimal() and label.isascii()
