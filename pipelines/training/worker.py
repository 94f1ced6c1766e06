"""The loop of one rank. It knows torch.distributed and a `Shell`; Ray is one shell, a test's process group another."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from pipelines import models
from pipelines.config import Config, noise_schedule
from pipelines.shards.cache import ShardCorruptError
from pipelines.shards.read import Batch, default_cache_dir
from pipelines.shards.stream import StreamSettings, TrainingStream, open_stream
from pipelines.tracking import Destination, RunLog
from pipelines.training import hardware
from pipelines.training.checkpoint import Checkpointer, initialize, restore
from pipelines.training.preview import Preview
from pipelines.training.progress import Clock, Progress
from pipelines.training.shell import Job, Shell
from pipelines.training.state import make_training
from pipelines.training.step import Outcome, SkipGuard, step
from pipelines.training.telemetry import Profiler, Window

logger = logging.getLogger(__name__)


def train(
    job: Job, shell: Shell, *, rank: int, world_size: int, device: torch.device, started: float | None = None
) -> None:
    """Train until `config.images` images are seen or a stop is asked for; the last checkpoint is always saved.

    Args:
        started: `time.monotonic()` when this attempt began on this rank; now, where not given.

    Raises:
        ModelError: the checkpoint is damaged or of other settings or data, or `init_from` names no fitting model.
        FloatingPointError: losses or gradients stay not finite.
    """
    clock = Clock(time.monotonic() if started is None else started)
    hardware.prepare(job.config, default_cache_dir().parent)
    loop = Loop(job, shell, rank, world_size, device, clock)
    loop.run()


class Loop:
    """One attempt of one rank, from the newest checkpoint to the end or a stop."""

    def __init__(self, job: Job, shell: Shell, rank: int, world_size: int, device: torch.device, clock: Clock) -> None:
        config = job.config
        self.job, self.config, self.shell, self.rank, self.device, self.clock = job, config, shell, rank, device, clock
        self.training = make_training(config, device)
        self.log = None
        if rank == 0:
            run = Destination(job.tracker, job.storage, job.run_uri)
            unsent = stream_settings(config).cache_dir.parent / "unsent" / job.tracker.run_id
            self.log = RunLog.open(config.tracking.sinks, run, unsent)
        if not restore(self.training, shell, job, self.log, rank, device) and config.init_from is not None:
            initialize(self.training, job, rank, device)
        self.resumed_at = self.saved_at = self.training.images_seen
        self.schedule = noise_schedule(config)
        self.spec = models.model_spec(config, job.dataset, job.lineage, job.quarantine)
        self.stream = make_stream(job, rank, world_size, self.resumed_at)
        self.checkpointer = Checkpointer(job, self.spec, shell, self.log, rank)
        self.preview = Preview(job, self.spec, self.schedule, stream_settings(config), self.log, rank, device)
        self.window = Window(config, clock, self.resumed_at, device)
        self.profiler = Profiler(job, rank, self.resumed_at)
        self.loss = math.nan
        self.last: Batch | None = None
        self.broken: ShardCorruptError | None = None
        self.guard = SkipGuard(config.optim, config.batch_size)

    def run(self) -> None:
        """Step after step."""
        try:
            self._run()
        finally:
            self.stream.reader.close()
            if self.log:
                self.log.close()

    def _run(self) -> None:
        if self.training.images_seen == 0:
            self._show()
        batches = iter(self.stream)
        self.clock.switch("step")
        while (batch := self._next(batches)) is not None:
            outcome = self._step(batch)
            if outcome.broken:
                self._give_up()
                return
            finished = self.training.images_seen >= self.config.images
            self._tell(outcome, finished)
            if finished or self._crossed(self.config.tracking.grid_every or self.config.images):
                self._show()
            self._judge()
            if finished or outcome.stop or outcome.checkpoint or self._crossed(self.config.checkpoint.every):
                self._save(finished)
            if outcome.stop:
                break
        with self.clock.during("checkpoint"):
            self.checkpointer.finish()
        if self.log:
            if not math.isnan(self.loss):
                self._progress(self.loss)
            self.log.flush()

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        with self.clock.during("data"):
            try:
                self.last = next(batches, None)
            except ShardCorruptError as error:
                # The others wait for this rank in the next step: it takes part, so that all save what there is.
                if self.last is None:
                    raise
                self.broken = error
                ordinals = torch.from_numpy(self.stream.piece(self.training.images_seen).ordinals)
                self.last = replace(self.last, ordinals=ordinals)
            return self.last

    def _give_up(self) -> None:
        """Save what was trained before a batch that some rank could not read; that rank says why.

        Raises:
            ShardCorruptError: the batch was this rank's.
        """
        if self.training.images_seen > self.saved_at:
            self._save(finished=False)
        with self.clock.during("checkpoint"):
            self.checkpointer.finish()
        if self.broken is not None:
            raise self.broken

    def _step(self, batch: Batch) -> Outcome:
        self.profiler.before_step(self.training.images_seen)
        stop = self.rank == 0 and self.shell.stop_requested()
        checkpoint = self.shell.checkpoint_requested()
        wishes = {"stop": stop, "checkpoint": checkpoint, "broken": self.broken is not None}
        return step(self.training, self.schedule, batch, self.config, self.device, **wishes)

    def _tell(self, outcome: Outcome, finished: bool) -> None:
        """Rank 0 says what the step came to; every rank stops where too many in a row came to nothing."""
        seen = self.training.images_seen
        warning = self.guard.watch(outcome, seen)
        if self.log is None:
            return
        if warning:
            logger.warning("%s", warning)
        self.window.add(outcome)
        self._progress(outcome.loss)
        if finished or self._crossed(self.config.tracking.log_every):
            self.log.metrics({**self.window.metrics(self.training), **self.stream.reader.fetcher.stats.metrics()}, seen)

    def _show(self) -> None:
        if self.config.tracking.grid_every is not None:
            with self.clock.during("grid"):
                self.preview.show(self.training)

    def _judge(self) -> None:
        seen, judge = self.training.images_seen, self.job.judge
        if judge is not None and judge.due(seen - self.config.batch_size, seen):
            with self.clock.during("grid"):
                judge(self.training, self.spec, self.device)

    def _progress(self, loss: float) -> None:
        self.loss = loss
        stored = self.checkpointer.uploaded_bytes, self.checkpointer.upload_s
        seconds = self.clock.seconds()
        self.shell.progress(Progress(self.training.images_seen, self.resumed_at, loss, seconds, *stored))

    def _save(self, finished: bool) -> None:
        seen, every = self.training.images_seen, self.config.checkpoint.publish_every
        with self.clock.during("checkpoint"):
            self.checkpointer.save(self.training, keep=finished or seen // every > self.saved_at // every)
        self.saved_at = seen

    def _crossed(self, every: int) -> bool:
        """Whether the last batch passed a multiple of `every` images."""
        seen = self.training.images_seen
        return seen // every > (seen - self.config.batch_size) // every


def stream_settings(config: Config) -> StreamSettings:
    """How the run's data is ordered and read."""
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
    )


def make_stream(job: Job, rank: int, world_size: int, start: int) -> TrainingStream:
    """This rank's batches from `start` images on."""
    settings = stream_settings(job.config)
    reader, order = open_stream(job.dataset, "train", job.storage, settings, job.quarantine)
    return TrainingStream(
        reader,
        order,
        batch_size=job.config.batch_size,
        rank=rank,
        world_size=world_size,
        start=start,
        stop=job.config.images,
        threads=settings.threads,
        prefetch=settings.prefetch,
    )
