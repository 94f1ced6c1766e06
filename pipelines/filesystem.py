"""A storage folder as a pyarrow filesystem, which is what Ray Train keeps its list of checkpoints in.

pyarrow's own S3 filesystem gives up on a store that is away for a minute, loses its retry settings when pickled, and
its local one leaves half a file where a process is killed: any of them ends a run or its resume list. Here every
operation goes through `Storage`: patient, and atomic.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, PyFileSystem

from pipelines.storage import NotFoundError, Storage, StorageError, is_local, local_path, patiently, split_s3


class FencedError(StorageError):
    """Another driver has taken over this run: what is left of the earlier one must not write any more."""


@dataclass(frozen=True)
class Fence:
    """Who may write to a run: whoever's token is at the address.

    Attributes:
        uri: where the token of the newest driver is.
        token: of the driver that this process belongs to.
    """

    storage: Storage
    uri: str
    token: str

    def take(self) -> None:
        """Make this token the one that counts."""
        self.storage.write(self.uri, self.token.encode())

    def check(self) -> None:
        """Refuse to go on for a driver that has been replaced.

        Raises:
            FencedError: another token is at the address.
        """
        found = patiently(lambda: self.storage.read(self.uri)).decode()
        if found != self.token:
            raise FencedError(f"{self.uri}: another driver has taken over this run; nothing more is written here")


@dataclass(frozen=True)
class StorageHandler(FileSystemHandler):
    """What pyarrow asks of a filesystem, answered by a `Storage`. Paths are addresses without their scheme.

    Attributes:
        scheme: "s3://" or "file://".
        fence: asked before every write and deletion.
    """

    storage: Storage
    scheme: str
    fence: Fence | None = None

    def get_type_name(self) -> str:
        """A name for messages."""
        return f"ddpm+{self.scheme}"

    def normalize_path(self, path: str) -> str:
        """As it is."""
        return path

    def get_file_info(self, paths: Sequence[str]) -> list[FileInfo]:
        """Type and size of each path; a folder is what something lies below."""
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        """What lies below a folder."""
        base = selector.base_dir.rstrip("/")
        infos: dict[str, FileInfo] = {}
        for entry in patiently(lambda: self.storage.list(self._uri(base))):
            path = entry.uri.removeprefix(self.scheme)
            parts = path[len(base) + 1 :].split("/")
            for depth in range(1, len(parts)):
                folder = "/".join([base, *parts[:depth]])
                if depth == 1 or selector.recursive:
                    infos[folder] = FileInfo(folder, FileType.Directory)
            if len(parts) == 1 or selector.recursive:
                infos[path] = FileInfo(path, FileType.File, size=entry.size)
        if not infos and not selector.allow_not_found:
            raise FileNotFoundError(base)
        return list(infos.values())

    def create_dir(self, path: str, recursive: bool) -> None:
        """Folders are not stored: they are where files are."""

    def delete_dir(self, path: str) -> None:
        """Remove every file below a folder."""
        self._check()
        for entry in patiently(lambda: self.storage.list(self._uri(path))):
            self._delete(entry.uri)
        if is_local(self._uri(path)):
            _remove_empty(self._uri(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """The same: an empty folder is none."""
        self.delete_dir(path)

    def delete_root_dir_contents(self) -> None:
        """Never."""
        raise NotImplementedError("the whole storage is not deleted")

    def delete_file(self, path: str) -> None:
        """Remove a file."""
        self._check()
        self._delete(self._uri(path))

    def move(self, src: str, dest: str) -> None:
        """Not in object stores."""
        raise NotImplementedError("moving")

    def copy_file(self, src: str, dest: str) -> None:
        """Read and write."""
        self._write(dest, patiently(lambda: self.storage.read(self._uri(src))))

    def open_input_stream(self, path: str) -> Any:
        """The whole file."""
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> Any:
        """The whole file."""
        try:
            return pyarrow.BufferReader(patiently(lambda: self.storage.read(self._uri(path))))
        except NotFoundError as error:
            raise FileNotFoundError(path) from error

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """Stored in one step when it is closed."""
        return pyarrow.PythonFile(_Pending(self, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        """Not in object stores."""
        raise NotImplementedError("appending")

    def _uri(self, path: str) -> str:
        return self.scheme + path

    def _check(self) -> None:
        if self.fence:
            self.fence.check()

    def _info(self, path: str) -> FileInfo:
        uri = self._uri(path.rstrip("/"))
        if patiently(lambda: self.storage.exists(uri)):
            return FileInfo(path, FileType.File)
        if patiently(lambda: self.storage.list(uri)):
            return FileInfo(path, FileType.Directory)
        return FileInfo(path, FileType.NotFound)

    def _write(self, path: str, data: bytes) -> None:
        self._check()
        patiently(lambda: self.storage.write(self._uri(path), data))

    def _delete(self, uri: str) -> None:
        patiently(lambda: self.storage.delete(uri))


class _Pending(io.BytesIO):
    """Bytes that are stored when the stream is closed, once."""

    def __init__(self, handler: StorageHandler, path: str) -> None:
        super().__init__()
        self.handler, self.path = handler, path

    def close(self) -> None:
        if not self.closed:
            self.handler._write(self.path, self.getvalue())
            super().close()


def open_filesystem(storage: Storage, uri: str, fence: Fence | None = None) -> tuple[PyFileSystem, str]:
    """(filesystem, path) of a folder address; the filesystem pickles with all its settings, which hold no secret."""
    if is_local(uri):
        return PyFileSystem(StorageHandler(storage, "file://", fence)), str(local_path(uri))
    bucket, key = split_s3(uri)
    return PyFileSystem(StorageHandler(storage, "s3://", fence)), f"{bucket}/{key}"


def _remove_empty(uri: str) -> None:
    """Remove a local folder's empty folders, itself last."""
    folder = local_path(uri)
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
