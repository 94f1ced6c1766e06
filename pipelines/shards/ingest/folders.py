"""Images in class folders, with or without split folders above them, or in no folders."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.collect import NO_FILE, SPLIT_FOLDERS, SUFFIXES, TEST_FOLDERS, Draft, Notes, drawn_split
from pipelines.shards.ingest.manifest import SourceImage, rank
from pipelines.shards.ingest.places import File
from pipelines.shards.ingest.readers import StoredFile
from pipelines.shards.ingest.report import BadImage
from pipelines.shards.ingest.spool import Spool
from pipelines.shards.ingest.tables import METADATA
from pipelines.shards.ingest.trees import Found, NoFile


class SourceListing:
    """The files of a source, sorted by the ranks of their names in a spool, and what decides its layout.

    Args:
        found: the listing, which is taken once.
        spool: an empty spool; gets (rank, file).
    """

    def __init__(self, found: Iterator[Found], spool: Spool) -> None:
        self.files, self.notes = spool, Notes()
        self.tables: dict[str, File] = {}
        self.parquet: dict[str, File] = {}
        self.tars: dict[str, File] = {}
        self.folders: set[str] = set()
        self.pictured = self.loose = False
        for each in found:
            if isinstance(each, BadImage):
                self.notes.bad.append(each)
            elif isinstance(each, NoFile):
                self.notes.unuse(NO_FILE, each.name)
            elif isinstance(each, File):
                self._take(each)
            else:
                self._enter(each.name)

    def _take(self, file: File) -> None:
        name = file.name
        folder, _, base = name.rpartition("/")
        if base in METADATA:
            self.tables[name] = file
        elif isinstance(file.read, StoredFile):  # and not inside a zip
            if base.lower().endswith(".parquet"):
                self.parquet[name] = file
            elif base.lower().endswith(".tar"):
                self.tars[name] = file
        self.pictured = self.pictured or name.lower().endswith(SUFFIXES)
        self.loose = self.loose or folder == "train"
        if folder:
            self._enter(folder)
        self.files.add(rank(name), file)

    def _enter(self, folder: str) -> None:
        """Note the folders that may be those of splits or classes."""
        top, _, below = folder.partition("/")
        self.folders.add(top)
        if below and top in SPLIT_FOLDERS:
            self.folders.add(f"{top}/{below.partition('/')[0]}")

    def split_folders(self) -> dict[str, str]:
        """Return prefix -> split of the split folders.

        Without split folders there is one prefix, empty or `train/`, whose split is empty: images are then divided by
        path.
        """
        tops = {folder for folder in self.folders if "/" not in folder}
        test = next((name for name in TEST_FOLDERS if name in tops), None)
        if "train" in tops and test is not None:
            return {"train/": "train", f"{test}/": "test"}
        if tops == {"train"} and not self.loose:
            return {"train/": ""}
        return {"": ""}


def from_folders(where: str, listed: SourceListing, test_fraction: float) -> Draft:
    """Return a source of images in class folders, or without labels where no image is in a folder.

    Raises:
        DatasetError: there is no image.
    """
    roots = listed.split_folders()
    classes = sorted({f.removeprefix(p) for p in roots for f in listed.folders if _is_child(f, p)})
    if not classes and not listed.pictured:
        raise DatasetError(f"{where} has no images; expected {where}/CLASS/*.png, {where}/*.png, or a metadata.jsonl")
    images = _images(listed, roots, classes, test_fraction)
    return Draft(tuple(classes), images, len(listed.files), listed.notes, drawn=not any(roots.values()))


def _is_child(folder: str, prefix: str) -> bool:
    return folder.startswith(prefix) and "/" not in folder.removeprefix(prefix)


def _images(
    listed: SourceListing, roots: dict[str, str], classes: list[str], test_fraction: float
) -> Iterator[tuple[str, SourceImage]]:
    labels, notes = {name: i for i, name in enumerate(classes)}, listed.notes
    for key, records in listed.files.groups():
        file, *again = chain.from_iterable(records)
        notes.bad += [BadImage(other.name, "a second entry of this name in the zip") for other in again]
        prefix = next((p for p in roots if file.name.startswith(p)), None)
        if prefix is None:
            notes.unuse(f"outside {' and '.join(roots)}", file.name)
            continue
        inner = file.name.removeprefix(prefix)
        if not file.name.lower().endswith(SUFFIXES):
            notes.unuse(f"not named as an image ({', '.join(SUFFIXES)})", file.name)
        elif classes and "/" not in inner:
            notes.unuse("an image outside any class folder", file.name)
        else:
            label = labels[inner.partition("/")[0]] if classes else None
            if classes and inner.count("/") > 1:
                notes.deeper.add(file.name)
            split = roots[prefix] or drawn_split(file.name, test_fraction)
            yield key, SourceImage(split, label, None, file.name, file.stamp, file.read)
