"""The index of a node: sidecars as columns in files on its disk, of which its processes share one copy."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import logging
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO, FileIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.shards.cache import STALLED_S, ShardCache, held
from pipelines.shards.columns import COLUMN, WIDE_COLUMN, Texts
from pipelines.shards.index import ShardIndex, ShardInfo
from pipelines.shards.source import ShardSource

logger = logging.getLogger(__name__)

VERSION = 2
ALIGNED = 64
"""Bytes at whose multiples columns begin."""
KEYS_ALIGNED = 1 << 16
"""Bytes at whose multiple the keys begin: they are mapped apart, because they are for messages and hardly ever read."""
OPEN = 256
"""Indexes that a process keeps open, more only for a batch that needs them: each is an open file."""
UNUSED = 64
"""Batches without a sample of a shard after which its index is closed: its window has ended."""
READERS = 2
"""Sidecars that a process reads from the store at a time: each thread keeps some memory of what it has parsed."""
POLL_S = 0.01
"""Seconds between looks for an index that another process reads from the store."""


class NodeIndex:
    """The indexes of shards, each read from the store when the first process of the node needs it.

    It is written in columns into the node's shard cache, and mapped into the memory of each process that needs it, so
    that a node has it in memory once, and of it only what is used. A file begins with the SHA-256 of its content, which
    is checked whenever it is opened: one that is damaged, or of another shard, is made again. Without a cache, or room
    in it, a process keeps its own indexes in columns.

    Args:
        cache: the node's shard cache, if there is one.
    """

    def __init__(self, cache: ShardCache | None) -> None:
        self.cache = cache
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="index")
        self._lock, self._parsing = threading.Lock(), threading.Lock()
        self._opened: OrderedDict[str, tuple[Future[ShardIndex], int]] = OrderedDict()
        self._batches = 0

    def get(self, shards: Sequence[ShardInfo], source: ShardSource) -> list[ShardIndex]:
        """Return the indexes of the shards that a batch has samples of.

        Args:
            source: reads sidecars from the store.

        Raises:
            ShardCorruptError: a sidecar is damaged, or does not list as many samples as dataset.json says.
            StorageError: the store cannot be reached, or has no such sidecar.
        """
        futures = []
        with self._lock:
            self._batches += 1
            for shard in shards:
                before = self._opened.pop(shard.sha256, None)
                future = self._pool.submit(self.read, shard, source) if before is None else before[0]
                self._opened[shard.sha256] = future, self._batches
                futures.append(future)
            while len(self._opened) > len(shards):
                first, (_, used) = next(iter(self._opened.items()))
                if len(self._opened) <= OPEN and used > self._batches - UNUSED:
                    break
                del self._opened[first]
        found = []
        for shard, future in zip(shards, futures, strict=True):
            try:
                found.append(future.result())
            except Exception:
                with self._lock:  # a failure is not kept, so that the next reader tries again
                    self._opened.pop(shard.sha256, None)
                raise
        return found

    def close(self) -> None:
        """Read no more sidecars."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def forget(self, shards: Sequence[ShardInfo]) -> None:
        """Delete the indexes of shards whose bytes did not fit them: who mends a sidecar must not find the old one."""
        with self._lock:
            for shard in shards:
                self._opened.pop(shard.sha256, None)
                if self.cache is not None:
                    with suppress(OSError):
                        self.cache.index_path(shard).unlink()

    def read(self, shard: ShardInfo, source: ShardSource) -> ShardIndex:
        """Return the index of a shard, from the node's copy, which is made if there is none.

        Raises:
            ShardCorruptError: the sidecar is damaged, or does not list as many samples as dataset.json says.
            StorageError: the store cannot be reached, or has no such sidecar.
        """
        began = time.monotonic()
        while self.cache is not None and time.monotonic() - began < STALLED_S:
            path = self.cache.index_path(shard)
            try:
                found = opened(path, shard)
                if found is not None:
                    return found
                file = held(path.with_name(f"{path.name}.part"))
                if file is not None:
                    return self._made(path, file, shard, source)
            except BlockingIOError:
                pass  # it has just been written, or is being deleted
            except OSError as error:
                logger.warning("indexes of shards are kept in memory, for %s cannot be used: %s", path, error)
                break
            time.sleep(POLL_S)  # another process reads it from the store
        return unpacked(self._packed(shard, source), shard)

    def _made(self, path: Path, file: FileIO, shard: ShardInfo, source: ShardSource) -> ShardIndex:
        """Write the node's copy of an index into a held file, and return the index.

        Raises:
            OSError: the disk fails; the store's errors are none.
        """
        assert self.cache is not None
        part = path.with_name(f"{path.name}.part")
        with file:
            written = False
            try:
                found = opened(path, shard)  # another process may just have written it
                if found is not None:
                    return found
                data = self._packed(shard, source)
                if not self.cache.has_room(len(data)):
                    return unpacked(data, shard)
                os.ftruncate(file.fileno(), 0)  # a killed process may have left it
                file.write(data)
                part.replace(path)
                written = True
            finally:
                if not written:
                    part.unlink(missing_ok=True)
        found = opened(path, shard)
        return unpacked(data, shard) if found is None else found

    def _packed(self, shard: ShardInfo, source: ShardSource) -> bytearray:
        """Return the content of an index file, read from the store."""
        text = source.read_sidecar(shard)
        with self._parsing:  # what is parsed takes several times the bytes of the JSON, and threads gain no time
            index = source.parsed(shard, text)
            del text
            content = packed(index, shard)
            del index
            return_freed_memory()
            return content


def return_freed_memory() -> None:
    """Give memory that was freed back to the system: glibc keeps some 10 MiB of each process that parses sidecars."""
    with suppress(AttributeError, OSError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def packed(index: ShardIndex, shard: ShardInfo) -> bytearray:
    """Return the content of an index file."""
    keys = Texts.of(index.keys)
    header = {
        "version": VERSION,
        "shard": shard.sha256,
        "samples": len(index),
        "columns": {name: column.dtype == WIDE_COLUMN for name, column in index.columns.items()},
        "key_bytes": len(keys.data),
    }
    head = json.dumps(header).encode()
    content = bytearray(32) + len(head).to_bytes(8, "little") + head
    for column in index.columns.values():
        content += bytes(-len(content) % ALIGNED) + column.tobytes()
    content += bytes(-len(content) % KEYS_ALIGNED) + keys.ends.tobytes() + keys.data.tobytes()
    content[:32] = hashlib.sha256(memoryview(content)[32:]).digest()
    return content


def unpacked(data: bytes | bytearray, shard: ShardInfo) -> ShardIndex:
    """Return the index in the content of an index file, whose columns lie in these bytes.

    Raises:
        ValueError: it is of another version, shard, or number of samples.
    """
    return _index(BytesIO(data), lambda start, stop: memoryview(data)[start:stop], shard)


def _index(file: BinaryIO, part: Callable[[int, int], memoryview | mmap.mmap], shard: ShardInfo) -> ShardIndex:
    """Return the index in a file, whose columns and keys lie in two parts of it."""
    file.seek(32)
    size = int.from_bytes(file.read(8), "little")
    header, end = json.loads(file.read(size)), 40 + size
    there = header["version"], header["shard"], header["samples"]
    if there != (VERSION, shard.sha256, shard.samples):
        raise ValueError(f"it is {there}, not {(VERSION, shard.sha256, shard.samples)}")
    samples, places = header["samples"], {}
    for name, wide in header["columns"].items():
        dtype, start = WIDE_COLUMN if wide else COLUMN, end + -end % ALIGNED
        places[name], end = (dtype, start), start + samples * dtype.itemsize
    keys_at = end + -end % KEYS_ALIGNED
    ends, stop = 8 * (samples + 1), keys_at + 8 * (samples + 1) + header["key_bytes"]
    columns, keys = part(0, end), part(keys_at, stop)
    return ShardIndex(
        Texts(np.frombuffer(keys, "<i8", samples + 1), np.frombuffer(keys, np.uint8, offset=ends)),
        {name: np.frombuffer(columns, dtype, samples, start) for name, (dtype, start) in places.items()},
    )


def opened(path: Path, shard: ShardInfo) -> ShardIndex | None:
    """Return the index in a file, mapped; None if there is none, or it is not that of the shard, or damaged.

    The file stays locked while the index is in use, so that it is not deleted to make room.

    Raises:
        BlockingIOError: a process is writing or deleting it.
        OSError: the disk fails.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink == 0:
            return None
        os.utime(file.fileno())
        try:
            # Read, not mapped: what is mapped counts as memory of the process.
            if file.read(32) != hashlib.file_digest(file, "sha256").digest():
                raise ValueError("its SHA-256 is not that of its content")
            return _index(file, lambda start, stop: _mapped(file, start, stop), shard)
        except ValueError as error:
            logger.warning("%s is damaged, on this node's disk, and is made again: %s", path, error)
            path.unlink(missing_ok=True)
            return None


def _mapped(file: BinaryIO, start: int, stop: int) -> mmap.mmap:
    """Return bytes of a file, of which only what is looked at, and what the kernel maps around it, is in memory."""
    return mmap.mmap(file.fileno(), stop - start, access=mmap.ACCESS_READ, offset=start)
