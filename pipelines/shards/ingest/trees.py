"""List the files of a local folder, a zip or a folder in a store, each with a function that reads it."""

from __future__ import annotations

import errno
import io
import os
import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.readers import Read, StoredFile, ZipMember
from pipelines.storage import (
    SYSTEM_FOLDERS,
    Entry,
    Storage,
    StorageError,
    check_address,
    is_local,
    join,
    local_path,
    split_scheme,
)

KINDS = (
    "a source is `digits`, a folder of class folders, a folder with metadata.jsonl or metadata.csv, a .zip of either, "
    "or a .csv or .jsonl of paths; on this machine or at an address such as s3://BUCKET/KEY"
)
WINDOWS = 0
"""Code of Windows and DOS programs as the creator of a zip entry."""


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


@dataclass(frozen=True)
class Tree:
    """All files below a root, without hidden ones and those of `SYSTEM_FOLDERS`.

    Attributes:
        files: name -> file.
        folders: the folders that are known to exist.
        bad: entries of a zip that are not used, with the reason: a second one of its name, or one with .. in it.
        no_files: names of what holds no bytes that could be read: links that lead nowhere, pipes, sockets and devices.
    """

    files: dict[str, File]
    folders: frozenset[str]
    bad: tuple[tuple[str, str], ...] = ()
    no_files: tuple[str, ...] = ()


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
    path, single = local_path(uri), uri.lower().endswith((".zip", ".csv", ".jsonl"))
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise _closed(error) from error
        raise NoSourceError(f"{shown(uri)} {'does not exist' if single else 'is not a folder'}; {KINDS}") from error
    if not (stat.S_ISDIR(mode) or (single and stat.S_ISREG(mode))):
        raise NoSourceError(f"{shown(uri)} is not a {'file' if single else 'folder'}; {KINDS}")


def shown(uri: str) -> str:
    """Return an address as messages show it: as a plain path where it is local."""
    return uri.removeprefix("file://")


def text(name: str) -> str:
    """Return a name as text that can be written and shown everywhere, whose bytes may not be UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def open_tree(uri: str, storage: Storage) -> Tree:
    """List the files of a folder, a zip or a folder in a store.

    Raises:
        DatasetError: there is nothing, or it is neither a folder nor a zip.
    """
    check_there(uri)
    if uri.lower().endswith(".zip") and not (is_local(uri) and local_path(uri).is_dir()):
        return _zip_tree(uri, storage)
    if is_local(uri):
        return _local_tree(local_path(uri))
    entries = storage.list(uri)
    if not entries:
        raise DatasetError(f"nothing is stored under {uri}/; {KINDS}")
    names = {entry.uri[len(uri) + 1 :]: entry for entry in entries}
    # S3 consoles mark an empty folder by an object whose name ends with a slash.
    files = (File(n, f"{e.size} {e.tag}", StoredFile(e.uri)) for n, e in names.items() if n and not n.endswith("/"))
    return _tree(files, [name.rstrip("/") for name in names if name.endswith("/")])


def find_files(base: str, paths: Iterable[str], storage: Storage) -> dict[str, File]:
    """Return the files that exist of `paths`, which are relative to the folder `base`, absolute, or addresses.

    An address outside `base` is not checked: where there is no such file, reading it fails.

    Raises:
        DatasetError: a local file cannot be looked at.
    """
    resolved = {path: _resolve(base, path) for path in paths}
    below = [uri for uri in resolved.values() if not is_local(uri) and uri.startswith(base + "/")]
    listed = {entry.uri: entry for entry in _list_common(base, below, storage)}
    found = {}
    for path, uri in resolved.items():
        if is_local(uri):
            if stamp := _stamp(local_path(uri)):
                found[path] = File(path, stamp, StoredFile(uri))
        elif uri in listed:
            found[path] = File(path, f"{listed[uri].size} {listed[uri].tag}", StoredFile(uri))
        elif not uri.startswith(base + "/"):
            found[path] = File(path, "", StoredFile(uri))
    return found


def read_table(uri: str, storage: Storage) -> bytes:
    """Return the bytes of a table that is the whole source.

    Raises:
        DatasetError: there is no such table.
    """
    check_there(uri)
    data = storage.find(uri)
    if data is None:
        raise DatasetError(f"{shown(uri)} does not exist; {KINDS}")
    return data


def _size(uri: str, storage: Storage) -> int:
    """Return the size of one object, from the listing of its folder on S3."""
    if is_local(uri):
        return local_path(uri).stat().st_size
    listed = storage.list(uri.rpartition("/")[0])
    size = next((entry.size for entry in listed if entry.uri == uri), None)
    if size is None:
        raise DatasetError(f"{shown(uri)} does not exist; {KINDS}")
    return size


def _tree(
    files: Iterable[File],
    folders: Iterable[str] = (),
    bad: tuple[tuple[str, str], ...] = (),
    no_files: Iterable[str] = (),
) -> Tree:
    """Return a tree of files and folders without hidden ones."""
    kept = {file.name: file for file in files if not _hidden(file.name)}
    above = {str(parent) for name in kept for parent in PurePosixPath(name).parents}
    known = frozenset(above | {folder for folder in folders if not _hidden(folder)}) - {"."}
    return Tree(kept, known, bad, tuple(name for name in no_files if not _hidden(name)))


def _hidden(name: str) -> bool:
    """Return whether a file or one of its folders is hidden, or of a system's own."""
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in name.split("/"))


def _stamp(path: Path) -> str | None:
    """Return the stamp of a local file; None where there is none, such as for a link that leads nowhere.

    Raises:
        DatasetError: it cannot be looked at, such as where its folder does not let this user.
    """
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise _closed(error) from error
    except ValueError:  # a null byte in the path
        return None
    return f"{status.st_size} {status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else None


_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def _closed(error: OSError) -> DatasetError:
    """Return the error for a folder or file that the system keeps from this user."""
    return DatasetError(
        f"{text(str(error.filename))} cannot be read ({error.strerror}), so images would be missing without a word: "
        "let this user read it and the folders above it, such as by chmod u+rX, or take it out of the source"
    )


def _local_tree(root: Path) -> Tree:
    """List the files of a local folder; links to folders are followed, unless they lead back to where they are.

    Raises:
        DatasetError: a folder cannot be listed, or its files not be looked at.
    """

    def refuse(error: OSError) -> NoReturn:
        raise _closed(error) from error

    files, folders, no_files = [], [], []
    ways: dict[str, tuple[str, ...]] = {str(root): (os.path.realpath(root),)}
    for here, below, names in os.walk(root, onerror=refuse, followlinks=True):
        relative = text(Path(here).relative_to(root).as_posix())
        prefix = "" if relative == "." else f"{relative}/"
        way = ways.pop(here)
        onward = {name: _way_to(name, here, way) for name in below if not _hidden(name)}
        ways |= {os.path.join(here, name): there for name, there in onward.items() if there is not None}
        below[:] = [name for name, there in onward.items() if there is not None]
        folders += [prefix + text(name) for name in below]
        for name in names:
            path = Path(here, name)
            if stamp := _stamp(path):
                files.append(File(prefix + text(name), stamp, StoredFile(f"file://{path}")))
            else:
                no_files.append(prefix + text(name))
    return _tree(files, folders, no_files=no_files)


def _way_to(name: str, here: str, way: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the way to a folder in another one; None for a link to a folder of the way or above, which has no end.

    Args:
        name: of the folder.
        here: path of the other one.
        way: to the other one: its real path, behind those of the folders whose links lead there.
    """
    path = os.path.join(here, name)
    if not os.path.islink(path):
        return (*way[:-1], os.path.join(way[-1], name))
    target = os.path.realpath(path)
    above = target.rstrip("/") + "/"
    return None if any(f"{real}/".startswith(above) for real in way) else (*way, target)


def _zip_tree(uri: str, storage: Storage) -> Tree:
    raw = _Ranged(uri, _size(uri, storage), storage)
    try:
        with zipfile.ZipFile(io.BufferedReader(raw, buffer_size=1 << 20)) as archive:
            listed = archive.infolist()
    except zipfile.BadZipFile as error:
        raise DatasetError(f"{shown(uri)} is not a readable zip ({error}): make it again, or copy it whole") from error
    entries, bad = [], []
    for entry in listed:  # as whatever unpacks a zip takes it; some programs of Windows write backslashes
        named = entry.filename.replace("\\", "/") if entry.create_system == WINDOWS else entry.filename
        entry.filename = named.lstrip("/")
        if ".." in named.split("/"):
            bad.append((named, "has .. in its name, by which entries leave the folder of a zip"))
        elif entry.filename:
            entries.append(entry)
    top = _top_folder([entry.filename for entry in entries if not _hidden(entry.filename)])
    files: dict[str, File] = {}
    folders = []
    for entry in entries:
        name = entry.filename.removeprefix(top)
        if entry.is_dir():
            folders.append(name.rstrip("/"))
        elif name in files:
            bad.append((name, "a second entry of this name in the zip"))
        else:
            member = ZipMember(
                uri,
                entry.header_offset,
                entry.compress_size,
                entry.file_size,
                entry.compress_type,
                entry.CRC,
                bool(entry.flag_bits & 1),
            )
            files[name] = File(name, f"{entry.file_size} {entry.CRC:08x}", member)
    return _tree(files.values(), [f for f in folders if f], tuple(bad))


def _top_folder(names: list[str]) -> str:
    """Return `photos/` for a zip whose files are all below photos/CLASS/ or beside photos/metadata.jsonl, else ""."""
    tops = {name.partition("/")[0] for name in names}
    if len(tops) != 1 or not all("/" in name for name in names):
        return ""
    top = tops.pop() + "/"
    below = [name.removeprefix(top) for name in names if name != top]
    described = any(name in ("metadata.jsonl", "metadata.csv") for name in below)
    return top if described or any("/" in name for name in below) else ""


class _Ranged(io.RawIOBase):
    """A stored object as a seekable file, read by ranged reads."""

    def __init__(self, uri: str, size: int, storage: Storage) -> None:
        self.uri, self.size, self.storage, self.position = uri, size, storage, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        stop = min(self.position + len(buffer), self.size)
        data = self.storage.read(self.uri, self.position, stop) if stop > self.position else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _resolve(base: str, path: str) -> str:
    """Return the address of a path that is relative to a folder, absolute, or an address."""
    if "://" in path:
        return path
    if path.startswith("/"):
        return f"file://{path}"
    if is_local(base):
        return f"file://{os.path.normpath(local_path(base) / path)}"
    scheme, rest = split_scheme(join(base, path))
    return scheme + os.path.normpath(rest)  # normpath would remove a slash of the scheme


def _list_common(base: str, uris: list[str], storage: Storage) -> list[Entry]:
    if not uris:
        return []
    scheme = split_scheme(base)[0]
    folders = [uri.removeprefix(scheme).rpartition("/")[0] for uri in uris]
    return storage.list(scheme + os.path.commonpath(folders))
