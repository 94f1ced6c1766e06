"""A storage backend for every filesystem of fsspec: Google Cloud Storage, Azure, SFTP, and others that are installed.

Install the filesystem's package beside this one (`pip install gcsfs` for gs://, `adlfs` for abfs://, `paramiko` for
sftp://). Credentials and other settings are fsspec's own: the environment of the store, or the files in
`FSSPEC_CONFIG_DIR`; this module adds none.

An object store shows an object only when it is complete, so storing replaces the old one in one step. On a file system
the bytes are written to a temporary file and renamed, which is as atomic as the rename: `local` and `sftp` replace in
one step; if a file system refuses to rename over a file (`smb`, `hdfs`, some `ftp` servers), the old file is removed
first, and a kill in between leaves none.

fsspec has no conditional writes, so they are a comparison followed by a write: of two writers at the same instant the
last one wins. A replaced driver is therefore stopped at its next write, but one of its writes may still arrive.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from pipelines.storage.backend import STREAMED, Connection, Entry
from pipelines.storage.errors import (
    ConflictError,
    NotFoundError,
    StorageError,
    TransientStorageError,
    not_found,
    os_errors_as_storage_errors,
)

OBJECT_STORES = ("gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "tos")
FILE_SYSTEMS = ("local", "sftp", "ssh", "smb", "hdfs", "webhdfs", "ftp", "webdav", "dbfs")
PROTOCOLS = (*OBJECT_STORES, *FILE_SYSTEMS)
STREAM_BYTES = 8 << 20
"""Bytes per request while streaming."""
_ENVIRONMENT = (
    "FSSPEC_CONFIG_DIR",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_CLOUD_PROJECT",
    "STORAGE_EMULATOR_HOST",
    "AZURE_STORAGE_ACCOUNT_NAME",
)
"""Paths, endpoints and names that other processes need too; no secrets."""
_TAGS = ("etag", "ETag", "md5Hash", "content_md5", "checksum", "mtime", "last_modified", "LastModified", "updated")
_BROKEN = (
    "ConnectionError",
    "ProxyError",
    "ConnectTimeout",
    "ReadTimeout",
    "ChunkedEncodingError",
    "NoValidConnectionsError",
)
"""Names of the errors of `requests` and (last) `paramiko`, used by some filesystems, for lost or failed connections."""
_TIMES = ("mtime", "last_modified", "LastModified", "updated", "modified")


class FsspecBackend:
    """Objects and files through fsspec, which is imported on first use and keeps its own connections."""

    form: ClassVar[str] = "another URL that fsspec opens (gs://BUCKET/KEY, abfs://…, sftp://…)"

    def __init__(self, connection: Connection) -> None:
        pass

    @staticmethod
    def is_address(uri: str) -> bool:
        """Return whether anything follows the scheme."""
        return not uri.endswith("://")

    @staticmethod
    def environment(connection: Connection) -> dict[str, str]:
        """Return the environment variables with settings of the filesystems, as far as they are set here."""
        return {name: os.environ[name] for name in _ENVIRONMENT if os.environ.get(name)}

    def read(self, uri: str, start: int, stop: int | None) -> bytes:
        """Return the bytes [start, stop) of an object."""
        with _opened(uri) as (fs, path):
            data: bytes = fs.cat_file(path, start=start or None, end=stop)
            return data

    def stream(self, uri: str, start: int, stop: int, chunk: int) -> Iterator[bytes]:
        """Yield the bytes [start, stop) of an object, which are fetched some MiB at a time."""
        for begin in range(start, stop, STREAM_BYTES):
            end = min(begin + STREAM_BYTES, stop)
            data = self.read(uri, begin, end)
            for at in range(0, len(data), chunk):
                yield data[at : at + chunk]
            if len(data) < end - begin:
                return

    def write(self, uri: str, data: bytes) -> None:
        """Store an object."""
        with _as_storage_errors(uri):
            _replace(uri, lambda fs, path: fs.pipe_file(path, data))

    def read_tagged(self, uri: str) -> tuple[bytes, str]:
        """Return the bytes of an object and their digest."""
        data = self.read(uri, 0, None)
        return data, hashlib.sha256(data).hexdigest()

    def write_if(self, uri: str, data: bytes, tag: str | None) -> str:
        """Compare, then store: two steps, because fsspec has no conditional write."""
        try:
            there: str | None = self.read_tagged(uri)[1]
        except NotFoundError:
            there = None
        if there != tag:
            raise ConflictError(f"{uri}: another writer was faster")
        self.write(uri, data)
        return hashlib.sha256(data).hexdigest()

    def upload_stream(self, stream: BinaryIO, uri: str) -> None:
        """Store what a stream gives."""

        def write(fs: Any, target: str) -> None:
            with fs.open(target, "wb") as file:
                shutil.copyfileobj(stream, file, STREAMED)

        with _as_storage_errors(uri):
            _replace(uri, write)

    def upload(self, path: Path, uri: str) -> None:
        """Store a file."""
        with _as_storage_errors(uri):
            _replace(uri, lambda fs, target: fs.put_file(str(path), target))

    def download(self, uri: str, path: Path) -> None:
        """Copy an object into a file."""
        with _opened(uri) as (fs, source):
            fs.get_file(source, str(path))

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store where it can, else through this machine."""
        with _opened(source) as (fs, path):
            if fs is _open(target)[0]:
                with suppress(NotImplementedError):
                    _replace(target, lambda fs, place: fs.cp_file(path, place))
                    return
            data = fs.cat_file(path)
            _replace(target, lambda fs, place: fs.pipe_file(place, data))

    def exists(self, uri: str) -> bool:
        """Return whether an object exists; folders do not count."""
        with _opened(uri) as (fs, path):
            try:
                return bool(fs.info(path)["type"] == "file")
            except FileNotFoundError:
                return False

    def page(self, uri: str, after: str | None) -> tuple[list[Entry], str | None]:
        """Return every object below a folder."""
        folder = uri.rstrip("/")
        with _as_storage_errors(uri):
            fs, path = _open(folder)
            # A walk over folders would silently leave out unreadable ones.
            strict = {} if _scheme(uri) in OBJECT_STORES else {"on_error": "raise"}
            try:
                found = fs.find(path, detail=True, **strict)
            except FileNotFoundError as error:
                if fs.exists(path):
                    raise TransientStorageError(f"{uri} has changed while it was listed") from error
                return [], None
            below = {name[len(path) + 1 :]: info for name, info in found.items() if name.startswith(path + "/")}
            entries = (Entry(f"{folder}/{n}", int(i["size"]), _tag(i), _modified(i)) for n, i in below.items())
            return list(entries), None

    def delete(self, uri: str) -> None:
        """Remove an object."""
        with _opened(uri) as (fs, path), suppress(FileNotFoundError):
            fs.rm_file(path)

    def remove_empty_folders(self, uri: str) -> None:
        """Remove a file system's empty folders."""
        if _scheme(uri) in OBJECT_STORES:
            return
        with _opened(uri) as (fs, path), suppress(FileNotFoundError):
            for folder, _, _ in list(fs.walk(path, topdown=False)):
                if not fs.ls(folder, detail=False):
                    fs.rmdir(folder)


def _scheme(uri: str) -> str:
    return uri.partition("://")[0]


def _open(uri: str) -> tuple[Any, str]:
    """Return (filesystem, path) of an address; fsspec keeps one filesystem per thread.

    Its cached listings are dropped: other processes write to the same place.
    """
    import fsspec

    fs, path = fsspec.core.url_to_fs(uri)
    fs.invalidate_cache()
    return fs, path


def _tag(info: Mapping[str, Any]) -> str:
    """Return the property of an object that changes when its bytes do."""
    return next((str(info[name]) for name in _TAGS if info.get(name) is not None), "")


def _modified(info: Mapping[str, Any]) -> float | None:
    """Return the time of the last write of an object in seconds since the epoch; None if the filesystem does not say.

    Filesystems give it as a number, a datetime or an ISO 8601 text.
    """
    for name in _TIMES:
        said = info.get(name)
        if isinstance(said, str):
            with suppress(ValueError):
                said = datetime.fromisoformat(said)
        if isinstance(said, datetime):
            return (said if said.tzinfo else said.replace(tzinfo=UTC)).timestamp()
        if isinstance(said, int | float):
            return float(said)
    return None


def _replace(uri: str, write: Callable[[Any, str], object]) -> None:
    """Write an object in one step, creating its parent folders if the store has folders."""
    fs, path = _open(uri)
    if _scheme(uri) in OBJECT_STORES:
        write(fs, path)
        return
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}"
    fs.makedirs(folder, exist_ok=True)
    try:
        write(fs, temporary)
        try:
            fs.mv(temporary, path)
        except FileExistsError:
            fs.rm_file(path)
            fs.mv(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            fs.rm_file(temporary)


@contextmanager
def _opened(uri: str) -> Iterator[tuple[Any, str]]:
    """Yield the file system and the path of an address; turn their errors into a `StorageError` with the fix."""
    with _as_storage_errors(uri):
        yield _open(uri)


@contextmanager
def _as_storage_errors(uri: str) -> Iterator[None]:
    with os_errors_as_storage_errors(uri):
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            if not _is_lost(error):
                raise
            raise _connect_anew(uri, error) from error
        except ImportError as error:
            raise StorageError(f"{uri}: {error}") from error
        except (ValueError, TypeError, NotImplementedError) as error:
            raise StorageError(_said(uri, error)) from error
        except Exception as error:
            raise _answered(uri, error) from error


def _answered(uri: str, error: Exception) -> StorageError:
    """Return the error for an exception of a store's library, by its HTTP status if it has one."""
    status = next((s for n in ("status_code", "status", "code") if isinstance(s := getattr(error, n, None), int)), None)
    if status == 404:
        return not_found(uri)
    refused = status is not None and 400 <= status < 500 and status not in (408, 429)
    # paramiko's errors for a wrong password and for a key without its password are Authentication... by name or base.
    if refused or any("Authentication" in kind.__name__ for kind in type(error).__mro__):
        return StorageError(_said(uri, error))
    return _connect_anew(uri, error) if status is None else TransientStorageError(_said(uri, error))


def _is_lost(error: OSError) -> bool:
    """Return whether an error of a library, without a number, says that a connection broke."""
    return error.errno is None and (
        type(error).__name__ in _BROKEN or (type(error) is OSError and "is closed" in str(error))
    )


def _connect_anew(uri: str, error: Exception) -> TransientStorageError:
    """Return the error for a broken connection, and drop the cached filesystems that may hold it."""
    import fsspec

    with suppress(ImportError, ValueError):
        fsspec.get_filesystem_class(_scheme(uri)).clear_instance_cache()
    return TransientStorageError(_said(uri, error))


def _said(uri: str, error: Exception) -> str:
    """Return the name and message of a library's error."""
    return f"{uri}: {type(error).__name__}: {error}"
