"""A storage backend for files of this machine, or of a disk that all nodes share: `file:///PATH`."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, ClassVar

from pipelines.storage.backend import STREAMED, Connection, Entry
from pipelines.storage.errors import ConflictError, TransientStorageError, os_errors_as_storage_errors

LOCK = ".lock"
SYSTEM_FOLDERS = frozenset({"__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", "@eaDir"})
"""Folders that systems put among the user's files: in zips, on disks, and thumbnails on network drives."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LocalBackend:
    """Folders through pathlib; every file is written to a temporary file and renamed.

    A conditional write compares and renames under a lock on `.NAME.lock` beside the file; the lock file is kept. The
    kernel releases the lock of a process that dies; on a shared disk, flock has to work between nodes.
    """

    form: ClassVar[str] = "file:///PATH"

    def __init__(self, connection: Connection) -> None:
        pass

    @staticmethod
    def is_address(uri: str) -> bool:
        """Return whether the path is absolute."""
        return uri.startswith("file:///")

    @staticmethod
    def environment(connection: Connection) -> dict[str, str]:
        """Return nothing: another process needs only the path."""
        return {}

    def read(self, uri: str, start: int, stop: int | None) -> bytes:
        """Return the bytes [start, stop) of a file."""
        with os_errors_as_storage_errors(uri), open(local_path(uri), "rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else stop - start)

    def stream(self, uri: str, start: int, stop: int, chunk: int) -> Iterator[bytes]:
        """Yield the bytes [start, stop) of a file."""
        with os_errors_as_storage_errors(uri), open(local_path(uri), "rb") as file:
            file.seek(start)
            while part := file.read(min(chunk, stop - file.tell())):
                yield part

    def write(self, uri: str, data: bytes) -> None:
        """Replace a file by one with these bytes."""
        with os_errors_as_storage_errors(uri):
            _replace(local_path(uri), lambda temporary: temporary.write_bytes(data))

    def read_tagged(self, uri: str) -> tuple[bytes, str]:
        """Return the bytes of a file and their digest."""
        data = self.read(uri, 0, None)
        return data, _digest(data)

    def write_if(self, uri: str, data: bytes, tag: str | None) -> str:
        """Replace a file whose digest is the tag, or make one where there is none."""
        path = local_path(uri)
        with os_errors_as_storage_errors(uri):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_name(f".{path.name}{LOCK}").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise TransientStorageError(f"{uri}: another process is writing it") from error
                there = _digest(path.read_bytes()) if path.exists() else None
                if there != tag:
                    raise ConflictError(f"{uri}: another writer was faster")
                _replace(path, lambda temporary: temporary.write_bytes(data))
        return _digest(data)

    def upload_stream(self, stream: BinaryIO, uri: str) -> None:
        """Replace a file by what a stream gives."""

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                shutil.copyfileobj(stream, file, STREAMED)

        with os_errors_as_storage_errors(uri):
            _replace(local_path(uri), write)

    def upload(self, path: Path, uri: str) -> None:
        """Replace a file by a copy of another."""
        with os_errors_as_storage_errors(uri):
            _replace(local_path(uri), lambda temporary: shutil.copyfile(path, temporary))

    def download(self, uri: str, path: Path) -> None:
        """Copy a file."""
        with os_errors_as_storage_errors(uri):
            shutil.copyfile(local_path(uri), path)

    def copy(self, source: str, target: str) -> None:
        """Replace a file by a copy of another."""
        self.upload(local_path(source), target)

    def exists(self, uri: str) -> bool:
        """Return whether a file is there; a folder is none."""
        with os_errors_as_storage_errors(uri):
            return local_path(uri).is_file()

    def page(self, uri: str, after: str | None) -> tuple[list[Entry], str | None]:
        """Return every file below a folder, without locks of conditional writes and what is in `SYSTEM_FOLDERS`."""
        entries = []
        with os_errors_as_storage_errors(uri):
            for here, below, names in os.walk(local_path(uri), onerror=_unless_gone):
                # They may be unreadable for this user.
                below[:] = [name for name in below if name not in SYSTEM_FOLDERS]
                for path in (Path(here, name) for name in names):
                    with suppress(FileNotFoundError):  # removed meanwhile, or a broken link
                        status = path.stat()
                        if stat.S_ISREG(status.st_mode) and not _is_lock(path):
                            tag = str(status.st_mtime_ns)
                            entries.append(Entry(f"file://{path}", status.st_size, tag, status.st_mtime))
        return entries, None

    def delete(self, uri: str) -> None:
        """Remove a file."""
        with os_errors_as_storage_errors(uri):
            local_path(uri).unlink(missing_ok=True)

    def remove_empty_folders(self, uri: str) -> None:
        """Remove the empty folders and locks of a folder, then the folder."""
        folder = local_path(uri)
        with os_errors_as_storage_errors(uri):
            for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
                if _is_lock(path):
                    path.unlink(missing_ok=True)
                elif path.is_dir() and not any(path.iterdir()):
                    path.rmdir()


def local_path(uri: str) -> Path:
    """Return the path of a file:/// address."""
    return Path(uri.removeprefix("file://"))


def _unless_gone(error: OSError) -> None:
    """Raise the error of a folder that cannot be listed, unless the folder is gone: no file may be left out
    silently."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_lock(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(LOCK)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file and rename it to `path`, replacing what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
