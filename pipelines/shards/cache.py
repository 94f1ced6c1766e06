"""A node's shard cache: whole verified shards on local disk, and those that are still being put together."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pipelines.errors import PipelineError
from pipelines.shards.index import Member, ShardInfo
from pipelines.storage import Storage, StorageError, join


class ShardCorruptError(PipelineError):
    """A shard whose bytes are not those that its dataset records, twice in a row."""


@dataclass
class FetchStats:
    """What a process asked of the object store and of its node's cache.

    Attributes:
        requests: GETs of shards, those that went on after a broken connection included.
        bytes: of shards, fetched.
        whole_shards: shards brought into the cache by this process.
        cached_reads: members read from whole shards.
        block_reads: members read from ranged blocks.
    """

    requests: int = 0
    bytes: int = 0
    whole_shards: int = 0
    cached_reads: int = 0
    block_reads: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def metrics(self) -> dict[str, float]:
        """As a run's curves have them: of this process, since it began."""
        reads = self.cached_reads + self.block_reads
        return {
            "data/fetched_mib": self.bytes / 2**20,
            "data/requests": float(self.requests),
            "data/whole_shards": float(self.whole_shards),
            "data/cache_hits": self.cached_reads / reads if reads else 0.0,
        }

    def add(self, **counts: int) -> None:
        """Count, from any thread."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


class ShardCache:
    """Whole shards on local disk, by their SHA-256, shared by the processes of a node.

    A shard appears under its name only when it is complete and verified. Beyond `limit_bytes` the least recently
    opened are removed; whoever has one mapped keeps it. What a killed process leaves behind is overwritten by the next.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, shard: ShardInfo) -> Path | None:
        """The path of a verified copy where there is one, which then counts as used."""
        path = self.path(shard)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def fetch(self, uri: str, shard: ShardInfo, storage: Storage, stats: FetchStats) -> Path:
        """The path of a verified copy, brought in where it is missing; one process of the node at a time does so.

        Raises:
            ShardCorruptError: two downloads in a row had the wrong checksum.
            StorageError: the store cannot be reached, has no such shard, or the disk is full.
        """
        found = self.find(shard)
        if found is not None:
            return found
        with self._lock_file(shard) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            found = self.find(shard)
            if found is not None:
                return found
            with PartialShard(self, shard, block_bytes=max(shard.bytes, 1), lock=None) as partial:
                for _ in range(2):
                    partial.fetch_again(uri, storage, stats)
                    if partial.admit():
                        stats.add(whole_shards=1)
                        return self.path(shard)
                raise partial.corrupt(uri)

    def claim(self, shard: ShardInfo, block_bytes: int) -> PartialShard | None:
        """The right to put a shard together; None where another process has it, or has just finished.

        Raises:
            StorageError: the disk has no room for it.
        """
        lock = self._lock_file(shard)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.find(shard) is None:
                return PartialShard(self, shard, block_bytes, lock)
        except BlockingIOError:
            pass
        except BaseException:
            lock.close()
            raise
        lock.close()
        return None

    def path(self, shard: ShardInfo) -> Path:
        """Where a whole shard is, or will be."""
        return self.folder / f"{shard.sha256}.tar"

    def evict(self, keep: Path) -> None:
        """Remove the least recently used beyond the limit."""
        shards = []
        for path in self.folder.glob("*.tar"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process was faster
                continue
            shards.append((stat.st_mtime, stat.st_size, path))
        excess = sum(size for _, size, _ in shards) - self.limit_bytes
        for _, size, path in sorted(shards):
            if excess <= 0:
                break
            if path != keep:
                excess -= size
                path.unlink(missing_ok=True)

    def _lock_file(self, shard: ShardInfo) -> IO[str]:
        return (self.folder / f"{shard.sha256}.lock").open("w")


class PartialShard:
    """A shard on its way into the cache: a file with holes that ranged reads fill in any order, each byte fetched once.

    It has room on the disk for all of it from the start, so that a full disk is an error here and not a crash later.
    Its process holds the shard's lock until it is closed.

    Attributes:
        blocks: number -> a future that is done when the block is in the file.
        done: the path of the whole shard, or what went wrong.
    """

    def __init__(self, cache: ShardCache, shard: ShardInfo, block_bytes: int, lock: IO[str] | None) -> None:
        self.cache, self.shard, self.block_bytes = cache, shard, block_bytes
        self.count = -(-shard.bytes // block_bytes)
        self.blocks: dict[int, Future[None]] = {}
        self.done: Future[Path] = Future()
        self.path = cache.path(shard).with_suffix(".part")
        self._lock, self._guard = lock, threading.Lock()
        self._file = self.path.open("w+b")
        try:
            if shard.bytes:
                os.posix_fallocate(self._file.fileno(), 0, shard.bytes)
        except OSError as error:
            self.close()
            raise StorageError(
                f"no room for {shard.bytes:,} bytes of {shard.name} in the shard cache {cache.folder} "
                f"({error.strerror}): free some, or set data.cache_dir to another disk or data.cache_gib to less"
            ) from error

    def __enter__(self) -> PartialShard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def promise(self, numbers: Sequence[int]) -> tuple[list[Future[None]], list[int]]:
        """A future for each block, and those that nobody has asked for yet: the caller has to fetch them."""
        with self._guard:
            fresh = [n for n in numbers if n not in self.blocks]
            self.blocks |= {n: Future() for n in fresh}
            return [self.blocks[n] for n in numbers], fresh

    def missing(self, limit: int) -> list[int]:
        """The next run of at most `limit` blocks that nobody has asked for; the caller has to fetch them."""
        with self._guard:
            first = next((n for n in range(self.count) if n not in self.blocks), None)
            if first is None:
                return []
            run = []
            for n in range(first, min(first + limit, self.count)):
                if n in self.blocks:
                    break
                self.blocks[n] = Future()
                run.append(n)
            return run

    def put(self, start: int, data: bytes) -> None:
        """Bytes of the shard from `start` on."""
        os.pwrite(self._file.fileno(), data, start)

    def arrived(self, run: Sequence[int]) -> None:
        """The bytes of these blocks are in the file."""
        for n in run:
            self.blocks[n].set_result(None)

    def lost(self, run: Sequence[int], error: Exception) -> None:
        """These blocks could not be fetched: whoever waits learns why, whoever asks next tries again."""
        with self._guard:
            futures = [self.blocks.pop(n) for n in run]
        for future in futures:
            future.set_exception(error)

    def forget(self, numbers: Sequence[int]) -> None:
        """Blocks that are there, but wrong: to be fetched again."""
        with self._guard:
            for n in numbers:
                if n in self.blocks and self.blocks[n].done():
                    del self.blocks[n]

    def read(self, start: int, stop: int) -> bytes:
        """Bytes that have arrived."""
        return os.pread(self._file.fileno(), stop - start, start)

    def fetch_again(self, uri: str, storage: Storage, stats: FetchStats) -> None:
        """Fetch every byte in one go."""
        at = 0

        def sink(part: bytes) -> None:
            nonlocal at
            self.put(at, part)
            at += len(part)

        if self.shard.bytes:
            requests = storage.fetch(join(uri, self.shard.name), 0, self.shard.bytes, sink)
            stats.add(requests=requests, bytes=self.shard.bytes)

    def admit(self) -> bool:
        """Give the file its name in the cache if it is the shard that it should be; whether it is."""
        if self.sha256() != self.shard.sha256:
            return False
        final = self.cache.path(self.shard)
        self._file.flush()
        self.path.replace(final)
        self.cache.evict(keep=final)
        return True

    def sha256(self) -> str:
        """Of all bytes."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def corrupt(self, uri: str) -> ShardCorruptError:
        """What to raise when a second download was wrong too."""
        return ShardCorruptError(
            f"{join(uri, self.shard.name)} has SHA-256 {self.sha256()[:12]}, dataset.json says "
            f"{self.shard.sha256[:12]}, on two downloads: the shard is damaged: write it again, or leave it out with "
            "`ddpm check URI --quarantine`"
        )

    def finish(self, path: Path) -> None:
        """Tell those who wait that the whole shard is in the cache."""
        self.close()
        self.done.set_result(path)

    def give_up(self, error: Exception) -> None:
        """Tell those who wait that the shard cannot be had, or is not wanted any more."""
        with self._guard:
            if self.done.done():
                return
            self.done.set_exception(error)
        self.close()

    def numbers(self, member: Member) -> range:
        """The blocks that hold a member."""
        return range(member.offset // self.block_bytes, -(-(member.offset + member.size) // self.block_bytes))

    def close(self) -> None:
        """Give the shard up to other processes; what is not in the cache by now is removed."""
        if self._file.closed:
            return
        self._file.close()
        if self.cache.find(self.shard) is None:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        if self._lock is not None:
            self._lock.close()
