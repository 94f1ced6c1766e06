"""The shards of a dataset in its store: their bytes by range, checked against sidecars, and how many were asked for."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipelines.presentation.errors import PipelineError
from pipelines.shards.index import DatasetError, Member, ShardIndex, ShardInfo
from pipelines.storage import ShortObjectError, Storage, layout


class ShardCorruptError(PipelineError):
    """The bytes of a shard differ from what its dataset records, on two reads."""


class ShardShortError(ShardCorruptError):
    """A shard has fewer bytes than its dataset records."""


@dataclass
class FetchStats:
    """Counts of a process's reads from the store and from the node's cache.

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
        """Return the counts since the start of the process as metrics of a run."""
        reads = self.cached_reads + self.block_reads
        return {
            "worker/fetched_mib": self.bytes / 2**20,
            "worker/requests": float(self.requests),
            "worker/whole_shards": float(self.whole_shards),
            "worker/cache_hits": self.cached_reads / reads if reads else 0.0,
        }

    def add(self, **counts: int) -> None:
        """Add to the counts, from any thread."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


class ShardSource:
    """Asks the store for bytes of a dataset's shards, one request at a time; from any thread.

    Args:
        uri: folder of the dataset.
    """

    def __init__(self, uri: str, storage: Storage) -> None:
        self.uri, self.storage, self.stats = uri, storage, FetchStats()

    def metrics(self) -> dict[str, float]:
        """Return what was asked of the store and of the cache, and how it went, as metrics of a run."""
        throttling = self.storage.throttling()
        return {
            **self.stats.metrics(),
            "worker/requests_per_s": float(throttling.per_second),
            "worker/slow_downs": float(throttling.slow_downs),
            "worker/throttled_s": throttling.seconds,
        }

    def get(self, shard: ShardInfo, start: int, stop: int) -> memoryview:
        """Fetch bytes [start, stop) of a shard."""
        data = bytearray()
        self.fetch(shard, start, stop, data.extend)
        return memoryview(data)

    def fetch(self, shard: ShardInfo, start: int, stop: int, sink: Callable[[bytes], object]) -> None:
        """Pass bytes [start, stop) of a shard to `sink`, and count them.

        Raises:
            ShardShortError: the shard has fewer bytes.
            StorageError: they cannot be fetched.
        """
        if start == stop:
            return
        uri = shard.address(self.uri)
        try:
            requests = self.storage.fetch(uri, start, stop, sink)
        except ShortObjectError as error:
            folder = shard.folder(self.uri)
            sizes = {entry.uri: entry.size for entry in self.storage.list(folder)}
            raise ShardShortError(
                f"{uri} is cut short: it has {sizes.get(uri, 0):,} bytes, the index says {shard.bytes:,}: write it "
                f"again; `ddpm check {folder}` finds the rest of what is wrong, and with --quarantine it is left out"
            ) from error
        self.stats.add(requests=requests, bytes=stop - start)

    def read_index(self, shard: ShardInfo) -> ShardIndex:
        """Return the sidecar of a shard.

        Raises:
            ShardCorruptError: it is damaged, or does not list as many samples as dataset.json says.
            StorageError: the store cannot be reached, or has no such sidecar.
        """
        return self.parsed(shard, self.read_sidecar(shard))

    def read_sidecar(self, shard: ShardInfo) -> bytes:
        """Return the text of the sidecar of a shard.

        Raises:
            StorageError: the store cannot be reached, or has no such sidecar.
        """
        return self.storage.read(layout.index_name(shard.address(self.uri)))

    def parsed(self, shard: ShardInfo, text: bytes) -> ShardIndex:
        """Return the content of the sidecar of a shard.

        Raises:
            ShardCorruptError: it is damaged, or does not list as many samples as dataset.json says.
        """
        where = layout.index_name(shard.address(self.uri))
        try:
            index = ShardIndex.from_json(text)
        except DatasetError as error:
            raise ShardCorruptError(f"{where}: {error}") from error
        if len(index) != shard.samples:
            raise ShardCorruptError(f"{where} lists {len(index)} samples, dataset.json says {shard.samples}")
        return index

    def verified(self, shard: ShardInfo, members: Sequence[Member], found: Sequence[memoryview]) -> list[memoryview]:
        """Return the members' bytes; those whose CRC is not that of the sidecar are fetched again."""
        return [
            data if zlib.crc32(data) == m.crc32 else self._once_more(shard, m)
            for m, data in zip(members, found, strict=True)
        ]

    def _once_more(self, shard: ShardInfo, member: Member) -> memoryview:
        """Fetch a member whose CRC was wrong a second time.

        Raises:
            ShardCorruptError: it is wrong again.
        """
        start, stop = member.offset, member.offset + member.size
        data = self.get(shard, start, stop)
        if zlib.crc32(data) != member.crc32:
            raise ShardCorruptError(
                f"{shard.address(self.uri)}: bytes {start:,} to {stop:,} do not have the CRC that "
                f"{layout.index_name(shard.name)} records, on two reads: the shard is damaged: write it again, or "
                f"leave it out with `ddpm check {shard.folder(self.uri)} --quarantine`"
            )
        return data
