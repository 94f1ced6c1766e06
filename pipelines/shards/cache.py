"""A node's shard cache: complete, verified shards on local disk, and partial ones that are still being fetched."""

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
    """The bytes of a shard differ from what its dataset records, on two reads."""


@dataclass
class FetchStats:
    """Counts of a process's reads from the object store and from the node's cache.

    Attributes:
        requests: GETs of shards, including those that resumed after a broken connection.
        bytes: bytes of shards that were fetched.
        whole_shards: shards that this process put into the cache.
        cached_reads: members read from complete shards in the cache.
        block_reads: members read by ranged requests.
    """

    requests: int = 0
    bytes: int = 0
    whole_shards: int = 0
    cached_reads: int = 0
    block_reads: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def metrics(self) -> dict[str, float]:
        """Return the counts as metrics of a run, since the process began."""
        reads = self.cached_reads + self.block_reads
        return {
            "data/fetched_mib": self.bytes / 2**20,
            "data/requests": float(self.requests),
            "data/whole_shards": float(self.whole_shards),
            "data/cache_hits": self.cached_reads / reads if reads else 0.0,
        }

    def add(self, **counts: int) -> None:
        """Add to the counts, from any thread."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


class ShardCache:
    """Complete shards on local disk, named by their SHA-256 and shared by the processes of a node.

    A shard gets its name only when it is complete and verified. Above `limit_bytes` the least recently used shards are
    deleted; a process that has one mapped can still read it. Partial files of a killed process are overwritten.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, shard: ShardInfo) -> Path | None:
        """Return the path of a verified copy, and mark it as used; None where there is none."""
        path = self.path(shard)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def fetch(self, uri: str, shard: ShardInfo, storage: Storage, stats: FetchStats) -> Path:
        """Return the path of a verified copy; download it where it is missing, in one process of the node at a time.

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
        """Lock a shard for fetching; None where another process fetches it, or has just finished.

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
        """Return the path of a complete shard, whether it exists or not."""
        return self.folder / f"{shard.sha256}.tar"

    def evict(self, keep: Path) -> None:
        """Delete the least recently used shards above the size limit, except `keep`."""
        shards = []
        for path in self.folder.glob("*.tar"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # deleted by another process
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
        """Open the lock file of a shard."""
        return (self.folder / f"{shard.sha256}.lock").open("w")


class PartialShard:
    """A shard that is being fetched into the cache: blocks arrive by ranged reads in any order, each byte once.

    The file is allocated in full at the start, so that a full disk raises an error here and does not crash the process
    later. The process holds the shard's lock until the file is closed.

    Attributes:
        blocks: block number -> a future that is done when the block is in the file.
        done: a future of the path of the complete shard.
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
        """Return a future for each block, and the numbers of those that the caller has to fetch."""
        with self._guard:
            missing = [n for n in numbers if n not in self.blocks]
            self.blocks |= {n: Future() for n in missing}
            return [self.blocks[n] for n in numbers], missing

    def missing(self, limit: int) -> list[int]:
        """Return the next consecutive blocks that nobody fetches, at most `limit`; the caller has to fetch them."""
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
        """Write bytes of the shard at position `start`."""
        os.pwrite(self._file.fileno(), data, start)

    def arrived(self, run: Sequence[int]) -> None:
        """Mark blocks as present in the file."""
        for n in run:
            self.blocks[n].set_result(None)

    def lost(self, run: Sequence[int], error: Exception) -> None:
        """Raise an error in the readers that wait for these blocks, and let the next reader fetch them again."""
        with self._guard:
            futures = [self.blocks.pop(n) for n in run]
        for future in futures:
            future.set_exception(error)

    def forget(self, numbers: Sequence[int]) -> None:
        """Let blocks be fetched again whose bytes are wrong."""
        with self._guard:
            for n in numbers:
                if n in self.blocks and self.blocks[n].done():
                    del self.blocks[n]

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes of blocks that are present."""
        return os.pread(self._file.fileno(), stop - start, start)

    def fetch_again(self, uri: str, storage: Storage, stats: FetchStats) -> None:
        """Fetch the whole shard with one request."""
        at = 0

        def sink(part: bytes) -> None:
            nonlocal at
            self.put(at, part)
            at += len(part)

        if self.shard.bytes:
            requests = storage.fetch(join(uri, self.shard.name), 0, self.shard.bytes, sink)
            stats.add(requests=requests, bytes=self.shard.bytes)

    def admit(self) -> bool:
        """Move the file to its name in the cache if its SHA-256 is right, and return whether it is."""
        if self.sha256() != self.shard.sha256:
            return False
        final = self.cache.path(self.shard)
        self._file.flush()
        self.path.replace(final)
        self.cache.evict(keep=final)
        return True

    def sha256(self) -> str:
        """Return the SHA-256 of the file."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def corrupt(self, uri: str) -> ShardCorruptError:
        """Return the error for a shard that was wrong on a second download."""
        return ShardCorruptError(
            f"{join(uri, self.shard.name)} has SHA-256 {self.sha256()[:12]}, dataset.json says "
            f"{self.shard.sha256[:12]}, on two downloads: the shard is damaged: write it again, or leave it out with "
            "`ddpm check URI --quarantine`"
        )

    def finish(self, path: Path) -> None:
        """Resolve `done` with the path of the complete shard."""
        self.close()
        self.done.set_result(path)

    def give_up(self, error: Exception) -> None:
        """Resolve `done` with an error: the shard cannot be fetched, or the fetcher was closed."""
        with self._guard:
            if self.done.done():
                return
            self.done.set_exception(error)
        self.close()

    def numbers(self, member: Member) -> range:
        """Return the numbers of the blocks that hold a member."""
        return range(member.offset // self.block_bytes, -(-(member.offset + member.size) // self.block_bytes))

    def close(self) -> None:
        """Release the lock, and delete the partial file if the shard is not in the cache."""
        if self._file.closed:
            return
        self._file.close()
        if self.cache.find(self.shard) is None:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        if self._lock is not None:
            self._lock.close()
