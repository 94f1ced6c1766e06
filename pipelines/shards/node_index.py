"""The index of a node: sidecars as columns in files on its disk, of which its processes share one copy."""

from __future__ import annotations

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
from concurrent.futures import Future
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.cache import STALLED_S, ShardCache, held
from pipelines.shards.columns import COLUMN, WIDE_COLUMN, Texts
from pipelines.shards.index import ShardIndex, ShardInfo
from pipelines.shards.source import ShardSource

logger = logging.getLogger(__name__)

VERSION = 1
ALIGNED = 64
"""Bytes at whose multiples columns begin."""
OPEN = 256
"""Indexes that a process keeps open, more only for a batch that needs them: each is an open file."""
UNUSED = 64
"""Batches without a sample of a shard after which its index is closed: its window has ended."""
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
        self._lock, self._parsing = threading.Lock(), threading.Lock()
        self._opened: OrderedDict[str, tuple[Future[ShardIndex], int]] = OrderedDict()
        self._batches = 0

    def get(
        self,
        shards: Sequence[ShardInfo],
        source: ShardSource,
        submit: Callable[[Callable[[ShardInfo, ShardSource], ShardIndex], ShardInfo, ShardSource], Future[ShardIndex]],
    ) -> list[ShardIndex]:
        """Return the indexes of the shards that a batch has samples of.

        Args:
            source: reads sidecars from the store.
            submit: starts a call in a thread, so that several are read at a time.

        Raises:
            ShardCorruptError: a sidecar is damaged, or does not list as many samples as dataset.json says.
            StorageError: the store cannot be reached, or has no such sidecar.
        """
        futures = []
        with self._lock:
            self._batches += 1
            for shard in shards:
                opened = self._opened.pop(shard.sha256, None)
                future = submit(self.read, shard, source) if opened is None else opened[0]
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

    def _packed(self, shard: ShardInfo, source: ShardSource) -> bytes:
        """Return the content of an index file, read from the store."""
        text = source.read_sidecar(shard)
        with self._parsing:  # the objects of a JSON take several times its bytes, and threads gain no time
            return packed(source.parsed(shard, text), shard)


def packed(index: ShardIndex, shard: ShardInfo) -> bytes:
    """Return the content of an index file."""
    keys = Texts.of(index.keys)
    header = {
        "version": VERSION,
        "shard": shard.sha256,
        "samples": len(index),
        "columns": {name: column.dtype == WIDE_COLUMN for name, column in index.columns.items()},
        "key_bytes": len(keys.data),
    }
    parts = [json.dumps(header).encode(), *map(_bytes, index.columns.values()), _bytes(keys.ends), _bytes(keys.data)]
    start = 32 + 8
    content = [len(parts[0]).to_bytes(8, "little")]
    for part in parts:
        end = start + len(part)
        content += [part, bytes(-end % ALIGNED)]
        start = end + -end % ALIGNED
    digest = hashlib.sha256()
    for each in content:
        digest.update(each)
    return b"".join([digest.digest(), *content])


def unpacked(data: bytes | mmap.mmap, shard: ShardInfo) -> ShardIndex:
    """Return the index in an index file, whose columns lie in the file's bytes.

    Raises:
        ValueError: it is of another version, shard, or number of samples.
    """
    end = 40 + int.from_bytes(data[32:40], "little")
    header = json.loads(data[40:end])
    there = header["version"], header["shard"], header["samples"]
    if there != (VERSION, shard.sha256, shard.samples):
        raise ValueError(f"it is {there}, not {(VERSION, shard.sha256, shard.samples)}")

    def following(dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        nonlocal end
        start = end + -end % ALIGNED
        end = start + count * dtype.itemsize
        return np.frombuffer(data, dtype, count, start)

    samples = header["samples"]
    columns = {name: following(WIDE_COLUMN if wide else COLUMN, samples) for name, wide in header["columns"].items()}
    keys = Texts(following(np.dtype("<i8"), samples + 1), following(np.dtype("u1"), header["key_bytes"]))
    return ShardIndex(keys, columns)


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
            return unpacked(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), shard)
        except ValueError as error:
            logger.warning("%s is damaged, on this node's disk, and is made again: %s", path, error)
            path.unlink(missing_ok=True)
            return None


def _bytes(column: NDArray[Any]) -> bytes:
    return column.tobytes()
