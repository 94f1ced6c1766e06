"""The files of a sharded checkpoint: each rank writes a part, and an index says which rows of which tensor are where.

A part is a safetensors file of chunks: consecutive rows of a tensor, along its first dimension, of at most
`CHUNK_BYTES`. The index, `parts.json`, has the bytes and the SHA-256 of every chunk, so that whoever reads some of them
can check what it has read. A tensor without dimensions counts as one row.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from pipelines.checkpoints.errors import ModelError

INDEX_VERSION = 1
CHUNK_BYTES = 8 * 2**20
"""Largest size of a chunk, unless one row is larger: a reader of one row fetches no more."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in safetensors files."""
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class TensorRows:
    """Consecutive rows of a tensor: those that a rank holds, or those that it asks for.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        first: index of the first of these rows.
        values: [rows, ...], or the whole of a tensor without dimensions.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    values: Tensor

    def __len__(self) -> int:
        return len(self.values) if self.shape else 1

    def chunks(self, chunk_bytes: int | None = None) -> Iterator[TensorRows]:
        """Yield the same rows in chunks."""
        if not self.shape or not self.shape[0]:
            yield self
            return
        row = self.values.element_size() * math.prod(self.shape[1:])
        each = max(1, (chunk_bytes or CHUNK_BYTES) // max(row, 1))
        for at in range(0, len(self), each):
            yield TensorRows(self.name, self.shape, self.first + at, self.values[at : at + each])


@dataclass(frozen=True)
class Chunk:
    """Where a chunk is.

    Attributes:
        first: index of its first row.
        rows: the number of its rows.
        part: the rank that wrote the file.
        start, stop: its bytes in the file.
        sha256: of these bytes.
    """

    first: int
    rows: int
    part: int
    start: int
    stop: int
    sha256: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a sharded checkpoint.

    Attributes:
        dtype: its name in safetensors files.
        shape: of the whole tensor.
        chunks: in the order of their rows.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BY_NAME[self.dtype].itemsize

    def is_whole(self) -> bool:
        """Return whether every row is in exactly one chunk."""
        at = 0
        for chunk in self.chunks:
            if chunk.first != at or chunk.rows < 0:
                return False
            at += chunk.rows
        return at == (self.shape[0] if self.shape else 1)


@dataclass(frozen=True)
class PartsIndex:
    """The tensors of a sharded checkpoint, by name."""

    tensors: dict[str, StoredTensor]

    def to_json(self) -> bytes:
        """Return the content of `parts.json`."""
        tensors = {n: [t.dtype, t.shape, [list(vars(c).values()) for c in t.chunks]] for n, t in self.tensors.items()}
        return json.dumps({"index_version": INDEX_VERSION, "tensors": tensors}, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes, where: str) -> PartsIndex:
        """Return the index in the content of a `parts.json`, or what one part has of it.

        Raises:
            ModelError: it is damaged, or of another version.
        """
        try:
            plain = json.loads(text)
            version = plain["index_version"]
            if version == INDEX_VERSION:
                return cls({name: _stored(*tensor) for name, tensor in plain["tensors"].items()})
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{where} is damaged ({error!r}): the checkpoint cannot be used") from error
        raise ModelError(f"{where}: version {version} of the index, this release reads {INDEX_VERSION}")

    @classmethod
    def joined(cls, parts: Iterable[PartsIndex], where: str) -> PartsIndex:
        """Return the index of all parts together.

        Raises:
            ModelError: parts disagree on a tensor, or rows are missing or there twice.
        """
        found: dict[str, StoredTensor] = {}
        for name, tensor in itertools.chain.from_iterable(part.tensors.items() for part in parts):
            other = found.get(name, replace(tensor, chunks=()))
            if (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
                raise ModelError(f"{where}: the parts disagree on the shape of {name}")
            found[name] = replace(tensor, chunks=other.chunks + tensor.chunks)
        whole = {name: replace(t, chunks=tuple(sorted(t.chunks, key=_first))) for name, t in found.items()}
        if torn := [name for name, tensor in whole.items() if not tensor.is_whole()]:
            raise ModelError(f"{where}: the parts do not hold every row of {torn[0]} exactly once")
        return cls(whole)


def _first(chunk: Chunk) -> int:
    return chunk.first


def _stored(dtype: str, shape: Sequence[int], chunks: Sequence[Sequence[Any]]) -> StoredTensor:
    if dtype not in BY_NAME:
        raise ValueError(f"unknown dtype {dtype}")
    return StoredTensor(dtype, tuple(shape), tuple(Chunk(*chunk) for chunk in chunks))


@dataclass(frozen=True)
class Part:
    """The content of a part: the header of a safetensors file, and the chunks behind it.

    Attributes:
        buffers: its bytes, one after the other.
        index: where in the file which rows are.
    """

    buffers: tuple[memoryview, ...]
    index: PartsIndex

    @classmethod
    def of(cls, rank: int, chunks: Sequence[TensorRows]) -> Part:
        """Return the part of a rank with these chunks, which stay where they are.

        Args:
            chunks: contiguous, in CPU memory.
        """
        ordered = sorted(chunks, key=lambda c: (-c.values.element_size(), c.name, c.first))
        header = safetensors_header(
            {f"{c.name}@{c.first}": (DTYPES[c.values.dtype], tuple(c.values.shape)) for c in ordered}
        )
        buffers, at = [memoryview(header)], len(header)
        tensors: dict[str, StoredTensor] = {}
        for chunk in ordered:
            data = _bytes(chunk.values)
            place = Chunk(chunk.first, len(chunk), rank, at, at + len(data), hashlib.sha256(data).hexdigest())
            before = tensors[chunk.name].chunks if chunk.name in tensors else ()
            tensors[chunk.name] = StoredTensor(DTYPES[chunk.values.dtype], chunk.shape, (*before, place))
            buffers.append(data)
            at += len(data)
        return cls(tuple(buffers), PartsIndex(tensors))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(map(len, self.buffers))

    def sha256(self) -> str:
        """Return the digest of the file."""
        digest = hashlib.sha256()
        for buffer in self.buffers:
            digest.update(buffer)
        return digest.hexdigest()

    def stream(self) -> BinaryIO:
        """Return the file as a stream."""
        return joined_stream(self.buffers)


def safetensors_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return the header of a safetensors file with tensors of these (dtype, shape), one after the other."""
    entries, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BY_NAME[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class _Joined(io.RawIOBase):
    """Buffers one after the other as a stream, read once and from its beginning."""

    def __init__(self, buffers: Iterable[bytes | memoryview]) -> None:
        self._rest, self._current = iter(buffers), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._current:
            following = next(self._rest, None)
            if following is None:
                return 0
            self._current = memoryview(following)
        view = memoryview(target).cast("B")
        count = min(len(view), len(self._current))
        view[:count], self._current = self._current[:count], self._current[count:]
        return count


def joined_stream(buffers: Iterable[bytes | memoryview]) -> BinaryIO:
    """Return buffers one after the other as a stream, each of which is asked for when the one before it is used up."""
    return cast("BinaryIO", io.BufferedReader(_Joined(buffers), 2**20))
