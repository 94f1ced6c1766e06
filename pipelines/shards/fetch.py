"""The bytes of shards on a node: ranged blocks until a shard is in the node's cache, a memory map from then on."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipelines.shards.index import Dataset, DatasetError, ShardIndex, ShardInfo, sidecar
from pipelines.storage import Storage, join

Span = tuple[int, int]
"""Bytes [start, stop) of a shard."""


class ShardCorruptError(RuntimeError):
    """A shard whose bytes are not those that dataset.json records, twice in a row."""


@dataclass
class FetchStats:
    """What a process asked of the object store and of its node's cache.

    Attributes:
        requests: GETs, those that went on after a broken connection included.
        bytes: fetched.
        whole_shards: shards brought into the cache by this process.
        cached_reads: samples read from a memory map.
        block_reads: samples read from ranged blocks.
    """

    requests: int = 0
    bytes: int = 0
    whole_shards: int = 0
    cached_reads: int = 0
    block_reads: int = 0


class ShardCache:
    """Whole shards on local disk, by their SHA-256, shared by the processes of a node.

    A shard appears under its name only when it is complete and verified. Beyond `limit_bytes` the least recently
    opened are removed; whoever has one mapped keeps it. What a killed process leaves behind is taken up or overwritten
    by the next.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, shard: ShardInfo) -> Path | None:
        """The path of a verified copy where there is one, which then counts as used."""
        path = self.folder / f"{shard.sha256}.tar"
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def fetch(self, uri: str, shard: ShardInfo, storage: Storage, stats: FetchStats) -> Path:
        """The path of a verified copy, brought in where it is missing; one process of the node at a time does so.

        Raises:
            ShardCorruptError: two downloads in a row had the wrong checksum.
            StorageError: the store cannot be reached, or has no such shard.
        """
        found = self.find(shard)
        if found is not None:
            return found
        with self._locked(shard.sha256):
            path = self.find(shard)
            if path is None:
                path = self._download(join(uri, shard.name), shard, storage, stats)
                self._evict(keep=path)
        return path

    def _download(self, uri: str, shard: ShardInfo, storage: Storage, stats: FetchStats) -> Path:
        path = self.folder / f"{shard.sha256}.tar"
        temporary = path.with_suffix(".part")  # under the shard's lock: no other process writes it
        for _ in range(2):
            digest = hashlib.sha256()
            with temporary.open("wb") as file:

                def sink(part: bytes, file=file, digest=digest) -> None:  # type: ignore[no-untyped-def]
                    file.write(part)
                    digest.update(part)

                stats.requests += storage.fetch(uri, 0, shard.bytes, sink)
            stats.bytes += shard.bytes
            if digest.hexdigest() == shard.sha256:
                temporary.replace(path)
                stats.whole_shards += 1
                return path
        temporary.unlink(missing_ok=True)
        raise ShardCorruptError(
            f"{uri} has SHA-256 {digest.hexdigest()[:12]}, dataset.json says {shard.sha256[:12]}, on two downloads: "
            "the shard is damaged: write it again, or leave it out with `ddpm check URI --quarantine`"
        )

    def _evict(self, keep: Path) -> None:
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

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class ShardFetcher:
    """Reads spans of shards, from any thread.

    A shard that is in the node's cache is read through a memory map. Of any other the blocks that hold the wanted spans
    are fetched by ranged GETs, neighbours in one request, so that a stream starts and resumes at any place without
    waiting for whole shards; meanwhile the shard follows into the cache in the background.

    Args:
        uri: of the dataset.
        cache: the node's; None keeps to ranged blocks, which is right where the shards in use do not fit.
        block_bytes: size of a block.
        memory_bytes: of blocks kept, least recently used first out.
        requests: ranged GETs at a time.
        downloads: whole shards at a time.
    """

    def __init__(
        self,
        uri: str,
        storage: Storage,
        cache: ShardCache | None,
        *,
        block_bytes: int = 1 << 20,
        memory_bytes: int = 256 << 20,
        requests: int = 16,
        downloads: int = 2,
    ) -> None:
        self.uri, self.storage, self.cache = uri, storage, cache
        self.block_bytes = block_bytes
        self.max_blocks = max(memory_bytes // block_bytes, 1)
        self.stats = FetchStats()
        self._ranged = ThreadPoolExecutor(requests, thread_name_prefix="ranged")
        self._whole = ThreadPoolExecutor(downloads, thread_name_prefix="whole")
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._downloads: dict[str, Future[Path]] = {}
        self._map = lru_cache(maxsize=256)(self._open)
        self.index = lru_cache(maxsize=1024)(self._read_index)

    @classmethod
    def opened(
        cls, dataset: Dataset, split: str, storage: Storage, cache_dir: Path, cache_bytes: int, lanes: int, window: int
    ) -> ShardFetcher:
        """For a split read in so many lanes and windows: without the cache where what is in use would not fit it."""
        whole = fits(dataset.shards(split), lanes, window, cache_bytes)
        return cls(dataset.uri, storage, ShardCache(cache_dir, cache_bytes) if whole else None)

    def read(self, shard: ShardInfo, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span.

        Raises:
            ShardCorruptError: the shard failed its checksum twice.
            StorageError: the store cannot be reached, has no such shard, or a shorter one.
        """
        mapped = self._mapped(shard)
        if mapped is not None:
            self.stats.cached_reads += len(spans)
            return [mapped[start:stop] for start, stop in spans]
        self.stats.block_reads += len(spans)
        size = self.block_bytes
        numbers = sorted({n for start, stop in spans for n in range(start // size, -(-stop // size))})
        blocks = dict(zip(numbers, self._request(shard, numbers), strict=True))
        out = []
        for start, stop in spans:
            parts = [blocks[n].result() for n in range(start // size, -(-stop // size))]
            offset = start // size * size
            out.append(b"".join(parts)[start - offset : stop - offset])
        return out

    def require(self, shards: Sequence[ShardInfo]) -> None:
        """Have whole shards in the cache, verified, before anything is read of them; nothing happens without a cache.

        Raises:
            ShardCorruptError: one failed its checksum twice.
            StorageError: the store cannot be reached, or has no such shard.
        """
        if self.cache is not None:
            fetch = self.cache.fetch
            for outcome in [self._whole.submit(fetch, self.uri, s, self.storage, self.stats) for s in shards]:
                outcome.result()

    def close(self) -> None:
        """Stop what is under way in the background."""
        self._ranged.shutdown(wait=False, cancel_futures=True)
        self._whole.shutdown(wait=False, cancel_futures=True)

    def _mapped(self, shard: ShardInfo) -> mmap.mmap | None:
        if self.cache is None:
            return None
        path = self.cache.find(shard)
        if path is not None:
            return self._map(path)
        with self._lock:
            under_way = self._downloads.get(shard.sha256)
            if under_way is None:
                under_way = self._whole.submit(self.cache.fetch, self.uri, shard, self.storage, self.stats)
                self._downloads[shard.sha256] = under_way
        if not under_way.done():
            return None
        with self._lock:  # evicted since, or failed: the next read tries again
            self._downloads.pop(shard.sha256, None)
        return self._map(under_way.result())

    def _request(self, shard: ShardInfo, numbers: Sequence[int]) -> list[Future[bytes]]:
        """The blocks, some perhaps still on their way; runs of missing ones are one request."""
        runs: list[list[int]] = []
        futures: list[Future[bytes]] = []
        with self._lock:
            for n in numbers:
                key = (shard.sha256, n)
                if key not in self._blocks:
                    self._blocks[key] = Future()
                    if runs and runs[-1][-1] == n - 1:
                        runs[-1].append(n)
                    else:
                        runs.append([n])
                self._blocks.move_to_end(key)
                futures.append(self._blocks[key])
            while len(self._blocks) > self.max_blocks:
                self._blocks.popitem(last=False)
            promised = dict(zip(numbers, futures, strict=True))
        for run in runs:
            self._ranged.submit(self._fetch_run, shard, run, [promised[n] for n in run])
        return futures

    def _fetch_run(self, shard: ShardInfo, run: list[int], promised: list[Future[bytes]]) -> None:
        start, stop = run[0] * self.block_bytes, min((run[-1] + 1) * self.block_bytes, shard.bytes)
        data = bytearray()
        try:
            requests = self.storage.fetch(join(self.uri, shard.name), start, stop, data.extend)
        except Exception as error:  # noqa: BLE001  whatever it is, readers wait for it
            with self._lock:
                for n in run:  # not to be remembered: the next read asks again
                    self._blocks.pop((shard.sha256, n), None)
            for future in promised:
                future.set_exception(error)
            return
        with self._lock:
            self.stats.requests += requests
            self.stats.bytes += stop - start
        for i, future in enumerate(promised):
            future.set_result(bytes(data[i * self.block_bytes : (i + 1) * self.block_bytes]))

    def _open(self, path: Path) -> mmap.mmap:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _read_index(self, shard: ShardInfo) -> ShardIndex:
        where = join(self.uri, sidecar(shard.name))
        try:
            index = ShardIndex.from_json(self.storage.read(where))
        except DatasetError as error:
            raise ShardCorruptError(f"{where}: {error}") from error
        if len(index.keys) != shard.samples:
            raise ShardCorruptError(f"{where} lists {len(index.keys)} samples, dataset.json says {shard.samples}")
        return index


def fits(shards: Sequence[ShardInfo], lanes: int, window: int, limit_bytes: int) -> bool:
    """Whether the shards that are in use at a time fit a node's cache: lanes x window of mean size, twice.

    Twice, because the next windows come in while the last are still read. Where they do not, every shard would be
    evicted before it is read to its end and fetched again: ranged reading then costs less.
    """
    mean = sum(s.bytes for s in shards) / max(len(shards), 1)
    return min(2 * lanes * window, len(shards)) * mean <= limit_bytes
