"""The training stream as datasets of torch, for a training loop of your own."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipelines.shards.index import Dataset, DatasetError
from pipelines.shards.mixture import MixtureOrder
from pipelines.shards.order import SampleOrder
from pipelines.shards.quarantine import Quarantine, stream_digest
from pipelines.shards.read import ShardReader
from pipelines.shards.stream import StreamSettings, open_stream, read_ahead
from pipelines.shards.working_set import NodePiece, ranks_of_node
from pipelines.storage import Storage

T = TypeVar("T")


class RankDataset(IterableDataset[T]):
    """What one rank reads of the endless stream of a dataset or a mixture, from any sample on.

    Its state is a position in the stream of all ranks, and is the same on each of them: what any rank has saved, any
    number of ranks resume from, each sample exactly once. `state_dict` and `load_state_dict` are those that torchdata's
    `StatefulDataLoader` looks for; in a loop of one process they are called directly.

    Args:
        split: name of a split, such as "train".
        batch_size: size of the global batch, which is divided among the ranks; it may differ after a resume.
        samples_seen: the ordinal to begin with.
        quarantine: samples to leave out.

    Raises:
        ValueError: the rank is none of the ranks, or they are more than the samples of a batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        storage: Storage,
        settings: StreamSettings,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        samples_seen: int = 0,
        quarantine: Quarantine | None = None,
    ) -> None:
        if not 0 <= rank < world_size <= batch_size:
            raise ValueError(
                f"need 0 <= rank < world_size <= batch_size, got rank={rank}, world_size={world_size} and "
                f"batch_size={batch_size}: a rank beyond the batch would have no sample"
            )
        self.dataset, self.split, self.storage, self.settings = dataset, split, storage, settings
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.samples_seen, self.quarantine = samples_seen, quarantine

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the newest batch; in a worker of a loader, that of its next round of batches."""
        return {"samples_seen": self.samples_seen, "digest": self._digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of any rank, on this number of ranks, when it is iterated next.

        Raises:
            DatasetError: it is of a stream in which other samples have these numbers.
        """
        here = self._digest()
        # States that earlier releases saved of a `ShardDataset` name the data, and not the order.
        if state["digest"] not in (here, stream_digest(self.dataset, self.quarantine)):
            raise DatasetError(
                f"the state is of a stream with digest {str(state['digest'])[:12]}, this one has {here[:12]}: "
                "dataset, quarantine, weights, seed, lanes or window have changed, and with them which sample is which"
            )
        self.samples_seen = state["samples_seen"]

    def _digest(self) -> str:
        """Return the SHA-256 of all that decides which sample has which number."""
        settings, weights = self.settings, [sorted(source.weights.items()) for source in self.dataset.sources]
        order = [self.split, settings.seed, settings.lanes, settings.window, weights]
        content = [stream_digest(self.dataset, self.quarantine), order]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _opened(self) -> tuple[ShardReader, SampleOrder | MixtureOrder]:
        """Return a reader and the order; made where they are used, for threads and locks cannot be pickled."""
        piece = NodePiece.of(self.batch_size, ranks_of_node(self.rank, self.world_size), self.world_size)
        return open_stream(self.dataset, self.split, self.storage, self.settings, self.quarantine, piece=piece)


class StreamDataset(RankDataset[dict[str, Tensor]]):
    """One rank's decoded batches.


        source = StreamDataset(dataset, "train", storage, settings, batch_size=256, rank=rank, world_size=world_size)
        for batch in DataLoader(source, batch_size=None):
            loss = ... batch["images"], batch["labels"]

    A batch has what `Batch` has, by name: `ordinals`, `images`, and where they are there `labels`, `text`, `text_mask`,
    `pooled` and `sources`. Ranks share each global batch without gap or overlap; their pieces differ by one sample at
    most, so a loss is best added up and divided by the global batch size.

    Threads read batches ahead, so that workers of a loader are seldom needed. Of n workers, worker i yields every n-th
    batch from the i-th on, which a loader puts in the order of one process; then only `StatefulDataLoader` knows the
    state, or whoever counts batches and passes `samples_seen`.
    """

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's pieces of the global batches from `samples_seen` on, without end."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader, order = self._opened()

        def load(first: int) -> dict[str, Tensor]:
            batch = reader.batch(order.piece(first, self.batch_size, self.rank, self.world_size))
            there = {field.name: getattr(batch, field.name) for field in fields(batch)}
            return {name: tensor for name, tensor in there.items() if tensor is not None}

        every = workers * self.batch_size
        firsts = itertools.count(self.samples_seen + worker * self.batch_size, every)
        try:
            for batch in read_ahead(load, firsts, self.settings.threads, self.settings.prefetch):
                self.samples_seen += every  # before the consumer has it, who may save the state next
                yield batch
        finally:
            reader.close()


class ShardDataset(RankDataset[dict[str, Any]]):
    """One rank's samples as WebDataset sample dicts: the source of a pipeline of WebDataset stages.


        source = ShardDataset(dataset, "train", storage, settings, batch_size=256, rank=rank, world_size=world_size)
        pipeline = webdataset.DataPipeline(source, webdataset.decode("torchrgb"), webdataset.to_tuple("png", "cls"))

    A sample has `__key__`, `__url__`, `__ordinal__` (its number in the stream of all ranks) and its members' bytes by
    extension. Of the n workers of a DataLoader, worker i yields every n-th sample from the i-th on, so that
    `DataLoader(source, batch_size=None, num_workers=n)` has the order of one process and repeats no sample. After a
    stage that shuffles or filters, the stream is no longer a function of the ordinal.

    The state is at a boundary of batches. Where workers of a loader iterate, only the consumer knows how many batches
    it has taken, so it has to pass `samples_seen` itself.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this rank's samples from `samples_seen` on, without end."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader, order = self._opened()

        def load(first: int) -> list[dict[str, Any]]:
            return reader.samples(order.piece(first, self.batch_size, self.rank, self.world_size))

        firsts = itertools.count(self.samples_seen, self.batch_size)
        number = 0
        try:
            for samples in read_ahead(load, firsts, self.settings.threads, self.settings.prefetch):
                for sample in samples:
                    if number % workers == worker:
                        yield sample
                    number += 1
                self.samples_seen += self.batch_size
        finally:
            reader.close()
