"""One rank's part of the endless stream: decoded batches for training, and sample dicts for WebDataset pipelines."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from pipelines.shards.fetch import ShardFetcher
from pipelines.shards.index import Dataset, MixtureSource
from pipelines.shards.mixture import MixtureOrder, Schedule, by_stretch, shared_lanes
from pipelines.shards.order import Ints, Located, SampleOrder
from pipelines.shards.quarantine import Quarantine, kept_shards, stream_digest
from pipelines.shards.read import Batch, ShardReader
from pipelines.shards.working_set import NodePiece, working_set
from pipelines.storage import Storage, Throttling

A = TypeVar("A")
T = TypeVar("T")


@dataclass(frozen=True)
class StreamSettings:
    """Settings of the order in which a split is read, and of how it is read.

    Attributes:
        lanes: parallel reading positions of the whole run; the sources of a mixture share them by weight.
        window: consecutive shards of a lane that are shuffled together.
        seed: seed of the order.
        cache_dir: folder of the node's shard cache.
        cache_bytes: size limit of the cache.
        threads: number of threads that read and decode.
        prefetch: number of batches that are read ahead.
        text: whether batches have the text embeddings that were computed at ingest.
        memory_bytes: the pixels of a split that takes no more than this are kept once they are decoded.
    """

    lanes: int
    window: int
    seed: int
    cache_dir: Path
    cache_bytes: int
    threads: int = 2
    prefetch: int = 4
    text: bool = False
    memory_bytes: int = 0


def open_stream(
    dataset: Dataset,
    split: str,
    storage: Storage,
    settings: StreamSettings,
    quarantine: Quarantine | None = None,
    *,
    piece: NodePiece | None = None,
) -> tuple[ShardReader, SampleOrder | MixtureOrder]:
    """Return a reader of a split, and the order of its samples.

    Args:
        piece: what the ranks of this node read, which is what its cache has to hold; None where that is unknown.

    Raises:
        DatasetError: there is no such split, or the quarantine is of another dataset.
        ValueError: weights of a mixture are for so short a stretch that they cannot be met.
    """
    used = working_set(dataset, split, settings.lanes, settings.window, piece)
    fetcher = ShardFetcher.opened(dataset.uri, storage, settings.cache_dir, settings.cache_bytes, used)
    reader = ShardReader(dataset, split, fetcher, quarantine, text=settings.text, memory_bytes=settings.memory_bytes)
    return reader, sample_order(
        dataset, split, quarantine, lanes=settings.lanes, window=settings.window, seed=settings.seed
    )


def sample_order(
    dataset: Dataset, split: str, quarantine: Quarantine | None, *, lanes: int, window: int, seed: int
) -> SampleOrder | MixtureOrder:
    """Return the order of the samples of a split, whose shards are those of `kept_shards`.

    Args:
        quarantine: what is left out.
        lanes, window, seed: see `StreamSettings`.

    Raises:
        DatasetError: there is no such split, or the quarantine is of another dataset.
        ValueError: weights of a mixture are for so short a stretch that they cannot be met.
    """
    shards = kept_shards(dataset, split, quarantine)
    if not dataset.shards(split).sources:
        digest = stream_digest(dataset, quarantine)
        return SampleOrder(shards.samples, lanes=lanes, window=window, seed=seed, digest=digest)
    counts = [shards.samples[shards.of_source(source)] for source in dataset.sources]
    return mixture_order(dataset.sources, counts, lanes=lanes, window=window, seed=seed)


def mixture_order(
    sources: Sequence[MixtureSource], counts: Sequence[Ints], *, lanes: int, window: int, seed: int
) -> MixtureOrder:
    """Return the order of the samples of a mixture.

    Args:
        sources: the datasets of the mixture.
        counts: samples of each shard of each source.
        lanes, window, seed: see `StreamSettings`.
    """
    mixed = by_stretch([source.weights for source in sources])
    orders = [
        SampleOrder(own, lanes=share, window=window, seed=seed, digest=f"{source.name}/{source.digest}")
        for source, own, share in zip(sources, counts, shared_lanes(lanes, mixed), strict=True)
    ]
    return MixtureOrder(orders, Schedule(mixed))


class TrainingStream:
    """The decoded batches of one rank, in the order of `SampleOrder` or `MixtureOrder`, read ahead by threads.

    Where there is a GPU they are in page-locked memory, from which they can be copied while the GPU computes.

    Attributes:
        waited_s: seconds that the consumer has spent waiting for data.
        throttled_wait_s: of them, seconds in which the store was limiting this process's reads.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: SampleOrder | MixtureOrder,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        start: int = 0,
        stop: int | None,
        threads: int = 2,
        prefetch: int = 4,
    ) -> None:
        self.reader, self.order = reader, order
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.start, self.stop = start, stop
        self.threads, self.prefetch = threads, prefetch
        self.waited_s = self.throttled_wait_s = 0.0
        self._before = self._throttling()

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's pieces of the global batches that begin at ordinals from `start` to `stop`, if any."""
        start, every = self.start, self.batch_size
        firsts = itertools.count(start, every) if self.stop is None else range(start, self.stop, every)
        batches = read_ahead(self._load, firsts, self.threads, self.prefetch)
        while True:
            began, throttled_s = time.perf_counter(), self._throttling().seconds
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - began
            self.throttled_wait_s += self._throttling().seconds - throttled_s
            if batch is None:
                return
            yield batch

    def throttled(self) -> tuple[int, float, float]:
        """Return how the store has limited this process's reads since the stream was made.

        Returns:
            Its answers that they are too fast, the seconds in which they were limited for that, and those of them in
            which the consumer waited.
        """
        now = self._throttling()
        return now.slow_downs - self._before.slow_downs, now.seconds - self._before.seconds, self.throttled_wait_s

    def _throttling(self) -> Throttling:
        return self.reader.fetcher.source.storage.throttling()

    def piece(self, first: int) -> Located:
        """Return this rank's part of the global batch that begins with ordinal `first`."""
        return self.order.piece(first, self.batch_size, self.rank, self.world_size)

    def _load(self, first: int) -> Batch:
        """Read and decode this rank's part of the global batch that begins with ordinal `first`."""
        batch = self.reader.batch(self.piece(first))
        return batch.pinned() if torch.cuda.is_available() else batch


def read_ahead(load: Callable[[A], T], asked: Iterable[A], threads: int, prefetch: int) -> Iterator[T]:
    """Yield load(each) for everything asked, in order, with `prefetch` calls running or finished ahead of the
    consumer."""
    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:
        ahead: deque[Future[T]] = deque()
        waiting = iter(asked)
        try:
            while True:
                while len(ahead) < prefetch and (each := next(waiting, None)) is not None:
                    ahead.append(pool.submit(load, each))
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
