"""The shard cache of a node: complete, verified shards on local disk, and partial ones that are being fetched."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from pipelines.shards.index import Member, ShardInfo
from pipelines.shards.source import ShardCorruptError
from pipelines.storage import StorageError

logger = logging.getLogger(__name__)
STALLED_S = 60.0
"""Seconds without progress of another process after which it is no longer waited for: it may be stopped."""


class ShardCache:
    """Complete shards and their indexes on local disk, named by the shards' SHA-256 and shared by a node's processes.

    The folder never takes more than `limit_bytes`: before something is added, the least recently used shards and
    indexes are deleted to make room. A process has a shard open only while it reads from it, and what is in use is not
    deleted, so no deleted file keeps taking space. Locks are `flock`s of the files themselves, which end with their
    process: a partial file that nobody holds was left by a killed process and is deleted.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._guard, self._added, self._may_add = threading.Lock(), 0, 0
        self._known: dict[Path, int] = {}  # sizes of complete shards and indexes, which do not change
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._alone():
                for path in folder.glob("*.lock"):  # of releases before this one
                    path.unlink(missing_ok=True)
                self._remove_leftovers()
                self._make_room(0)
        except StorageError as error:
            logger.warning("%s", error)  # the next claim of a shard tries again, and works without the cache

    def find(self, shard: ShardInfo) -> Path | None:
        """Return the path of a verified copy and mark it as used; None if there is none or the disk fails."""
        path = self.path(shard)
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def read(self, shard: ShardInfo, members: Sequence[Member]) -> list[memoryview] | None:
        """Return the bytes of members from a verified copy and mark it as used; None if there is no readable copy.

        A copy whose bytes no longer match the index, after a fault of the disk, is deleted.
        """
        try:
            with self.path(shard).open("rb", buffering=0) as file:
                number = file.fileno()
                fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if os.fstat(number).st_nlink == 0:
                    return None
                os.utime(number)
                found = [memoryview(os.pread(number, m.size, m.offset)) for m in members]
        except OSError:  # it is not there, is being deleted, or the disk fails
            return None
        if any(zlib.crc32(data) != m.crc32 for m, data in zip(members, found, strict=True)):
            logger.warning("%s is damaged, on this node's disk: it is fetched again", self.path(shard))
            with contextlib.suppress(OSError):
                self.path(shard).unlink()
            return None
        return found

    def claim(self, shard: ShardInfo, block_bytes: int) -> PartialShard | None:
        """Start fetching a shard; return None if another process fetches it or it is complete.

        Raises:
            StorageError: there is no room for it, within the limit or on the disk.
        """
        path = self.partial_path(shard)
        with self._alone():
            file = held(path)
            if file is None:
                return None
            try:
                if self.find(shard) is not None:
                    path.unlink()
                    file.close()
                    return None
                os.ftruncate(file.fileno(), 0)  # a killed process may have left it
                if self._make_room(shard.bytes) < shard.bytes:
                    raise StorageError(
                        f"no room for {shard.bytes:,} bytes of {shard.name} in the shard cache {self.folder}: its "
                        f"{self.limit_bytes:,} bytes are taken by shards that are being fetched or read; raise "
                        "data.cache_gib, or lower data.lanes or data.window"
                    )
                with self._no_space(shard):
                    os.ftruncate(file.fileno(), shard.bytes)  # it counts from now on
            except BaseException:
                path.unlink(missing_ok=True)
                file.close()
                raise
        partial = PartialShard(self, shard, block_bytes, file)
        try:
            with self._no_space(shard):
                partial.allocate()
        except BaseException:
            partial.close()
            raise
        return partial

    def is_claimed(self, shard: ShardInfo) -> bool:
        """Return whether a process fetches a shard."""
        return self.partial_path(shard).exists()

    def last_write(self, shard: ShardInfo) -> int | None:
        """Return the time of the last write of the process that fetches a shard, in nanoseconds; None if none does."""
        try:
            return self.partial_path(shard).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def has_room(self, size: int) -> bool:
        """Return whether an index may be added, after the least recently used files have been deleted for it.

        The folder is looked through only once in so many bytes: a process may add a 64th of what was free to what it
        has seen, so that processes that add at the same time stay within the limit.
        """
        with self._guard:
            if self._added + size > self._may_add:
                try:
                    with self._alone():
                        free = self._make_room(size + self.limit_bytes // 64)
                except (StorageError, OSError):
                    return False
                if free < size:
                    return False
                self._added, self._may_add = 0, max(free // 64, size)
            self._added += size
            return True

    def index_path(self, shard: ShardInfo) -> Path:
        """Return the path of the index of a shard, whether it exists or not."""
        return self.folder / f"{shard.sha256}.index"

    def path(self, shard: ShardInfo) -> Path:
        """Return the path of a complete shard, whether it exists or not."""
        return self.folder / f"{shard.sha256}.tar"

    def partial_path(self, shard: ShardInfo) -> Path:
        """Return the path of a shard while it is fetched."""
        return self.folder / f"{shard.sha256}.part"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock for making room and for starting to fetch, which takes a moment.

        Raises:
            StorageError: another process has held the lock for `STALLED_S` seconds.
        """
        with (self.folder / "room").open("a") as file:
            began = time.monotonic()
            while not _try_lock(file):
                if time.monotonic() - began > STALLED_S:
                    raise StorageError(
                        f"another process has held {file.name} for {STALLED_S:.0f} s and makes no room in this shard "
                        "cache: it may be stopped; end it, or set data.cache_dir to another folder"
                    )
                time.sleep(0.005)
            yield

    @contextmanager
    def _no_space(self, shard: ShardInfo) -> Iterator[None]:
        """Turn the error of a full disk into one that says what to do."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"no room for {shard.bytes:,} bytes of {shard.name} in the shard cache {self.folder} "
                f"({error.strerror}): free some, or set data.cache_dir to another disk or data.cache_gib to less"
            ) from error

    def _make_room(self, needed: int) -> int:
        """Delete the least recently used shards and indexes until so many bytes more are within the limit, and return
        how many are free then; 0 where that cannot be reached, and nothing is deleted."""
        sizes = _sizes(self.folder, (".part",), {})
        if sum(sizes.values()) + needed > self.limit_bytes:
            self._remove_leftovers()
            sizes = _sizes(self.folder, (".part",), {})
        if sum(sizes.values()) + needed > self.limit_bytes:
            return 0
        self._known = _sizes(self.folder, (".tar", ".index"), self._known)
        # A shard that has become complete between the two looks is in both.
        fetched = sum(size for path, size in sizes.items() if path.with_suffix(".tar") not in self._known)
        excess = fetched + sum(self._known.values()) + needed - self.limit_bytes
        for path in sorted(self._known, key=_last_use) if excess > 0 else ():
            if excess > 0 and (file := held(path)) is not None:  # else it is being read
                path.unlink()
                file.close()
                excess -= self._known[path]
        return needed - excess

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob("*.part"):
            file = held(path)
            if file is not None:
                path.unlink()
                file.close()


def _sizes(folder: Path, endings: tuple[str, ...], known: Mapping[Path, int]) -> dict[Path, int]:
    """Return the sizes in bytes of the files with these endings; those that are known are not asked of the disk."""
    sizes = {}
    for path in (folder / name for name in os.listdir(folder) if name.endswith(endings)):
        with contextlib.suppress(FileNotFoundError):  # renamed or deleted by another process
            sizes[path] = known[path] if path in known else path.stat().st_size
    return sizes


def _last_use(path: Path) -> int:
    """Return the time of the last use of a file in ns; 0 if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0


def _try_lock(file: IO[Any]) -> bool:
    """Try to lock an open file; return whether this process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def held(path: Path) -> FileIO | None:
    """Open or create a file and lock it until it is closed; return None if another process has locked it."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    try:
        if _try_lock(file) and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except FileNotFoundError:
        pass  # another process has just renamed or deleted it
    except BaseException:
        file.close()
        raise
    file.close()
    return None


class PartialShard:
    """A shard that is being fetched into the cache: blocks arrive by ranged reads in any order, each byte once.

    The file is allocated in full at the start, so that a full disk raises an error here and does not crash the process
    later. The process holds the file's lock until it is closed.

    Args:
        file: the file of the shard's size at the cache's `partial_path`, held.

    Attributes:
        blocks: block number -> a future that is done when the block is in the file.
        done: a future of the path of the complete shard.
    """

    def __init__(self, cache: ShardCache, shard: ShardInfo, block_bytes: int, file: FileIO) -> None:
        self.cache, self.shard, self.block_bytes = cache, shard, block_bytes
        self.count = -(-shard.bytes // block_bytes)
        self.blocks: dict[int, Future[None]] = {}
        self.done: Future[Path] = Future()
        self._file, self._admitted = file, False
        self._guard, self._writing = threading.Lock(), threading.Lock()

    def allocate(self) -> None:
        """Allocate the whole file on the disk.

        Raises:
            OSError: there is not enough space.
        """
        if self.shard.bytes:
            os.posix_fallocate(self._file.fileno(), 0, self.shard.bytes)

    def promise(self, numbers: Sequence[int], gap: int) -> tuple[list[Future[None]], list[int]]:
        """Return a future for each block, and the numbers of the blocks that the caller has to fetch.

        Args:
            numbers: of blocks, ascending.
            gap: at most so many blocks between two of them are fetched with them, if nobody fetches any of these: all
                are needed before long, and make one request of two.
        """
        with self._guard:
            missing = [n for n in numbers if n not in self.blocks]
            between = [range(a + 1, b) for a, b in pairwise(missing) if b - a - 1 <= gap]
            joined = [n for blocks in between if not any(n in self.blocks for n in blocks) for n in blocks]
            missing = sorted([*missing, *joined])
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
        with self._writing:  # a file that is closed meanwhile would leave its number to another one
            os.pwrite(self._file.fileno(), data, start)

    def arrived(self, run: Sequence[int]) -> None:
        """Mark blocks as present in the file."""
        for n in run:
            self.blocks[n].set_result(None)

    def lost(self, run: Sequence[int], error: Exception) -> None:
        """Pass an error to the readers that wait for these blocks, and let the next reader fetch them again."""
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

    def admit(self) -> bool:
        """Move the file to its name in the cache if its SHA-256 is right, and return whether it is."""
        if self.sha256() != self.shard.sha256:
            return False
        os.fsync(self._file.fileno())  # a machine that loses power must not be left with the name and without the bytes
        self.cache.partial_path(self.shard).replace(self.cache.path(self.shard))
        self._admitted = True
        fcntl.flock(self._file, fcntl.LOCK_UN)  # for the readers; not sooner, lest another process take it for its own
        return True

    def sha256(self) -> str:
        """Return the SHA-256 of the file."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def corrupt(self, uri: str) -> ShardCorruptError:
        """Return the error for a shard that was wrong on a second download."""
        return ShardCorruptError(
            f"{self.shard.address(uri)} has SHA-256 {self.sha256()[:12]}, dataset.json says "
            f"{self.shard.sha256[:12]}, on two downloads: the shard is damaged: write it again, or leave it out with "
            "`ddpm check URI --quarantine`"
        )

    def finish(self, path: Path) -> None:
        """Resolve `done` with the path of the complete shard."""
        self.close()
        self.done.set_result(path)

    def give_up(self, error: Exception) -> None:
        """Resolve `done` with an error: the shard cannot be fetched, or the fetcher was closed."""
        self.close()
        with self._guard:
            if not self.done.done():
                self.done.set_exception(error)

    def numbers(self, member: Member) -> range:
        """Return the numbers of the blocks that hold a member."""
        return range(member.offset // self.block_bytes, -(-(member.offset + member.size) // self.block_bytes))

    def close(self) -> None:
        """Release the file, and delete it if the shard is not complete."""
        with self._writing:
            if self._file.closed:
                return
            # Readers that wait for the shard must get the error, even if the disk fails.
            with contextlib.suppress(OSError), self._file:
                if not self._admitted:
                    self.cache.partial_path(self.shard).unlink()
