"""The data of one rank: its batches of the training stream, and the test images that previews show."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pipelines.config import Config
from pipelines.shards.read import Batch, ShardReader, default_cache_dir
from pipelines.shards.stream import StreamSettings, TrainingStream, open_stream
from pipelines.shards.working_set import NodePiece, ranks_of_node, working_set

if TYPE_CHECKING:  # the driver reads the settings below, and has no ranks
    from pipelines.training.loop.context import RunContext

logger = logging.getLogger(__name__)


def stream_settings(config: Config) -> StreamSettings:
    """Return how the run's data is ordered and read."""
    data = config.data
    return StreamSettings(
        lanes=data.lanes,
        window=data.window,
        seed=config.seed,
        cache_dir=Path(data.cache_dir) if data.cache_dir else default_cache_dir(),
        cache_bytes=int(data.cache_gib * 2**30),
        threads=data.decode_threads,
        prefetch=data.prefetch_batches,
        text=config.model.text_dim > 0,
        memory_bytes=int(data.memory_mib * 2**20),
    )


def training_stream(context: RunContext, start: int) -> TrainingStream:
    """Return this rank's batches of the training stream.

    Args:
        start: `images_seen` where the stream begins.
    """
    job, settings = context.job, stream_settings(context.config)
    ranks = ranks_of_node(context.rank, context.world_size)
    piece = NodePiece.of(job.config.batch_size, ranks, context.world_size)
    if context.rank == ranks[0]:
        used = working_set(job.dataset, "train", settings.lanes, settings.window, piece)
        level = logging.INFO if used.fits(settings.cache_bytes) else logging.WARNING
        logger.log(level, "%s", used.choice(settings.cache_bytes))
    reader, order = open_stream(job.dataset, "train", job.storage, settings, job.quarantine, piece=piece)
    return TrainingStream(
        reader,
        order,
        batch_size=job.config.batch_size,
        rank=context.rank,
        world_size=context.world_size,
        start=start,
        stop=job.config.images if job.config.training_s is None else None,
        threads=settings.threads,
        prefetch=settings.prefetch,
    )


def open_test_split(context: RunContext) -> ShardReader:
    """Return a reader of the test split."""
    job = context.job
    return open_stream(job.dataset, "test", job.storage, stream_settings(job.config), job.quarantine)[0]


def read_samples(reader: ShardReader, indices: Tensor) -> Batch:
    """Return samples by their index in shard order, counted from 0; an index behind the last sample wraps around."""
    return reader.at(indices.numpy() % reader.total)
