"""Listing of the images of a source: class folders, a folder with metadata, a zip, a table of paths, or the digits.

The result is a list of images in a fixed order, each with split, label and caption, and the names of unused files. The
order depends only on the paths, so the same images give the same dataset from a folder, a zip and S3.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.readers import InMemory, Read, UnreadableError
from pipelines.shards.ingest.report import BadImage
from pipelines.shards.ingest.tables import METADATA, ImageRow, ImageTable, parse_table
from pipelines.shards.ingest.trees import File, Tree, address, find_files, open_tree, read_table, shown, text
from pipelines.storage import Storage, is_local, local_path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")
NO_FILE = "a link that leads nowhere, a pipe, a socket or a device"
"""Reason for skipping a name in a folder that has no bytes to read."""
TEST_FOLDERS = ("test", "validation", "val", "valid")


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image to ingest, not yet opened.

    Attributes:
        split: "train" or "test".
        label: index into the classes; None for data without labels.
        caption: caption; None where the source has none.
        origin: path within the source, for reports and the sample's json.
        stamp: text that changes when the bytes of the file change.
        read: returns the bytes of the file.
    """

    split: str
    label: int | None
    caption: str | None
    origin: str
    stamp: str
    read: Read


@dataclass(frozen=True)
class Source:
    """All images of a source, in the order in which they are written.

    Attributes:
        classes: class names; empty for data without labels.
        images: images of all splits, in order.
        bad: rows and files that were left out before any image was opened.
        unused: reason -> names of files and columns that are not used.
        drawn: whether the splits were drawn at random, because the source has none.
        deeper: paths of images in a folder inside their class folder, which does not count as a class.
    """

    classes: tuple[str, ...]
    images: tuple[SourceImage, ...]
    bad: tuple[BadImage, ...] = ()
    unused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    drawn: bool = False
    deeper: tuple[str, ...] = ()

    @property
    def captioned(self) -> bool:
        """Return whether any image has a caption."""
        return any(image.caption for image in self.images)


def open_source(source: str, storage: Storage, test_fraction: float = 0.1) -> Source:
    """List a source's images.

    Args:
        source: "digits", a path, or an s3:// or file:/// address.
        test_fraction: fraction of a source without a test split that becomes one, chosen by a hash of the path.

    Raises:
        DatasetError: there is no such source, its layout is unknown, or one of its tables cannot be read.
    """
    if source == "digits":
        return _digits()
    if not 0 < test_fraction < 1:
        raise DatasetError(f"the test fraction must be between 0 and 1, got {test_fraction}")
    uri = address(source)
    if _is_table(uri):
        folder, _, name = uri.rpartition("/")
        table = parse_table(name, read_table(uri, storage))
        files = find_files(folder, {row.path for row in table.rows}, storage)
        return _from_tables(table, Tree(files, frozenset()), test_fraction)
    tree = open_tree(uri, storage)
    names = sorted(name for name in tree.files if posixpath.basename(name) in METADATA)
    if names:
        try:
            table = ImageTable.joined([parse_table(name, tree.files[name].read(storage)) for name in names])
        except UnreadableError as error:
            raise DatasetError(f"{shown(uri)}: {names[0]}: {error}") from error
        return _from_tables(table, tree, test_fraction)
    return _class_folders(shown(uri), tree, test_fraction)


def absolute(source: str) -> str:
    """Return the absolute address of a source, independent of the working directory.

    Raises:
        DatasetError: the path is not UTF-8, which configurations and runs need.
    """
    found = source if source == "digits" else shown(address(source))
    if text(found) != found:
        raise DatasetError(f"{text(found)} is not UTF-8: rename it, or the folder above it, or give a link to it")
    return found


def source_digest(source: str, storage: Storage | None = None) -> str:
    """Return a digest of the names, sizes and modification times (ETags on S3) of a source's files."""
    storage = storage or Storage()
    state = [source]
    if source != "digits":
        uri = address(source)
        if _is_table(uri):
            folder, _, name = uri.rpartition("/")
            data = read_table(uri, storage)
            state.append(hashlib.sha256(data).hexdigest())
            files = find_files(folder, {row.path for row in parse_table(name, data).rows}, storage)
        else:
            files = open_tree(uri, storage).files
        state += [f"{name} {files[name].stamp}" for name in sorted(files)]
    return hashlib.sha256("\n".join(state).encode("utf-8", "surrogateescape")).hexdigest()


def _is_table(uri: str) -> bool:
    return uri.lower().endswith((".csv", ".jsonl")) and not (is_local(uri) and local_path(uri).is_dir())


def _digits() -> Source:
    """Return scikit-learn's 1,797 digits, 8x8 grey; every fifth one is in the test split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError("digits come with scikit-learn: pip install 'ddpm-pipelines[local]'") from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)

    def picture(i: int, label: int) -> SourceImage:
        buffer = io.BytesIO()
        Image.fromarray(pixels[i]).save(buffer, "png")
        split = "test" if i % 5 == 4 else "train"
        return SourceImage(split, label, None, f"digits[{i}]", "", InMemory(buffer.getvalue()))

    images = tuple(picture(i, int(label)) for i, label in enumerate(digits.target))
    return Source(tuple(str(i) for i in range(10)), images)


def _class_folders(where: str, tree: Tree, test_fraction: float) -> Source:
    """Return a source of images in class folders, or without labels where no image is in a folder."""
    roots = _split_folders(tree)
    classes = sorted({f.removeprefix(p) for p in roots for f in tree.folders if _is_child(f, p)})
    if not classes and not any(name.lower().endswith(SUFFIXES) for name in tree.files):
        raise DatasetError(f"{where} has no images; expected {where}/CLASS/*.png, {where}/*.png, or a metadata.jsonl")
    labels = {name: i for i, name in enumerate(classes)}
    images, deeper, unused = [], [], _Unused()
    unused.add(NO_FILE, *tree.no_files)
    for name, file in tree.files.items():
        prefix = next((p for p in roots if name.startswith(p)), None)
        if prefix is None:
            unused.add(f"outside {' and '.join(roots)}", name)
        elif not name.lower().endswith(SUFFIXES):
            unused.add(f"not named as an image ({', '.join(SUFFIXES)})", name)
        elif classes and "/" not in name.removeprefix(prefix):
            unused.add("an image outside any class folder", name)
        else:
            label = labels[name.removeprefix(prefix).partition("/")[0]] if classes else None
            split = roots[prefix] or _drawn_split(name, test_fraction)
            images.append(SourceImage(split, label, None, name, file.stamp, file.read))
            if classes and name.removeprefix(prefix).count("/") > 1:
                deeper.append(name)
    bad = tuple(BadImage(name, reason) for name, reason in tree.bad)
    drawn = not any(roots.values())
    return Source(tuple(classes), _in_order(images), bad, unused.by_reason(), drawn, tuple(sorted(deeper)))


def _is_child(folder: str, prefix: str) -> bool:
    return folder.startswith(prefix) and "/" not in folder.removeprefix(prefix)


def _split_folders(tree: Tree) -> dict[str, str]:
    """Return prefix -> split of the split folders.

    Without split folders there is one prefix, empty or `train/`, whose split is empty: images are then divided by path.
    """
    tops = {folder for folder in tree.folders if "/" not in folder}
    test = next((name for name in TEST_FOLDERS if name in tops), None)
    if "train" in tops and test is not None:
        return {"train/": "train", f"{test}/": "test"}
    loose = any(name.startswith("train/") and name.count("/") == 1 for name in tree.files)
    if tops == {"train"} and not loose:
        return {"train/": ""}
    return {"": ""}


def _from_tables(table: ImageTable, tree: Tree, test_fraction: float) -> Source:
    bad = [*table.bad, *(BadImage(name, reason) for name, reason in tree.bad)]
    tops = {row.path.partition("/")[0] for row in table.rows if "/" in row.path}
    test = next((name for name in TEST_FOLDERS if name in tops), None)
    folders = {"train": "train", test: "test"} if "train" in tops and test is not None else {}
    rows = table.rows
    if all(row.label is None for row in rows):
        rows = _labelled_by_folder(rows, tree.files, folders)
    classes, labels = _number(rows)
    seen: dict[str, str] = {}
    images = []
    for row in rows:
        top = row.path.partition("/")[0]
        split = row.split or (folders.get(top) if folders else _drawn_split(row.path, test_fraction))
        reason = _row_fault(row, tree.files, seen, split, bool(classes), folders)
        if reason:
            bad.append(BadImage(row.where, reason))
            continue
        seen[row.path] = row.where
        file = tree.files[row.path]
        label = None if row.label is None else labels[str(row.label)]
        assert split is not None
        images.append(SourceImage(split, label, row.caption, row.path, file.stamp, file.read))
    unused = _Unused()
    unused.add(NO_FILE, *tree.no_files)
    for column in table.unread_columns:
        unused.add("columns that nothing reads", column)
    for name in tree.files.keys() - seen.keys() - set(table.names):
        unused.add("not named by a good row of the metadata", name)
    drawn = not folders and not any(row.split for row in rows)
    return Source(classes, _in_order(images), tuple(bad), unused.by_reason(), drawn=drawn)


def _labelled_by_folder(
    rows: tuple[ImageRow, ...], files: Mapping[str, File], folders: Mapping[str, str]
) -> tuple[ImageRow, ...]:
    """Return rows with their class folders as labels, where every image is in one and there are several; else as is.

    Args:
        files: by path; rows of others are no images.
        folders: the split folders above the class folders, if any.
    """
    named = []
    for row in rows:
        parts = row.path.split("/")
        below = parts[1:] if parts[0] in folders else parts
        if row.path in files and (row.path.startswith("/") or "://" in row.path or len(below) != 2):
            return rows
        named.append(replace(row, label=below[0]))
    used = {row.label for row in named if row.path in files}
    return tuple(replace(row, label=None) if row.label not in used else row for row in named) if len(used) > 1 else rows


def _row_fault(
    row: ImageRow,
    files: Mapping[str, File],
    seen: Mapping[str, str],
    split: str | None,
    labelled: bool,
    folders: Mapping[str, str],
) -> str | None:
    """Return why a row is left out; None for a row that can be used."""
    if row.path in seen:
        return f"repeats {row.path} of {seen[row.path]}"
    if row.path not in files:
        return f"{row.path}: no such file"
    if labelled and row.label is None:
        return f"{row.path} has no label while other rows have one"
    if split is None:
        return f"{row.path} is outside {' and '.join(f'{name}/' for name in folders)}"
    return None


def _number(rows: Collection[ImageRow]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return class names and the index of each label; decimal labels are indices, names are sorted and numbered.

    Raises:
        DatasetError: some labels are numbers, as JSON has them, and others are names, or most indices have no image.
    """
    number = next((row for row in rows if isinstance(row.label, int)), None)
    name = next((row for row in rows if isinstance(row.label, str) and not _is_index(row.label)), None)
    if number is not None and name is not None:
        raise DatasetError(
            f"{number.where} has the label {number.label}, a class index, and {name.where} has {name.label!r}, a class "
            "name: write indices in all rows, or names in all, and numbers that are names as texts"
        )
    found = {str(row.label) for row in rows if row.label is not None}
    if not found or not all(map(_is_index, found)):
        names = sorted(found)
        return tuple(names), {name: i for i, name in enumerate(names)}
    long = next((label for label in found if len(label.lstrip("0")) > 18), None)
    if long is not None:
        raise DatasetError(f"the label {long[:18]}… is too long for a class index: number the classes from 0")
    indices = {label: int(label) for label in found}
    count = max(indices.values()) + 1
    if count > 10 * len(found) + 100:
        raise DatasetError(
            f"the labels are class indices up to {count - 1:,}, but only {len(found):,} of them are used: "
            "number the classes from 0, or give their names as labels"
        )
    return tuple(str(i) for i in range(count)), indices


def _is_index(label: str) -> bool:
    return label.isdecimal() and label.isascii()


def _drawn_split(path: str, test_fraction: float) -> str:
    """Return the split of an image, chosen by a hash of its path."""
    return "test" if int(_rank(path)[:8], 16) < test_fraction * 2**32 else "train"


def _in_order(images: Iterable[SourceImage]) -> tuple[SourceImage, ...]:
    """Return the images ordered by a hash of their paths, so that shards mix all classes."""
    return tuple(sorted(images, key=lambda image: _rank(image.origin)))


def _rank(path: str) -> str:
    """Return the hash of a path."""
    return hashlib.sha256(path.encode()).hexdigest()


class _Unused:
    """Names of files and columns that are not used, by reason."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, *names: str) -> None:
        """Add names, or none."""
        if names:
            self.names.setdefault(reason, []).extend(names)

    def by_reason(self) -> dict[str, tuple[str, ...]]:
        """Return reason -> names in sorted order."""
        return {reason: tuple(sorted(names)) for reason, names in self.names.items()}
