"""Sources of images: class folders, a folder with metadata, a zip, a table, Parquet files, tars, or the digits.

A source is listed as a stream, sorted by disk and written as a manifest, so that memory does not grow with it. The
order depends only on the paths, so the same images give the same dataset from a folder, a zip and S3.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.environment.scratch import temporary_folder
from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.collect import SUFFIXES, UNREAD_COLUMN, Draft, Filters, Notes
from pipelines.shards.ingest.folders import SourceListing, from_folders
from pipelines.shards.ingest.manifest import Manifest, SourceImage, write_manifest
from pipelines.shards.ingest.pictured import from_parquet, has_pictures
from pipelines.shards.ingest.places import TABLES, File, address, find_stored, open_stored, shown, text
from pipelines.shards.ingest.readers import InMemory, UnreadableError
from pipelines.shards.ingest.report import BadImage, Names
from pipelines.shards.ingest.spool import Spool
from pipelines.shards.ingest.tabled import Tabled, find_named
from pipelines.shards.ingest.tables import ImageRow, read_rows
from pipelines.shards.ingest.tarred import from_tars
from pipelines.shards.ingest.trees import find_all
from pipelines.storage import Storage, is_local, local_path

__all__ = ["SUFFIXES", "Source", "absolute", "open_source", "source_digest"]

NO_FILTERS = Filters()
Container = Callable[[Mapping[str, File], Spool, Storage, Notes, float, Filters], Draft]
"""Lists files that hold many pictures each; see `from_tars` and `from_parquet`."""


@dataclass(frozen=True)
class Source:
    """All images of a source, in the order in which they are written.

    Attributes:
        classes: class names; empty for data without labels.
        images: images of all splits, in order.
        captioned: whether any image has a caption.
        bad: rows and files that were left out before any image was opened.
        unused: reason -> names of files and columns that are not used.
        drawn: whether the splits were drawn at random, because the source has none.
        deeper: paths of images in a folder inside their class folder, which does not count as a class.
        without_caption: paths of images without a caption.
        filtered: why images were left out by what a table says of them -> number of images.
    """

    classes: tuple[str, ...]
    images: Manifest
    captioned: bool
    bad: tuple[BadImage, ...] = ()
    unused: Mapping[str, Names] = field(default_factory=dict)
    drawn: bool = False
    deeper: Names = field(default_factory=Names)
    without_caption: Names = field(default_factory=Names)
    filtered: Mapping[str, int] = field(default_factory=dict)


def open_source(
    source: str, storage: Storage, manifest: str, test_fraction: float = 0.1, filters: Filters = NO_FILTERS
) -> Source:
    """List a source's images into a manifest.

    Args:
        source: "digits", a path, or an s3:// or file:/// address.
        storage: storage of source and manifest.
        manifest: address of the folder of the manifest.
        test_fraction: fraction of a source without a test split that becomes one, chosen by a hash of the path.
        filters: leave out images by what tables say of them.

    Raises:
        DatasetError: there is no such source, its layout is unknown, or one of its tables cannot be read.
    """
    if not 0 < test_fraction < 1:
        raise DatasetError(f"the test fraction must be between 0 and 1, got {test_fraction}")
    with temporary_folder("sources") as scratch:
        if source == "digits":
            filters.check_source(source)
            draft = _digits()
        elif (container := _container(uri := address(source), storage)) is not None:
            file = find_stored(uri, storage)
            draft = container({file.name: file}, Spool(scratch / "files"), storage, Notes(), test_fraction, filters)
        elif _is_table(uri):
            draft = _from_table(uri, storage, scratch, test_fraction, filters)
        else:
            listed = SourceListing(find_all(uri, storage), Spool(scratch / "files"))
            if listed.tables:
                draft = _from_metadata(shown(uri), listed, storage, test_fraction, filters)
            elif (listed.tars or listed.parquet) and not listed.pictured:
                container, files = (from_tars, listed.tars) if listed.tars else (from_parquet, listed.parquet)
                draft = container(files, Spool(scratch / "held"), storage, listed.notes, test_fraction, filters)
            else:
                filters.check_source(shown(uri))
                draft = from_folders(shown(uri), listed, test_fraction)
        captions, without = 0, Names()

        def noted() -> Iterator[tuple[str, SourceImage]]:
            nonlocal captions
            for key, image in draft.images:
                if image.caption:
                    captions += 1
                else:
                    without.add(image.origin)
                yield key, image

        images = write_manifest(noted(), draft.most, manifest, storage)
    notes = draft.notes
    return Source(
        classes=draft.classes,
        images=images,
        captioned=captions > 0,
        bad=tuple(notes.bad),
        unused=dict(notes.unused),
        drawn=draft.drawn,
        deeper=notes.deeper,
        without_caption=without,
        filtered=dict(notes.filtered),
    )


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
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape"))
    if source == "digits":
        return digest.hexdigest()
    uri = address(source)
    with temporary_folder("sources") as scratch:
        if _container(uri, storage) is not None:
            digest.update(find_stored(uri, storage).stamp.encode())
            return digest.hexdigest()
        if _is_table(uri):
            found = Spool(scratch / "named")
            find_named(uri.rpartition("/")[0], _rows(uri, storage), found, storage, Spool(scratch / "joined"))
            with open_stored(uri, storage) as file:
                digest.update(f"\n{hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
            files = Spool(scratch / "files")
            for _, (file_,) in found:
                files.add(file_.name, file_.stamp)
        else:
            files = Spool(scratch / "files")
            for each in find_all(uri, storage):
                if isinstance(each, File):
                    files.add(each.name, each.stamp)
        for name, records in files.groups():
            digest.update(f"\n{name} {records[0][0]}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _is_table(uri: str) -> bool:
    return uri.lower().endswith(TABLES) and not (is_local(uri) and local_path(uri).is_dir())


def _container(uri: str, storage: Storage) -> Container | None:
    """Return what lists a source that is a single file with many pictures in it; None for other sources."""
    if is_local(uri) and local_path(uri).is_dir():
        return None
    if uri.lower().endswith(".tar"):
        return from_tars
    held = uri.lower().endswith(".parquet") and has_pictures(find_stored(uri, storage), storage)
    return from_parquet if held else None


def _digits() -> Draft:
    """Return scikit-learn's 1,797 digits, 8x8 grey; every fifth one is in the test split, and they stay in order."""
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

    count = len(digits.target)
    images = ((f"{(i << 64) // count:016x}", picture(i, int(label))) for i, label in enumerate(digits.target))
    return Draft(tuple(str(i) for i in range(10)), images, count, Notes())


def _from_metadata(
    where: str, listed: SourceListing, storage: Storage, test_fraction: float, filters: Filters
) -> Draft:
    """Return the source that the metadata of a folder or a zip describes."""
    names = sorted(listed.tables)
    tabled, columns = Tabled(listed.files, listed.notes, filters), set[str]()
    for name in names:
        try:
            data = listed.tables[name].read(storage)
        except UnreadableError as error:
            raise DatasetError(f"{where}: {name}: {error}") from error
        tabled.add(read_rows(name, io.BytesIO(data), columns, filters.column))
    return _with_columns(tabled.draft(names, test_fraction), columns)


def _from_table(uri: str, storage: Storage, scratch: Path, test_fraction: float, filters: Filters) -> Draft:
    """Return the source that a separate table describes."""
    files = Spool(scratch / "files")
    find_named(uri.rpartition("/")[0], _rows(uri, storage), files, storage, Spool(scratch / "joined"))
    tabled, columns = Tabled(files, Notes(), filters), set[str]()
    with open_stored(uri, storage) as file:
        tabled.add(read_rows(uri.rpartition("/")[2], file, columns, filters.column))
    return _with_columns(tabled.draft((), test_fraction), columns)


def _rows(uri: str, storage: Storage) -> Iterator[ImageRow]:
    with open_stored(uri, storage) as file:
        rows = read_rows(uri.rpartition("/")[2], file, set())
        yield from (row for row in rows if isinstance(row, ImageRow))


def _with_columns(draft: Draft, columns: set[str]) -> Draft:
    for column in columns:
        draft.notes.unuse(UNREAD_COLUMN, column)
    return draft
