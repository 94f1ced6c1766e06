"""The training loop of one rank. It uses torch.distributed and a `Shell`, and knows nothing of Ray."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch

from pipelines.environment.scratch import warn_if_short
from pipelines.shards.cache import ShardCorruptError
from pipelines.shards.read import Batch, default_cache_dir
from pipelines.training.loop import hardware
from pipelines.training.loop.checkpoint import Checkpointer, restore
from pipelines.training.loop.collectives import broadcast_object
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.data import training_stream
from pipelines.training.loop.health import Health, say
from pipelines.training.loop.initial import load_initial_model, with_teacher
from pipelines.training.loop.length import Length
from pipelines.training.loop.log import finish_log, open_log
from pipelines.training.loop.preview import Preview
from pipelines.training.loop.progress import Clock, Progress, passes
from pipelines.training.loop.shell import Shell
from pipelines.training.loop.state import make_state
from pipelines.training.loop.step import SkipGuard, StepResult, step
from pipelines.training.loop.telemetry import Profiler, StepStatistics
from pipelines.training.loop.watchdog import Watchdog
from pipelines.training.startup import end_startup

logger = logging.getLogger(__name__)


def train_rank(context: RunContext, shell: Shell, started: float | None = None) -> None:
    """Train one rank's part of a run, from the newest checkpoint to the end of the run or a stop.

    Args:
        shell: the surroundings of the loop.
        started: `time.monotonic()` when this attempt began on this rank; now, where not given.

    Raises:
        ModelError: the checkpoint is damaged or of other settings or data, or `init_from` names no fitting model.
        FloatingPointError: losses or gradients stay not finite.
        ShardCorruptError: a shard that this rank needs is damaged; what was trained before is saved.
        RankFailedError: another rank has failed.
    """
    cluster, clock = context.config.cluster, Clock(time.monotonic() if started is None else started)
    # What takes a while to close is closed after the other ranks have been told of an error.
    with ExitStack() as resources, Watchdog(clock, cluster.step_timeout_s, cluster.preemption_grace_s):
        TrainingLoop(context, shell, clock, resources).run()


class TrainingLoop:
    """One attempt of one rank.

    Args:
        shell: the surroundings of the loop.
        clock: of this attempt.
        resources: what the loop opens is closed with it.
    """

    def __init__(self, context: RunContext, shell: Shell, clock: Clock, resources: ExitStack) -> None:
        self.config, self.shell, self.clock = context.config, shell, clock
        hardware.configure_process(self.config, default_cache_dir().parent)
        self.log = open_log(context.job) if context.rank == 0 else None
        if self.log:
            resources.callback(self.log.close)

        # Restore the newest checkpoint, or start from new or given weights.
        self.state = make_state(context)
        if context.rank == 0:  # one is written at a time; others wait in memory
            warn_if_short(sum(t.nbytes for t in self.state.tensors().values()), "a checkpoint before its upload")
        restored, damaged = restore(context, self.state, self.log)
        if not restored and self.config.init_from is not None:
            load_initial_model(context, self.state)
        self.context = context = with_teacher(context)
        self.resumed_at = self.saved_at = self.state.images_seen
        if self.log:
            self.log.text(context.precision, "precision.txt", self.resumed_at)

        self.stream = training_stream(context, self.resumed_at)
        resources.callback(self.stream.reader.close)
        self.checkpointer = Checkpointer(context, self.log, damaged)
        resources.callback(self.checkpointer.close)
        self.health = Health(self.config, self.resumed_at)
        self.preview = Preview(context, self.log, self.health)
        self.length = Length(self.config.training_s, self.config.batch_size, self.clock, self.state)
        self.statistics = StepStatistics(context, self.clock, self.resumed_at)
        self.profiler = Profiler(context, self.resumed_at, self.log)
        self.guard = SkipGuard(self.config.optim, self.config.batch_size)
        self.loss = math.nan
        self.last_batch: Batch | None = None
        self.read_error: ShardCorruptError | None = None

    def run(self) -> None:
        """Train to the end of the run or until a stop is requested; the last checkpoint is always saved."""
        config, state = self.config, self.state
        batches = iter(self.stream)
        end_startup()
        self.clock.switch("step")
        while state.images_seen < state.length and (batch := self._next_batch(batches)) is not None:
            # Forward, backward, update.
            self.profiler.before_step(state.images_seen)
            stop = self.context.rank == 0 and self.shell.stop_requested()
            checkpoint = self.shell.checkpoint_requested()
            asked = {"stop": stop, "checkpoint": checkpoint, "unreadable": self.read_error is not None}
            length = self.length.corrected(state.images_seen) if self.context.rank == 0 else None
            result = step(self.context, state, batch, **asked, length=length or 0)
            if result.unreadable:
                self._end_unreadable()
                return
            finished = state.images_seen >= state.length
            if self.log:
                self.log.begin()

            # Log metrics and report progress.
            self._log_step(result, finished)

            # Draw samples, and call the evaluation hook. The first are drawn after a step, which says that all works.
            first = state.images_seen == config.batch_size
            if first or finished or self._crossed(config.tracking.grid_every or config.images):
                self._show_preview()
            self._evaluate()

            # Save a checkpoint; what is to be scored is saved where that is due.
            due = self._crossed(config.checkpoint.every) or self._crossed(config.evaluation.every)
            if result.checkpoint and self.log:
                logger.warning(
                    "a node is about to be taken away: a checkpoint is saved at %s images", f"{state.images_seen:,}"
                )
            if finished or result.stop or result.checkpoint or due:
                self._save(finished)
            if result.stop:
                break

        # Wait until checkpoints and metrics are stored.
        self._finish_uploads()
        if self.log:
            if not math.isnan(self.loss):
                self._report_progress(self.loss)
            finish_log(self.context.job, self.log)

    def _next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """Return the next batch, None at the end of the run; where it cannot be read, one that stands in for it."""
        with self.clock.during("data"):
            try:
                self.last_batch = next(batches, None)
            except ShardCorruptError as error:
                # The others wait for this rank in the next step: it takes part, so that all save what there is.
                if self.last_batch is None:
                    raise
                self.read_error = error
                ordinals = torch.from_numpy(self.stream.piece(self.state.images_seen).ordinals)
                self.last_batch = replace(self.last_batch, ordinals=ordinals)
            return self.last_batch

    def _end_unreadable(self) -> None:
        """Save what was trained before a batch that some rank could not read.

        Raises:
            ShardCorruptError: the batch was this rank's.
        """
        if self.state.images_seen > self.saved_at:
            self._save(finished=False)
        self._finish_uploads()
        broadcast_object(None)  # the error ends the other ranks: rank 0 has to have stored the checkpoint
        if self.read_error is not None:
            raise self.read_error

    def _log_step(self, result: StepResult, finished: bool) -> None:
        """Log on rank 0; raise on every rank where too many updates in a row were left out."""
        seen = self.state.images_seen
        warning = self.guard.check(result, seen)
        if self.log is None:
            return
        if warning:
            logger.warning("%s", warning)
        self.statistics.add(result)
        self.health.length = self.state.length
        self.health.step(result.loss)
        self._report_progress(result.loss)
        if finished or self._crossed(self.config.tracking.log_every):
            values = self.statistics.metrics(self.state)
            self.log.metrics({**values, **self.stream.reader.fetcher.stats.metrics()}, seen)
            if "train/loss" in values:
                say(self.health.curves(seen, values["train/loss"], values["updates/grad_norm"]))

    def _show_preview(self) -> None:
        if self.config.tracking.grid_every is not None:
            with self.clock.during("grid"):
                drawn = self.preview.show(self.state)
            if drawn is not None:
                self.shell.samples(drawn)

    def _evaluate(self) -> None:
        seen, hook = self.state.images_seen, self.context.job.evaluation_hook
        if hook is not None and hook.due(seen - self.config.batch_size, seen):
            with self.clock.during("grid"):
                hook(self.state, self.context.spec, self.context.device)

    def _report_progress(self, loss: float) -> None:
        self.loss = loss
        stored = self.checkpointer.uploaded_bytes, self.checkpointer.upload_s
        seconds = self.clock.seconds()
        seen, length = self.state.images_seen, self.state.length
        self.shell.progress(Progress(seen, self.resumed_at, loss, seconds, *stored, length))

    def _save(self, finished: bool) -> None:
        seen, config = self.state.images_seen, self.config
        often = (config.checkpoint.publish_every, config.evaluation.every)
        publish = finished or any(passes(self.saved_at, seen, every) for every in often)
        self.state.trained_s = self.length.trained_s()
        with self.clock.during("checkpoint"):
            self.checkpointer.save(self.state, publish=publish)
        self.saved_at = seen

    def _finish_uploads(self) -> None:
        with self.clock.during("checkpoint"):
            self.checkpointer.finish()

    def _crossed(self, every: int | None) -> bool:
        """Return whether the last batch passed a multiple of `every` images."""
        seen = self.state.images_seen
        return passes(seen - self.config.batch_size, seen, every)
