"""A storage folder as a pyarrow filesystem, in which Ray Train keeps its list of checkpoints.

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

from pipelines.storage.errors import NotFoundError
from pipelines.storage.fence import Fence
from pipelines.storage.store import Storage, split_scheme


@dataclass(frozen=True)
class StorageHandler(FileSystemHandler):
    """The operations of a pyarrow filesystem, on a `Storage`. Paths are addresses without their scheme.

    Attributes:
        scheme: of the addresses, with its separator: "s3://", "file://", ….
        fence: asked before every write and deletion.
    """

    storage: Storage
    scheme: str
    fence: Fence | None = None

    def get_type_name(self) -> str:
        """Return a name for messages."""
        return f"ddpm+{self.scheme}"

    def normalize_path(self, path: str) -> str:
        """Return the path unchanged: addresses have one form."""
        return path

    def get_file_info(self, paths: Sequence[str]) -> list[FileInfo]:
        """Return the type of each path; a folder is a path below which something is stored."""
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        """Return what is stored below a folder."""
        base = selector.base_dir.rstrip("/")
        infos: dict[str, FileInfo] = {}
        for entry in self.storage.list(self._uri(base)):
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
        """Do nothing: a folder exists where files do."""

    def delete_dir(self, path: str) -> None:
        """Remove every file below a folder."""
        self._check()
        self.storage.delete_folder(self._uri(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Remove every file below a folder, and so the folder: an empty one does not exist."""
        self.delete_dir(path)

    def delete_root_dir_contents(self) -> None:
        """Refuse."""
        raise NotImplementedError("the whole storage is not deleted")

    def delete_file(self, path: str) -> None:
        """Remove a file."""
        self._check()
        self.storage.delete(self._uri(path))

    def move(self, src: str, dest: str) -> None:
        """Refuse: object stores cannot move."""
        raise NotImplementedError("moving")

    def copy_file(self, src: str, dest: str) -> None:
        """Store a file anew under another path."""
        self._check()
        self.storage.copy(self._uri(src), self._uri(dest))

    def open_input_stream(self, path: str) -> Any:
        """Return a reader of the whole file, held in memory."""
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> Any:
        """Return a reader of the whole file, held in memory."""
        try:
            return pyarrow.BufferReader(self.storage.read(self._uri(path)))
        except NotFoundError as error:
            raise FileNotFoundError(path) from error

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """Return a writer whose bytes are stored in one step when it is closed."""
        return pyarrow.PythonFile(_Pending(self, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        """Refuse: object stores cannot append."""
        raise NotImplementedError("appending")

    def _uri(self, path: str) -> str:
        return self.scheme + path

    def _check(self) -> None:
        if self.fence:
            self.fence.check()

    def _info(self, path: str) -> FileInfo:
        uri = self._uri(path.rstrip("/"))
        if self.storage.exists(uri):
            return FileInfo(path, FileType.File)
        if self.storage.list(uri):
            return FileInfo(path, FileType.Directory)
        return FileInfo(path, FileType.NotFound)

    def _write(self, path: str, data: bytes) -> None:
        self._check()
        self.storage.write(self._uri(path), data)


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
    """Return (filesystem, path) of a folder address; the filesystem pickles with its settings, which hold no secret."""
    scheme, path = split_scheme(uri)
    return PyFileSystem(StorageHandler(storage, scheme, fence)), path.rstrip("/")
