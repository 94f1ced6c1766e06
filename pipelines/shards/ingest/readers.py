"""Functions that read one file of a source: stored, in memory or inside a zip; Ray pickles them."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from pipelines.presentation.errors import PipelineError
from pipelines.storage import NotFoundError, Storage, StorageError, is_local

LARGEST = 1 << 30
"""Bytes of a file in a zip, which is read into memory."""


class UnreadableError(PipelineError):
    """A file of a source cannot be read, or is not an image; the ingest leaves it out."""


Read = Callable[[Storage], bytes]
"""Returns the bytes of a file; raises `UnreadableError`, and can be pickled."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Reads a file that is stored on this machine or in a store."""

    uri: str

    def __call__(self, storage: Storage) -> bytes:
        """Return the bytes.

        Raises:
            UnreadableError: there is no such file, or a local one cannot be read.
            StorageError: the store refuses or does not answer, which is no fault of the file.
        """
        try:
            return storage.read(self.uri)
        except NotFoundError as error:
            raise UnreadableError("no such file") from error
        except StorageError as error:
            if is_local(self.uri):
                raise UnreadableError(str(error)) from error
            raise


@dataclass(frozen=True, slots=True)
class InMemory:
    """Returns bytes that are in memory."""

    data: bytes

    def __call__(self, storage: Storage) -> bytes:
        """Return the bytes."""
        return self.data


@dataclass(frozen=True, slots=True)
class ZipMember:
    """Reads a file inside a zip, local or in a store, by one ranged read."""

    uri: str
    offset: int
    compressed: int
    size: int
    method: int
    crc: int
    encrypted: bool

    def __call__(self, storage: Storage) -> bytes:
        """Return the bytes, checked against the zip's CRC."""
        if self.encrypted:
            raise UnreadableError("is encrypted: make the zip without a password")
        if max(self.size, self.compressed) > LARGEST:
            held = max(self.size, self.compressed) / 2**30
            raise UnreadableError(f"holds {held:.1f} GiB, where a picture has at most {LARGEST / 2**30:.0f}")
        # The length of the local header is not known before it is read; 1 KiB is nearly always enough.
        block = storage.read(self.uri, self.offset, self.offset + 1024 + self.compressed)
        if block[:4] != b"PK\x03\x04" or len(block) < 30:
            raise UnreadableError("the zip's directory points to no file: the zip is damaged")
        begin = 30 + sum(struct.unpack_from("<HH", block, 26))
        if len(block) < begin + self.compressed:
            block = storage.read(self.uri, self.offset, self.offset + begin + self.compressed)
        data = self._inflate(block[begin : begin + self.compressed])
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise UnreadableError("does not have the checksum that the zip records: the zip is damaged")
        return data

    def _inflate(self, data: bytes) -> bytes:
        if self.method == zipfile.ZIP_STORED:
            return data
        if self.method != zipfile.ZIP_DEFLATED:
            raise UnreadableError(f"is compressed by method {self.method}: make the zip again, stored or deflated")
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size + 1)
        except zlib.error as error:
            raise UnreadableError(f"cannot be decompressed: {error}: the zip is damaged") from error


_KINDS = {"file": StoredFile, "memory": InMemory, "zip": ZipMember}
"""Kind of a reader as manifests record it -> its class."""


def as_columns(read: Read) -> dict[str, Any]:
    """Return what a manifest records of a reader: kind, address, numbers and bytes, each None where it has none."""
    kind = next(name for name, known in _KINDS.items() if type(read) is known)
    values = [getattr(read, field.name) for field in fields(_KINDS[kind])]
    if kind == "memory":
        return {"reader": kind, "uri": None, "place": None, "data": values[0]}
    uri = values[0].encode("utf-8", "surrogateescape")  # names of files need not be UTF-8
    return {"reader": kind, "uri": uri, "place": [int(value) for value in values[1:]], "data": None}


def from_columns(row: dict[str, Any]) -> Read:
    """Return the reader that a row of a manifest records."""
    if row["reader"] == "memory":
        return InMemory(row["data"])
    found: Read = _KINDS[row["reader"]](row["uri"].decode("utf-8", "surrogateescape"), *row["place"])
    return found


def is_remote(read: Read) -> bool:
    """Return whether a file is on S3, so that reading many at a time is faster."""
    uri = getattr(read, "uri", None)
    return uri is not None and not is_local(uri)
