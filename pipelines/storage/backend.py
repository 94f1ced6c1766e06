"""The protocol of a storage backend, implemented for S3, local files and fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, ClassVar, Protocol

STREAMED = 2**20
"""Bytes of a stream that are read and written at once."""


@dataclass(frozen=True)
class Entry:
    """One stored object.

    Attributes:
        uri: address of the object.
        size: size in bytes.
        tag: changes whenever the bytes do: the store's ETag, or a file's modification time in nanoseconds. Storing the
        same bytes again may change it.
        modified: time of storing, in seconds since the epoch by the store's clock; None if unknown.
    """

    uri: str
    size: int
    tag: str
    modified: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Connection:
    """Settings of the connection to a store; None means AWS's default rules (environment, profile, role).

    Attributes:
        endpoint_url: endpoint of an S3 server other than AWS.
        credentials_file: path of an AWS shared credentials file.
        region: signing region.
    """

    endpoint_url: str | None = None
    credentials_file: str | None = None
    region: str | None = None


class Backend(Protocol):
    """One kind of store, created once per process and connection; its methods are thread-safe.

    Every method makes a single try; `Storage` repeats it. They raise `NotFoundError` if nothing is stored,
    `TransientStorageError` if another try may help, and `StorageError` with the fix for everything else. Stored bytes
    replace the old ones in one step: a reader sees the old or the new ones, and a kill leaves the old ones.

    Attributes:
        form: form of its addresses, for messages; "/KEY" is the part after the container's name.
    """

    form: ClassVar[str]

    def __init__(self, connection: Connection) -> None:
        """Connect lazily: nothing is imported and no server is contacted before the first call."""

    @staticmethod
    def is_address(uri: str) -> bool:
        """Return whether an address of this backend's scheme is complete."""

    @staticmethod
    def environment(connection: Connection) -> dict[str, str]:
        """Return the environment variables that another process needs for the same store: paths and endpoints, no
        secrets."""

    def read(self, uri: str, start: int, stop: int | None) -> bytes:
        """Return the bytes [start, stop) of an object, up to its end where stop is None."""

    def stream(self, uri: str, start: int, stop: int, chunk: int) -> Iterator[bytes]:
        """Yield the bytes [start, stop) as they arrive, at most `chunk` at a time; fewer if the object ends before."""

    def write(self, uri: str, data: bytes) -> None:
        """Store bytes."""

    def read_tagged(self, uri: str) -> tuple[bytes, str]:
        """Return the bytes of an object and their tag."""

    def write_if(self, uri: str, data: bytes, tag: str | None) -> str:
        """Store bytes if the stored ones have this tag, or if nothing is stored and the tag is None; return the new
        tag.

        Exactly one of several writers succeeds.

        Raises:
            ConflictError: something else is stored.
        """

    def upload_stream(self, stream: BinaryIO, uri: str) -> None:
        """Store what a stream gives until its end, without holding all of it in memory."""

    def upload(self, path: Path, uri: str) -> None:
        """Store a file."""

    def download(self, uri: str, path: Path) -> None:
        """Copy an object into a file."""

    def copy(self, source: str, target: str) -> None:
        """Copy an object to another address of this backend."""

    def exists(self, uri: str) -> bool:
        """Return whether an object is at the address."""

    def page(self, uri: str, after: str | None) -> tuple[list[Entry], str | None]:
        """Return some objects under a folder address, in any order, and the token of the next page; None after the
        last.

        Args:
            after: token that the page before returned; None for the first page.
        """

    def delete(self, uri: str) -> None:
        """Remove an object, if there is one."""

    def remove_empty_folders(self, uri: str) -> None:
        """Remove the empty folders at an address, and the folder itself; do nothing if the store has no folders."""
