"""Fetching of members' bytes: from the node's cache if the shard is complete, else by ranged requests."""

from __future__ import annotations

import logging
import threading
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.shards.cache import STALLED_S, PartialShard, ShardCache
from pipelines.shards.index import Member, ShardIndex, ShardInfo
from pipelines.shards.node_index import NodeIndex
from pipelines.shards.source import ShardCorruptError, ShardSource
from pipelines.shards.working_set import WorkingSet
from pipelines.storage import Storage, StorageError

logger = logging.getLogger(__name__)

Wanted = Sequence[tuple[ShardInfo, Sequence[Member]]]
Span = tuple[int, int]
"""Positions [start, stop) of bytes of a shard."""
REQUESTS = 16
"""Ranged GETs at a time."""
DOWNLOADS = 2
"""Shards that are completed in the background at a time."""
FILL_BYTES = 8 << 20
"""Bytes of one background request that completes a shard in the cache."""
YIELD_S = 0.5
"""Seconds that a background request, or the check of a shard that is complete, waits for readers to have theirs."""
FULL_S = 1.0
"""Seconds for which the cache is not used again after it had no room for a shard, or failed."""
POLL_S = 0.02
"""Seconds between checks of what another process fetches."""
JOIN_BYTES = 1 << 20
"""Bytes of a shard on its way into the cache that are fetched before their turn, to make one request of two."""
GAP_BYTES = 64 << 10
"""Unneeded bytes between two members that cost less to fetch than a second request."""


class ShardFetcher:
    """Reads members of shards, from any thread.

    Shards in the node's cache are read from there. From other shards the needed bytes are fetched by ranged
    GETs, with neighbouring members in one request, so that a stream starts and resumes anywhere without waiting for
    whole shards. The fetched blocks are kept in a partial file, which background requests complete; no byte is fetched
    twice. Bytes of a shard that is not verified yet are checked against the CRC of their member.

    Args:
        uri: folder of the dataset.
        cache: the node's cache; None for ranged requests only, where it is too small (see `WorkingSet`).
        index: the node's index; None for that in `cache`.
        block_bytes: size of the blocks of a partial shard.
    """

    def __init__(
        self,
        uri: str,
        storage: Storage,
        cache: ShardCache | None,
        *,
        index: NodeIndex | None = None,
        block_bytes: int = 256 << 10,
    ) -> None:
        self.source, self.cache = ShardSource(uri, storage), cache
        self.index = NodeIndex(cache) if index is None else index
        self.block_bytes = block_bytes
        self.stats = self.source.stats
        self._ranged = ThreadPoolExecutor(REQUESTS, thread_name_prefix="ranged")
        self._whole = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="whole")
        self._closed = threading.Event()
        self._reads = 0  # number of reads that wait for bytes
        self._idle = threading.Condition()
        self._warned = False
        self._lock = threading.Lock()
        self._partial: dict[str, PartialShard] = {}
        self._full_until = 0.0

    @classmethod
    def opened(
        cls, uri: str, storage: Storage, cache_dir: Path, cache_bytes: int, working_set: WorkingSet
    ) -> ShardFetcher:
        """Return a fetcher of a dataset's shards; without the cache if those that are read at a time do not fit."""
        used = working_set.fits(cache_bytes)
        cache: ShardCache | None = None
        try:
            cache = ShardCache(cache_dir, cache_bytes)
        except OSError as error:  # ranged requests need no disk
            logger.warning("shards are read by ranges, for data.cache_dir = %s cannot be used: %s", cache_dir, error)
        return cls(uri, storage, cache if used else None, index=NodeIndex(cache))

    def read(self, wanted: Wanted) -> list[list[memoryview]]:
        """Return the bytes of members, shard by shard; all requests are sent before the first one is awaited.

        Raises:
            ShardCorruptError: a member or its shard was wrong on two reads, or the shard is cut short.
            StorageError: the store cannot be reached, or has no such shard.
        """
        try:
            with self._first():
                return [finish() for finish in [self._begin(shard, members) for shard, members in wanted]]
        except ShardCorruptError:
            self.index.forget([shard for shard, _ in wanted])
            raise

    def indexes(self, shards: Sequence[ShardInfo]) -> list[ShardIndex]:
        """Return the sidecars of shards, fetched concurrently.

        Raises:
            ShardCorruptError: one is damaged, or does not list as many samples as dataset.json says.
            StorageError: the store cannot be reached, or has no such sidecar.
        """
        return self.index.get(shards, self.source)

    def require(self, shards: Sequence[ShardInfo]) -> None:
        """Wait until shards are complete and verified in the cache, unless it fails, or cannot hold them together.

        Raises:
            ShardCorruptError: one failed its checksum twice, or is cut short.
            StorageError: the store cannot be reached, or has no such shard.
        """
        if self.cache is None or sum(shard.bytes for shard in shards) > self.cache.limit_bytes:
            return
        begun = [self._put_together(shard) for shard in shards if self.cache.find(shard) is None]
        for partial in begun:
            if partial is not None:
                _await(partial)  # a shard has its name a moment before its fetcher lets go of it
        for shard in shards:
            written, since = None, time.monotonic()
            while self.cache.find(shard) is None:
                partial = self._put_together(shard)
                if partial is not None:
                    _await(partial)
                elif self._is_full() or self._closed.is_set() or not self.cache.is_claimed(shard):
                    break  # it is read by ranges
                elif (now := self.cache.last_write(shard)) != written:  # another process fetches it
                    written, since = now, time.monotonic()
                elif time.monotonic() - since > STALLED_S:
                    logger.warning(
                        "the process that fetches %s into %s has written nothing for %.0f s: it is read without it",
                        *(shard.name, self.cache.folder, STALLED_S),
                    )
                    break
                else:
                    time.sleep(POLL_S)

    def close(self) -> None:
        """Stop all requests."""
        self._closed.set()
        self.index.close()
        for pool in (self._ranged, self._whole):
            pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for partial in self._partial.values():
                partial.give_up(StorageError(f"{self.source.uri} was closed while {partial.shard.name} was being read"))
            self._partial.clear()

    # --- whole shards ----------------------------------------------------------------------------------------

    def _put_together(self, shard: ShardInfo) -> PartialShard | None:
        """Return the partial shard of this process; None if another process fetches it or the cache cannot take it.

        If there is none, it is created, and completed in the background.
        """
        assert self.cache is not None
        with self._lock:
            partial = self._partial.get(shard.sha256)
            if partial is not None and partial.done.done():
                del self._partial[shard.sha256]
                try:
                    partial.done.result()  # raises why it could not be fetched; the next reader tries again
                except OSError as error:
                    self._do_without(error)
                partial = None
            if partial is None and not self._closed.is_set() and not self._is_full():
                try:
                    partial = self.cache.claim(shard, self.block_bytes)
                except (StorageError, OSError) as error:
                    self._do_without(error)
                if partial is not None:
                    self._partial[shard.sha256] = partial
                    self._whole.submit(self._fill, partial)
            return partial

    def _do_without(self, error: Exception) -> None:
        """Do not use the cache for a while: reading works without it, only slower."""
        self._full_until = time.monotonic() + FULL_S
        if not self._warned:
            logger.warning("shards are read by ranges: %s", error)
        self._warned = True

    def _is_full(self) -> bool:
        """Return whether the cache is not used at present."""
        return time.monotonic() <= self._full_until

    def _fill(self, partial: PartialShard) -> None:
        """Fetch the blocks that no reader fetches, then verify the shard."""
        try:
            while not self._closed.is_set():
                self._let_readers_pass()
                run = partial.missing(max(FILL_BYTES // self.block_bytes, 1))
                if run:
                    self._fetch_run(partial, run)
                    continue
                for future in list(partial.blocks.values()):
                    with suppress(Exception):  # the reader that fetched it has the error; the block is fetched here
                        future.result()
                if len(partial.blocks) == partial.count:
                    break
            self._let_readers_pass()
            if self._closed.is_set():
                return
            if not partial.admit():
                self._fetch_into(partial, 0, partial.shard.bytes)
                if not partial.admit():
                    raise partial.corrupt(self.source.uri)
            self.stats.add(whole_shards=1)
            partial.finish(partial.cache.path(partial.shard))
            with self._lock:  # its readers hold it themselves
                if self._partial.get(partial.shard.sha256) is partial:
                    del self._partial[partial.shard.sha256]
        except Exception as error:  # noqa: BLE001  it is raised in the readers of the shard
            partial.give_up(error)

    @contextmanager
    def _first(self) -> Iterator[None]:
        """Let background requests and checks wait for a read: a stream that begins has its first batch the sooner."""
        with self._idle:
            self._reads += 1
        try:
            yield
        finally:
            with self._idle:
                self._reads -= 1
                self._idle.notify_all()

    def _let_readers_pass(self) -> None:
        """Wait up to `YIELD_S` while readers wait for bytes, because theirs are more urgent."""
        with self._idle:
            self._idle.wait_for(lambda: self._reads == 0, timeout=YIELD_S)

    # --- ranges ----------------------------------------------------------------------------------------------

    def _begin(self, shard: ShardInfo, members: Sequence[Member]) -> Callable[[], list[memoryview]]:
        """Send the requests for members; the returned function waits for them."""
        partial, found = None, None
        if self.cache is not None:
            found = self.cache.read(shard, members)
            if found is None:
                partial = self._put_together(shard)
                if partial is None:  # another process may just have completed it
                    found = self.cache.read(shard, members)
        if found is not None:
            self.stats.add(cached_reads=len(members))
            return lambda: found
        self.stats.add(block_reads=len(members))
        if partial is None:
            return self._by_ranges(shard, members)
        wanted = sorted({n for m in members for n in partial.numbers(m)})
        blocks, missing = partial.promise(wanted, JOIN_BYTES // self.block_bytes)
        for run in _runs(missing, max(FILL_BYTES // self.block_bytes, 1)):
            self._ranged.submit(self._fetch_run, partial, run)
        return lambda: self._from_partial(partial, members, blocks)

    def _from_partial(
        self, partial: PartialShard, members: Sequence[Member], blocks: Sequence[Future[None]]
    ) -> list[memoryview]:
        """Wait for the blocks of members, and return the members' bytes."""
        try:
            for block in blocks:
                block.result()
            found = [memoryview(partial.read(m.offset, m.offset + m.size)) for m in members]
        except (ValueError, OSError):
            # The partial file is closed, or its disk failed: the shard is complete, or is read without the cache.
            _await(partial)
            cached = partial.cache.read(partial.shard, members)
            return self._by_ranges(partial.shard, members)() if cached is None else cached
        wrong = [m for m, data in zip(members, found, strict=True) if zlib.crc32(data) != m.crc32]
        partial.forget(sorted({n for m in wrong for n in partial.numbers(m)}))
        return self.source.verified(partial.shard, members, found)

    def _by_ranges(self, shard: ShardInfo, members: Sequence[Member]) -> Callable[[], list[memoryview]]:
        """Send the requests for members of a shard that is not in the cache; the returned function waits for them."""
        spans = coalesce(members)
        futures = [self._ranged.submit(self.source.get, shard, start, stop) for start, stop in spans]
        return lambda: self._from_spans(shard, members, spans, futures)

    def _from_spans(
        self, shard: ShardInfo, members: Sequence[Member], spans: Sequence[Span], futures: Sequence[Future[memoryview]]
    ) -> list[memoryview]:
        starts, parts = [start for start, _ in spans], [future.result() for future in futures]
        found = []
        for m in members:
            i = bisect_right(starts, m.offset) - 1
            found.append(parts[i][m.offset - starts[i] :][: m.size])
        return self.source.verified(shard, members, found)

    def _fetch_run(self, partial: PartialShard, run: Sequence[int]) -> None:
        """Fetch consecutive blocks into the partial file.

        Raises:
            StorageError: they cannot be fetched; it is raised in the readers that wait for them, too.
        """
        stop = min((run[-1] + 1) * partial.block_bytes, partial.shard.bytes)
        try:
            self._fetch_into(partial, run[0] * partial.block_bytes, stop)
        except Exception as error:
            partial.lost(run, error)
            raise
        partial.arrived(run)

    def _fetch_into(self, partial: PartialShard, start: int, stop: int) -> None:
        """Fetch bytes [start, stop) into the partial file."""
        at = start

        def sink(part: bytes) -> None:
            nonlocal at
            partial.put(at, part)
            at += len(part)

        self.source.fetch(partial.shard, start, stop, sink)


def coalesce(members: Sequence[Member], gap: int = GAP_BYTES) -> list[Span]:
    """Return spans that cover the members, in order; members at most `gap` bytes apart share a span."""
    spans: list[Span] = []
    for m in sorted(members, key=lambda m: m.offset):
        if spans and m.offset - spans[-1][1] <= gap:
            spans[-1] = spans[-1][0], max(spans[-1][1], m.offset + m.size)
        else:
            spans.append((m.offset, m.offset + m.size))
    return spans


def _await(partial: PartialShard) -> None:
    """Wait until a shard is complete, or the cache has failed, which does not concern readers.

    Raises:
        ShardCorruptError, StorageError: it could not be fetched.
    """
    with suppress(OSError):  # the store's errors are none
        partial.done.result()


def _runs(numbers: Sequence[int], most: int) -> list[list[int]]:
    """Return consecutive numbers together, at most so many."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1 and len(runs[-1]) < most:
            runs[-1].append(n)
        else:
            runs.append([n])
    return runs
