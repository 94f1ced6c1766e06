"""`Storage`, the value through which all other code reads and writes stored bytes, by address.

An address is `SCHEME://…`; its scheme selects the backend from `BACKENDS`. A `Storage` is a small frozen value that can
be pickled; clients are created per process. It never contains secrets, only the path of a credentials file, if any.
Every method waits for an unavailable store for up to `patience_s` seconds.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeVar

from pipelines.config import Config
from pipelines.environment.scratch import temporary_folder
from pipelines.storage.backend import Backend, Connection, Entry
from pipelines.storage.errors import (
    ConflictError,
    NotFoundError,
    ShortObjectError,
    StorageError,
    TransientStorageError,
    not_found,
)
from pipelines.storage.fsspec_backend import PROTOCOLS, FsspecBackend
from pipelines.storage.local import LocalBackend, local_path
from pipelines.storage.rate import Throttling
from pipelines.storage.retry import PATIENCE_S, retry
from pipelines.storage.s3 import S3Backend

T = TypeVar("T")
BACKENDS: dict[str, type[Backend]] = {
    "s3": S3Backend,
    "file": LocalBackend,
    **dict.fromkeys(PROTOCOLS, FsspecBackend),
}
"""Scheme of an address -> backend."""


@dataclass(frozen=True)
class Storage(Connection):
    """Reads and writes stored objects by their addresses.

    Unless stated otherwise, methods raise `NotFoundError` if nothing is stored at an address, `TransientStorageError`
    if the store has been unavailable for `patience_s` seconds (0: a single try), and `StorageError` for everything that
    waiting does not fix: no permission, a full disk, no such bucket.
    """

    @classmethod
    def of(cls, config: Config) -> Storage:
        """Return the storage of a configuration; missing settings come from the environment."""
        region = config.storage.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return cls(
            config.storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
            config.storage.credentials_file or os.environ.get("AWS_SHARED_CREDENTIALS_FILE"),
            region,
        )

    def environment(self) -> dict[str, str]:
        """Return the environment variables that other processes need for the same storage: paths and endpoints."""
        merged: dict[str, str] = {}
        for backend in BACKENDS.values():
            merged |= backend.environment(self)
        return merged

    def read(self, uri: str, start: int = 0, stop: int | None = None, *, patience_s: float = PATIENCE_S) -> bytes:
        """Return the bytes [start, stop) at an address; all of them by default."""
        return self._retry(uri, patience_s, lambda backend: backend.read(uri, start, stop))

    def find(self, uri: str, *, patience_s: float = PATIENCE_S) -> bytes | None:
        """Return the bytes at an address, or None if nothing is stored there."""
        try:
            return self.read(uri, patience_s=patience_s)
        except NotFoundError:
            return None

    def stream(self, uri: str, start: int, stop: int, chunk: int = 1 << 20) -> Iterator[bytes]:
        """Yield the bytes [start, stop) of a single request as they arrive; `fetch` resumes lost connections.

        Raises:
            TransientStorageError: the connection broke; the bytes yielded before are valid.
        """
        yield from self._backend(uri).stream(uri, start, stop, chunk)

    def fetch(
        self, uri: str, start: int, stop: int, sink: Callable[[bytes], object], *, patience_s: float = PATIENCE_S
    ) -> int:
        """Pass the bytes [start, stop) to `sink` in order, resuming lost connections; return the number of requests.

        Requests are repeated until one returns a byte or `patience_s` seconds have passed without any.

        Raises:
            TransientStorageError: no byte arrived for `patience_s` seconds.
            ShortObjectError: the object ends before `stop`.
            StorageError: waiting does not help.
        """
        at, requests = start, 0

        def request() -> None:
            nonlocal at, requests
            began = at
            requests += 1
            try:
                for part in self.stream(uri, at, stop):
                    sink(part)
                    at += len(part)
            except TransientStorageError:
                if at == began:
                    raise

        while at < stop:
            reached = at
            retry(request, patience_s)
            if at == reached:
                raise ShortObjectError(f"{uri} ends at byte {at}, {stop} were expected: it is cut short")
        return requests

    def write(self, uri: str, data: bytes, *, patience_s: float = PATIENCE_S) -> None:
        """Store bytes at an address, replacing what is there in one step."""
        self._retry(uri, patience_s, lambda backend: backend.write(uri, data))

    def read_tagged(self, uri: str, *, patience_s: float = PATIENCE_S) -> tuple[bytes, str]:
        """Return the bytes at an address and their tag, for `write_if`."""
        return self._retry(uri, patience_s, lambda backend: backend.read_tagged(uri))

    def write_if(self, uri: str, data: bytes, tag: str | None, *, patience_s: float = PATIENCE_S) -> str:
        """Store bytes if the stored ones have this tag, or if nothing is stored and the tag is None; return the new
        tag.

        Exactly one of several writers succeeds.

        Args:
            data: unique bytes, for instance with a random token: after a lost answer they show whether this writer or
                another one succeeded.

        Raises:
            ConflictError: something else is there.
        """
        try:
            return self._retry(uri, patience_s, lambda backend: backend.write_if(uri, data, tag))
        except ConflictError:
            there, its_tag = self._stored(uri, patience_s)
            if there != data or its_tag is None:
                raise
            return its_tag

    def update(self, uri: str, change: Callable[[bytes | None], bytes], *, patience_s: float = PATIENCE_S) -> bytes:
        """Replace an object by a function of its bytes without losing writes of others; return the new bytes.

        Args:
            change: maps the stored bytes, None if there are none, to new ones that `write_if` may store; called again
                if
            another writer was faster. Its exceptions are passed on, and nothing is stored.

        Raises:
            ConflictError: others have been faster for `patience_s` seconds.
        """
        deadline = time.monotonic() + patience_s
        while True:
            stored, tag = self._stored(uri, patience_s)
            data = change(stored)
            try:
                self.write_if(uri, data, tag, patience_s=patience_s)
                return data
            except ConflictError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0, 0.1))

    def upload_stream(self, start: Callable[[], BinaryIO], uri: str, *, patience_s: float = PATIENCE_S) -> None:
        """Store what a stream gives until its end in one step, without holding all of it in memory.

        Args:
            start: returns the stream from its beginning; called again for every try.
        """
        self._retry(uri, patience_s, lambda backend: backend.upload_stream(start(), uri))

    def upload(self, path: Path, uri: str, *, patience_s: float = PATIENCE_S) -> None:
        """Store a file in one step; large files are uploaded in parts."""
        self._retry(uri, patience_s, lambda backend: backend.upload(path, uri))

    def download(self, uri: str, path: Path, *, patience_s: float = PATIENCE_S) -> None:
        """Copy an object into a file; large objects are downloaded in parallel ranges."""
        self._retry(uri, patience_s, lambda backend: backend.download(uri, path))

    def copy(self, source: str, target: str, *, patience_s: float = PATIENCE_S) -> None:
        """Copy an object to another address, inside the store if both addresses have the same scheme."""
        if self._backend(source) is self._backend(target):
            self._retry(source, patience_s, lambda backend: backend.copy(source, target))
        elif is_local(source):
            self.upload(local_path(source), target, patience_s=patience_s)
        else:
            with temporary_folder("copy") as scratch:
                self.download(source, scratch / "object", patience_s=patience_s)
                self.upload(scratch / "object", target, patience_s=patience_s)

    def exists(self, uri: str, *, patience_s: float = PATIENCE_S) -> bool:
        """Return whether an object is at the address."""
        return self._retry(uri, patience_s, lambda backend: backend.exists(uri))

    def list(self, uri: str, *, patience_s: float = PATIENCE_S) -> list[Entry]:
        """Return every object under a folder address, sorted by address; empty if there is no such folder."""
        return sorted(self.scan(uri, patience_s=patience_s), key=lambda entry: entry.uri)

    def scan(self, uri: str, *, patience_s: float = PATIENCE_S) -> Iterator[Entry]:
        """Yield every object under a folder address in any order, from pages of which one is in memory at a time."""
        token: str | None = None
        while True:
            after = token
            entries, token = self._retry(uri, patience_s, lambda backend: backend.page(uri, after))  # noqa: B023
            yield from entries
            if token is None:
                return

    def delete(self, uri: str, *, patience_s: float = PATIENCE_S) -> None:
        """Remove an object, if there is one."""
        self._retry(uri, patience_s, lambda backend: backend.delete(uri))

    def delete_folder(self, uri: str, *, patience_s: float = PATIENCE_S) -> None:
        """Remove every object under a folder address, and the folder itself if the store has folders."""
        for entry in self.list(uri, patience_s=patience_s):
            self.delete(entry.uri, patience_s=patience_s)
        self._retry(uri, patience_s, lambda backend: backend.remove_empty_folders(uri))

    def download_folder(self, uri: str, folder: Path, *, patience_s: float = PATIENCE_S) -> None:
        """Copy every object under a folder address into a folder.

        Raises:
            NotFoundError: there is none.
            StorageError: the key of an object leads out of the folder; then nothing is copied.
        """
        entries = self.list(uri, patience_s=patience_s)
        if not entries:
            raise not_found(uri)
        for path, entry in [(_path_below(folder, uri, entry), entry) for entry in entries]:
            if entry.uri.endswith("/"):  # some tools store such an object for a folder
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            self.download(entry.uri, path, patience_s=patience_s)

    def throttling(self) -> Throttling:
        """Return how this process's requests for objects of S3 went; other stores are not counted."""
        backend = _connected(S3Backend, self)
        assert isinstance(backend, S3Backend)
        return backend.client.reads.throttling()

    def keeps_versions(self, uri: str) -> bool | None:
        """Return whether what is overwritten or deleted at an address can be brought back; None if that is unknown."""
        kind = check_address(uri)
        if kind is LocalBackend:
            return False
        backend = _connected(kind, self)
        return backend.keeps_versions(uri) if isinstance(backend, S3Backend) else None

    def require(self, root: str) -> None:
        """Check, before anything starts, that a root can be listed and written; an unavailable store fails at once.

        Raises:
            StorageError: no such bucket, wrong key, no permission or no server, with the fix.
        """
        probe = f"{root.rstrip('/')}/.ddpm-probe-{os.getpid()}"
        self.write(probe, b"", patience_s=0)
        self.delete(probe, patience_s=0)

    def _stored(self, uri: str, patience_s: float) -> tuple[bytes | None, str | None]:
        """Return the bytes at an address and their tag; (None, None) if nothing is stored."""
        try:
            return self.read_tagged(uri, patience_s=patience_s)
        except NotFoundError:
            return None, None

    def _backend(self, uri: str) -> Backend:
        return _connected(check_address(uri), self)

    def _retry(self, uri: str, patience_s: float, call: Callable[[Backend], T]) -> T:
        """Return the result of a call of the backend of an address, repeated while the store is unavailable."""
        backend = self._backend(uri)
        return retry(lambda: call(backend), patience_s)


def check_address(uri: str) -> type[Backend]:
    """Return the kind of backend that an address belongs to.

    Raises:
        StorageError: the scheme is not in `BACKENDS`, or the address is incomplete.
    """
    scheme, separator, _ = uri.partition("://")
    kind = BACKENDS.get(scheme) if separator else None
    if kind is None or not kind.is_address(uri):
        raise StorageError(f"{uri}: addresses are {address_forms()}")
    return kind


def address_forms(key: str = "/KEY") -> str:
    """Return the forms of addresses, for messages.

    Args:
        key: placeholder for the part after the container's name.
    """
    forms = [backend.form.replace("/KEY", key) for backend in BACKENDS.values()]
    return " or ".join(dict.fromkeys(forms))


def join(uri: str, *parts: str) -> str:
    """Return an address below another."""
    return "/".join([uri.rstrip("/"), *parts])


def split_scheme(uri: str) -> tuple[str, str]:
    """Return an address as ("SCHEME://", the rest)."""
    scheme, separator, rest = uri.partition("://")
    return scheme + separator, rest


def is_local(uri: str) -> bool:
    """Return whether an address is a file of this machine.

    Raises:
        StorageError: it is not an address.
    """
    return check_address(uri) is LocalBackend


def _path_below(folder: Path, uri: str, entry: Entry) -> Path:
    """Return the path below `folder` for an object listed under a folder address.

    Raises:
        StorageError: the key contains ".." or starts with "/".
    """
    name = entry.uri[len(uri.rstrip("/")) + 1 :]
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise StorageError(
            f"{entry.uri}: this key leads out of the folder {uri}, so nothing of it is downloaded: "
            "find out who wrote the object, and delete or rename it"
        )
    return folder / name


@lru_cache(maxsize=32)
def _connected(kind: type[Backend], connection: Connection) -> Backend:
    """Return the backend of a kind for a connection: one per process."""
    return kind(connection)
