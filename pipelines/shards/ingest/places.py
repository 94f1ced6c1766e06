"""Where sources are: addresses, whether there is anything, and stored objects as files."""

from __future__ import annotations

import errno
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.readers import RangedFile, Read, StoredFile
from pipelines.storage import Storage, StorageError, check_address, is_local, join, local_path, split_scheme

KINDS = (
    "a source is `digits`, a folder of class folders, a folder with metadata.jsonl, .csv or .parquet, a .zip of "
    "either, a .csv, .jsonl or .parquet of paths, or .parquet files or WebDataset tars that hold pictures; on this "
    "machine or at an address such as s3://BUCKET/KEY"
)
TABLES = (".csv", ".jsonl", ".parquet")


class NoSourceError(DatasetError):
    """The name of a source does not refer to one, as far as this machine can tell without a service."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class File:
    """One file of a source.

    Attributes:
        name: path relative to the source's root, with forward slashes; what is not UTF-8 in it is written as `\\xe9`.
        stamp: changes when the bytes change: size with modification time, ETag of the store, or CRC of the zip.
        read: returns the bytes.
    """

    name: str
    stamp: str
    read: Read

    @property
    def size(self) -> int:
        """Return the size in bytes."""
        return int(self.stamp.partition(" ")[0])


def address(source: str) -> str:
    """Return the address of a source that is given as a path or as an address."""
    if "://" in source:
        check_address(source)
        return source.rstrip("/")
    return f"file://{os.path.abspath(os.path.expanduser(source))}"


def check_there(source: str) -> None:
    """Check that a source on this machine is there, and is of one of the kinds; one in a store is not looked for.

    Raises:
        NoSourceError: it is not, or its address is none.
        DatasetError: the system keeps it from this user.
    """
    if not source.strip():  # such as a variable of the shell that is not set, by which the folder here would be read
        raise NoSourceError(f"the source has no name; {KINDS}")
    try:
        uri = address(source)
    except StorageError as error:
        raise NoSourceError(f"{error}; {KINDS}") from error
    if not is_local(uri):
        return
    path, single = local_path(uri), uri.lower().endswith((".zip", ".tar", *TABLES))
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise closed(error) from error
        raise NoSourceError(f"{shown(uri)} {'does not exist' if single else 'is not a folder'}; {KINDS}") from error
    if not (stat.S_ISDIR(mode) or (single and stat.S_ISREG(mode))):
        raise NoSourceError(f"{shown(uri)} is not a {'file' if single else 'folder'}; {KINDS}")


def shown(uri: str) -> str:
    """Return an address as messages show it: as a plain path where it is local."""
    return uri.removeprefix("file://")


def text(name: str) -> str:
    """Return a name as text that can be written and shown everywhere, whose bytes may not be UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def find_local(uri: str, name: str) -> File | None:
    """Return the file of this machine at an address, under the name that its source has for it; None if there is none.

    Raises:
        DatasetError: it cannot be looked at.
    """
    stamp = stamp_of(local_path(uri))
    return File(name, stamp, StoredFile(uri)) if stamp else None


def open_stored(uri: str, storage: Storage) -> io.BufferedReader:
    """Open a stored object as a seekable file, which is read in ranges of 1 MiB.

    Raises:
        DatasetError: there is none.
    """
    if is_local(uri):
        check_there(uri)
        return local_path(uri).open("rb")
    return io.BufferedReader(RangedFile(uri, find_stored(uri, storage).size, storage), buffer_size=1 << 20)


def find_stored(uri: str, storage: Storage) -> File:
    """Return the file at an address, from the listing of its folder where it is in a store.

    Raises:
        DatasetError: there is none.
    """
    name = uri.rpartition("/")[2]
    if is_local(uri):
        check_there(uri)
        found = find_local(uri, name)
    else:
        listed = (entry for entry in storage.scan(uri.rpartition("/")[0]) if entry.uri == uri)
        found = next((File(name, f"{entry.size} {entry.tag}", StoredFile(uri)) for entry in listed), None)
    if found is None:
        raise DatasetError(f"{shown(uri)} does not exist; {KINDS}")
    return found


def resolve(base: str, path: str) -> str:
    """Return the address of a path that is relative to a folder, absolute, or an address."""
    if "://" in path:
        return path
    if path.startswith("/"):
        return f"file://{path}"
    if is_local(base):
        return f"file://{os.path.normpath(local_path(base) / path)}"
    scheme, rest = split_scheme(join(base, path))
    return scheme + os.path.normpath(rest)  # normpath would remove a slash of the scheme


def stamp_of(path: Path) -> str | None:
    """Return the stamp of a local file; None where there is none, such as for a link that leads nowhere.

    Raises:
        DatasetError: it cannot be looked at, such as where its folder does not let this user.
    """
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise closed(error) from error
    except ValueError:  # a null byte in the path
        return None
    return f"{status.st_size} {status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else None


_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def closed(error: OSError) -> DatasetError:
    """Return the error for a folder or file that the system keeps from this user."""
    return DatasetError(
        f"{text(str(error.filename))} cannot be read ({error.strerror}), so images would be missing without a word: "
        "let this user read it and the folders above it, such as by chmod u+rX, or take it out of the source"
    )
