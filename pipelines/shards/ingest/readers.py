"""Functions that read one file of a source: stored, in memory, inside a zip, a tar or Parquet; Ray pickles them."""

from __future__ import annotations

import io
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.presentation.errors import PipelineError
from pipelines.storage import NotFoundError, Storage, StorageError, is_local, local_path

HELD_BYTES = 256 << 20
"""Bytes of pictures of Parquet files that a process holds, more than the block of pictures that are mixed."""
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


class RangedFile(io.RawIOBase):
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


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """Reads a picture of a row group of a Parquet file, local or in a store.

    Attributes:
        uri: address of the file.
        size: its size in bytes.
        group: number of the row group.
        row: number of the row in it.
    """

    uri: str
    size: int
    group: int
    row: int

    def __call__(self, storage: Storage) -> bytes:
        """Return the bytes."""
        pictures = _row_groups.get((self.uri, self.size, self.group), storage)
        data = pictures[self.row].as_py() if self.row < len(pictures) else None
        if data is None:
            raise UnreadableError("has no bytes: write the Parquet file with its pictures in it")
        return bytes(data)


def open_parquet(uri: str, size: int, storage: Storage) -> pq.ParquetFile:
    """Open a Parquet file, which is read in ranges where it is in a store.

    Raises:
        pyarrow.ArrowInvalid: it is no Parquet file.
    """
    if is_local(uri):
        return pq.ParquetFile(local_path(uri))
    return pq.ParquetFile(io.BufferedReader(RangedFile(uri, size, storage), buffer_size=1 << 20))


def picture_column(schema: pa.Schema) -> str | None:
    """Return the path of the column with the bytes of pictures: `image.bytes` of the library `datasets`, or of bytes.

    Where there are several, it is the one called image, else the first.
    """
    found = []
    for field in schema:
        if pa.types.is_struct(field.type) and "bytes" in {
            field.type.field(i).name for i in range(field.type.num_fields)
        }:
            found.append(f"{field.name}.bytes")
        elif field.name in ("image", "img") and (
            pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        ):
            found.append(field.name)
    return next((path for path in found if path.partition(".")[0] == "image"), found[0] if found else None)


class _RowGroups:
    """The pictures of the row groups that were read last, each read once by however many threads want it."""

    def __init__(self, most: int) -> None:
        self.most, self.lock = most, threading.Lock()
        self.held: OrderedDict[tuple[str, int, int], pa.ChunkedArray] = OrderedDict()
        self.reading: dict[tuple[str, int, int], threading.Lock] = {}

    def get(self, key: tuple[str, int, int], storage: Storage) -> pa.ChunkedArray:
        """Return the column of pictures of a row group."""
        with self.lock:
            reading = self.reading.setdefault(key, threading.Lock())
        with reading:
            with self.lock:
                if key in self.held:
                    self.held.move_to_end(key)
                    return self.held[key]
            found = _pictures(*key, storage)
            with self.lock:
                self.held[key] = found
                self.reading.pop(key, None)
                while len(self.held) > 1 and sum(column.nbytes for column in self.held.values()) > self.most:
                    self.held.popitem(last=False)
        return found


_row_groups = _RowGroups(HELD_BYTES)


def _pictures(uri: str, size: int, group: int, storage: Storage) -> pa.ChunkedArray:
    try:
        parquet = open_parquet(uri, size, storage)
        path = picture_column(parquet.schema_arrow)
        if path is None or group >= parquet.num_row_groups:
            raise UnreadableError("the Parquet file is another one than was listed: ingest again")
        column = parquet.read_row_group(group, columns=[path]).column(0)
    except (pa.ArrowInvalid, OSError) as error:
        raise UnreadableError(f"the Parquet file is damaged or gone: {error}") from error
    if pa.types.is_struct(column.type):
        column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], pa.binary())
    return column


@dataclass(frozen=True, slots=True)
class TarMember:
    """Reads a member of a tar, local or in a store, by one ranged read."""

    uri: str
    offset: int
    size: int
    crc32: int

    def __call__(self, storage: Storage) -> bytes:
        """Return the bytes, checked against the CRC of the listing."""
        try:
            data = storage.read(self.uri, self.offset, self.offset + self.size)
        except NotFoundError as error:
            raise UnreadableError("its tar is gone") from error
        if zlib.crc32(data) != self.crc32:
            raise UnreadableError("its tar has changed since it was listed: ingest again")
        return data


_KINDS = {"file": StoredFile, "memory": InMemory, "zip": ZipMember, "parquet": ParquetImage, "tar": TarMember}
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
