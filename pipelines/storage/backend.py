"""What a store must be able to do: the protocol that S3, local files and every further backend implement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol


@dataclass(frozen=True)
class Entry:
    """One stored object.

    Attributes:
        uri: its address.
        size: in bytes.
        tag: changes when the bytes do: the store's ETag, or a file's modification time in nanoseconds. The same bytes
            stored again may have another.
        modified: when it was stored, in seconds since the epoch by the store's clock; None where it does not say.
    """

    uri: str
    size: int
    tag: str
    modified: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Connection:
    """How the store is reached; None leaves a choice to AWS's own rules (environment, profile, role).

    Attributes:
        endpoint_url: of an S3 that is not AWS.
        credentials_file: path of an AWS shared credentials file.
        region: signing region.
    """

    endpoint_url: str | None = None
    credentials_file: str | None = None
    region: str | None = None


class Backend(Protocol):
    """One kind of store, made once per process and connection; its methods are called from any thread.

    Every method makes a single try; `Storage` repeats it. They raise `NotFoundError` where nothing is stored,
    `TransientStorageError` where another try may help, and `StorageError` with the fix for everything else. Bytes that
    are stored replace what was there in one step: a reader sees the old ones or the new ones, a kill leaves the old.

    Attributes:
        form: what its addresses look like, for messages; "/KEY" stands for what follows the container's name.
    """

    form: ClassVar[str]

    def __init__(self, connection: Connection) -> None:
        """Connect lazily: nothing is imported or asked of a server before the first call."""

    @staticmethod
    def is_address(uri: str) -> bool:
        """Return whether an address of this backend's scheme is complete."""

    @staticmethod
    def environment(connection: Connection) -> dict[str, str]:
        """Return the variables that another process needs to reach the same store: paths and endpoints, no secrets."""

    def read(self, uri: str, start: int, stop: int | None) -> bytes:
        """Return the bytes [start, stop) of an object, up to its end where stop is None."""

    def stream(self, uri: str, start: int, stop: int, chunk: int) -> Iterator[bytes]:
        """Yield the bytes [start, stop) as they arrive, at most `chunk` at a time; fewer where the object ends."""

    def write(self, uri: str, data: bytes) -> None:
        """Store bytes."""

    def read_tagged(self, uri: str) -> tuple[bytes, str]:
        """Return the bytes of an object and their tag."""

    def write_if(self, uri: str, data: bytes, tag: str | None) -> str:
        """Store bytes where those of this tag are, or none where the tag is None, and return their own tag.

        One of several writers succeeds.

        Raises:
            ConflictError: something else is there.
        """

    def upload(self, path: Path, uri: str) -> None:
        """Store a file."""

    def download(self, uri: str, path: Path) -> None:
        """Copy an object into a file."""

    def copy(self, source: str, target: str) -> None:
        """Store an object of this backend anew under another of its addresses."""

    def exists(self, uri: str) -> bool:
        """Return whether an object is at the address."""

    def list(self, uri: str) -> list[Entry]:
        """Return every object under a folder address, in any order."""

    def delete(self, uri: str) -> None:
        """Remove an object; nothing happens where there is none."""

    def remove_empty_folders(self, uri: str) -> None:
        """Remove a folder address's empty folders and itself; nothing happens where folders are not stored."""
