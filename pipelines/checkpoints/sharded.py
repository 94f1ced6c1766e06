"""Reading a sharded checkpoint: by ranges, only the chunks that somebody needs, each of them checked."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import torch
from torch import Tensor

from pipelines.checkpoints.errors import ModelError
from pipelines.checkpoints.parts import (
    BY_NAME,
    Chunk,
    PartsIndex,
    StoredTensor,
    TensorRows,
    joined_stream,
    safetensors_header,
)
from pipelines.shards.stream import read_ahead
from pipelines.storage import NotFoundError, ShortObjectError, Storage, join, layout

REQUEST_BYTES = 64 * 2**20
"""Bytes of neighbouring chunks that are fetched by one request."""
REQUESTS_AT_ONCE = 8


def check_file(files: Mapping[str, str], name: str, data: bytes) -> None:
    """Raise unless these are the bytes of a file of a checkpoint.

    Args:
        files: file name -> SHA-256, as in its `state.json`.

    Raises:
        ModelError: its SHA-256 is another one.
    """
    if hashlib.sha256(data).hexdigest() != files[name]:
        raise ModelError(f"{name} is damaged: its SHA-256 is not the recorded one")


def read_index(storage: Storage, folder: str, files: Mapping[str, str]) -> PartsIndex:
    """Return the index of a sharded checkpoint.

    Args:
        folder: its address.
        files: file name -> SHA-256, as in its `state.json`.

    Raises:
        ModelError: it is gone, damaged, or names parts that `state.json` does not.
    """
    where = join(folder, layout.PARTS_INDEX)
    try:
        text = storage.read(where)
    except NotFoundError as error:
        raise ModelError(f"{layout.PARTS_INDEX} is missing") from error
    check_file(files, layout.PARTS_INDEX, text)
    index = PartsIndex.from_json(text, where)
    parts = {layout.part_file(chunk.part) for tensor in index.tensors.values() for chunk in tensor.chunks}
    if unknown := parts - files.keys():
        raise ModelError(f"{layout.PARTS_INDEX} names {min(unknown)}, which {layout.TRAINING_STATE} does not")
    return index


@dataclass(frozen=True)
class _Request:
    """Bytes of a part that are fetched at once, and what to do with each chunk in them."""

    part: int
    start: int
    stop: int
    chunks: tuple[tuple[str, Chunk, tuple[TensorRows, ...]], ...]

    def fetch(self, storage: Storage, folder: str) -> memoryview:
        """Return the bytes, of which every chunk has been checked.

        Raises:
            ModelError: a chunk is damaged, or the part is gone or cut short.
        """
        data, part = bytearray(), layout.part_file(self.part)
        try:
            storage.fetch(join(folder, part), self.start, self.stop, data.extend)
        except (NotFoundError, ShortObjectError) as error:
            raise ModelError(f"{part} is missing or cut short ({error})") from error
        view = memoryview(data)
        for name, chunk, _ in self.chunks:
            if hashlib.sha256(view[chunk.start - self.start : chunk.stop - self.start]).hexdigest() != chunk.sha256:
                raise ModelError(
                    f"{part} is damaged: the SHA-256 of rows {chunk.first} to {chunk.first + chunk.rows - 1} of "
                    f"{name} is not the recorded one"
                )
        return view


def read_rows(storage: Storage, folder: str, index: PartsIndex, wanted: Sequence[TensorRows]) -> int:
    """Read rows of tensors into the values of `wanted`, and return how many bytes were fetched.

    Fetched are only chunks with some of the rows, each once, and neighbouring ones together.

    Args:
        folder: address of the checkpoint.
        wanted: names and rows that the checkpoint has; values in another dtype are converted.

    Raises:
        ModelError: what was read is damaged, or a part is gone or cut short; names the part and the tensor.
    """
    users: dict[Chunk, list[TensorRows]] = defaultdict(list)
    names: dict[Chunk, str] = {}
    for rows in wanted:
        for chunk in index.tensors[rows.name].chunks:
            if chunk.first < rows.first + len(rows) and rows.first < chunk.first + chunk.rows:
                users[chunk].append(rows)
                names[chunk] = rows.name
    requests = _together([(names[chunk], chunk, tuple(rows)) for chunk, rows in users.items()])

    def read(request: _Request) -> int:
        view = request.fetch(storage, folder)
        for name, chunk, targets in request.chunks:
            values = _values(view[chunk.start - request.start : chunk.stop - request.start], index.tensors[name], chunk)
            for rows in targets:
                _copy(values, chunk, rows)
        return len(view)

    with ThreadPoolExecutor(REQUESTS_AT_ONCE, "checkpoint-read") as pool:
        return sum(pool.map(read, requests))


def _together(chunks: Iterable[tuple[str, Chunk, tuple[TensorRows, ...]]]) -> list[_Request]:
    """Return the requests for chunks; those that touch each other are fetched together."""
    requests: list[_Request] = []
    for entry in sorted(chunks, key=lambda entry: (entry[1].part, entry[1].start)):
        chunk, last = entry[1], requests[-1] if requests else None
        if last and last.part == chunk.part and last.stop == chunk.start and chunk.stop - last.start <= REQUEST_BYTES:
            requests[-1] = _Request(last.part, last.start, chunk.stop, (*last.chunks, entry))
        else:
            requests.append(_Request(chunk.part, chunk.start, chunk.stop, (entry,)))
    return requests


def _values(data: memoryview, tensor: StoredTensor, chunk: Chunk) -> Tensor:
    shape = (chunk.rows, *tensor.shape[1:]) if tensor.shape else ()
    return torch.frombuffer(data, dtype=BY_NAME[tensor.dtype]).view(shape) if data else torch.empty(shape)


def _copy(values: Tensor, chunk: Chunk, rows: TensorRows) -> None:
    """Copy the rows of a chunk that are wanted to where they are wanted."""
    if not rows.shape:
        rows.values.copy_(values)
        return
    start, stop = max(chunk.first, rows.first), min(chunk.first + chunk.rows, rows.first + len(rows))
    rows.values[start - rows.first : stop - rows.first].copy_(values[start - chunk.first : stop - chunk.first])


def read_tensors(storage: Storage, folder: str, index: PartsIndex) -> dict[str, Tensor]:
    """Return all tensors of a sharded checkpoint, whole.

    Raises:
        ModelError: as for `read_rows`.
    """
    found = {name: torch.empty(t.shape, dtype=BY_NAME[t.dtype]) for name, t in index.tensors.items()}
    read_rows(storage, folder, index, [TensorRows(name, tuple(t.shape), 0, t) for name, t in found.items()])
    return found


@dataclass(frozen=True)
class Assembled:
    """A safetensors file of whole tensors that is made of a checkpoint's chunks as it is written somewhere else.

    It is never in memory as a whole, and is the same to the byte as the file that `safetensors` writes of the tensors.

    Attributes:
        folder: address of the sharded checkpoint.
        names: name of a tensor there -> its name in the file.
    """

    storage: Storage
    folder: str
    index: PartsIndex
    names: Mapping[str, str]

    def upload(self, uri: str) -> tuple[str, int]:
        """Store the file, and return (its SHA-256, its size).

        Raises:
            ModelError: a chunk is damaged, or a part is gone or cut short.
        """
        digest, size = hashlib.sha256(), 0

        def start() -> BinaryIO:
            nonlocal digest, size
            digest, size = hashlib.sha256(), 0
            return joined_stream(counted())

        def counted() -> Iterator[memoryview]:
            nonlocal size
            for buffer in self._buffers():
                digest.update(buffer)
                size += len(buffer)
                yield buffer

        self.storage.upload_stream(start, uri)
        return digest.hexdigest(), size

    def _buffers(self) -> Iterator[memoryview]:
        tensors = {self.names[name]: self.index.tensors[name] for name in self.names}
        ordered = sorted(tensors.items(), key=lambda item: (-BY_NAME[item[1].dtype].itemsize, item[0]))
        yield memoryview(safetensors_header({name: (tensor.dtype, tensor.shape) for name, tensor in ordered}))
        chunks = ((name, chunk) for name, tensor in ordered for chunk in tensor.chunks if chunk.rows)
        requests = (_Request(c.part, c.start, c.stop, ((name, c, ()),)) for name, c in chunks)
        fetch = partial(_Request.fetch, storage=self.storage, folder=self.folder)
        yield from read_ahead(fetch, requests, REQUESTS_AT_ONCE, REQUESTS_AT_ONCE)
