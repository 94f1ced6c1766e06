"""The training of one rank, from top to bottom: set up, steps, and the end.

It uses torch.distributed and a `Shell`, and knows nothing of Ray.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pipelines.environment.scratch import warn_if_short
from pipelines.shards.read import Batch, default_cache_dir
from pipelines.shards.source import ShardCorruptError
from pipelines.training.loop import hardware
from pipelines.training.loop.checkpoint import Checkpointer, restore
from pipelines.training.loop.collectives import broadcast_object
from pipelines.training.loop.context import RunContext, Shell
from pipelines.training.loop.data import training_stream
from pipelines.training.loop.health import Health, SkipGuard, say
from pipelines.training.loop.initial import load_initial_model, with_teacher
from pipelines.training.loop.local_copies import LocalCopies
from pipelines.training.loop.log import finish_log, open_log
from pipelines.training.loop.losses import batch_texts, losses
from pipelines.training.loop.optimizer import learning_rate
from pipelines.training.loop.parallel import gradient_sync, micro_batches
from pipelines.training.loop.preview import Preview
from pipelines.training.loop.progress import Clock, Length, Progress, StepResult, passes
from pipelines.training.loop.state import TrainingState, make_state
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
        # Restore the newest checkpoint, open the stream of batches where it ends, and make what the steps need.
        rank = _Rank(context, shell, clock, resources)

        while (batch := rank.next_batch()) is not None:
            # Forward, backward, all-reduce, update.
            rank.profiler.before_step(rank.state.images_seen)
            result = step(rank.context, rank.state, batch, rank.requests())
            if result.unreadable:
                rank.end_unreadable()
                return

            # Log metrics and report progress.
            rank.log_step(result)

            # Draw samples, and call the evaluation hook.
            rank.draw_samples()
            rank.evaluate()

            # Save a checkpoint.
            rank.save_if_due(result)
            if result.stop:
                break

        # Wait until checkpoints and metrics are stored.
        rank.finish()


# --- a step -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Requests:
    """Requests of one rank to a step, which tells all ranks what any of them asked.

    Attributes:
        stop: to stop after the step.
        checkpoint: to save a checkpoint after the step.
        unreadable: this rank's batch could not be read, and another stands in for it.
        length: after how many images the run ends from here on; 0 where that stays as it is.
    """

    stop: bool = False
    checkpoint: bool = False
    unreadable: bool = False
    length: int = 0


def step(context: RunContext, state: TrainingState, batch: Batch, requests: Requests = Requests()) -> StepResult:
    """Update the state by this rank's piece of the next global batch, together with all other ranks.

    Gradients are weighted by samples: a rank's loss is its sum over the global batch size, times the number of ranks
    because DDP and FSDP2 average over them. So ranks with unequal pieces give the gradient of the whole batch exactly,
    whichever rank computes which part of it.

    Args:
        requests: of this rank.
    """
    config, device = context.config, context.device

    # Forward and backward. `sums` are added up over the ranks: the mean loss, and each sample's loss where one learns.
    sums = torch.zeros(1 + (config.batch_size if state.learns_from_losses else 0), dtype=torch.float64, device=device)
    by_source = torch.zeros(2, len(context.job.dataset.sources), dtype=torch.float64, device=device)  # losses, counts
    texts = batch_texts(context, batch)
    parts = micro_batches(batch, config.batch_size, context.world_size, config.micro_batch_size)
    for part, weight, last in parts:
        n = part.ordinals.to(device)
        t, weights = state.timesteps.sample(n)
        with gradient_sync(state.wrapped, last):
            with hardware.autocast(context.precision, device):
                each = losses(context, state.wrapped, part, t, texts)
            loss = mean = weight * (weights.to(each) * each).sum() / config.batch_size
            if state.learned_weight is not None:
                factors = weights * state.learned_weight.factors(t)
                loss = weight * (factors.to(each) * each).sum() / config.batch_size
            (loss * context.world_size * state.loss_scale.factor).backward()
        sums[0] += mean.detach()
        _add_by_source(by_source, part, weights * each.detach(), weight)
        if state.learns_from_losses and weight:
            sums[1 + n - state.images_seen] = each.detach().double()

    # All-reduce requests and losses.
    asked = [requests.stop, requests.checkpoint, requests.unreadable, requests.length]
    sums = torch.cat([torch.tensor(asked, dtype=torch.float64, device=device), by_source.flatten(), sums])
    if context.world_size > 1:
        dist.all_reduce(sums)

    # Read loss and gradient norm: the one place where the host waits for the device.
    state.loss_scale.unscale(state.network.parameters())
    norm = _gradient_norm(state.network)
    first = 5 + by_source.numel()  # of the samples
    read = torch.cat([norm.double()[None], sums[:first]]).tolist()
    grad_norm, stops, checkpoints, unreadables, new, *of_sources, mean_loss = read
    state.length = int(new) or state.length
    if unreadables:
        state.optimizer.zero_grad()
        return StepResult(mean_loss, grad_norm, False, stop=True, checkpoint=True, unreadable=True)

    # Update weights and averages.
    finite = math.isfinite(mean_loss), math.isfinite(grad_norm)
    updated, rescaled = all(finite), state.loss_scale.update(*finite)
    if updated:
        _update_weights(context, state, norm, sums[first:])
    state.skipped += not updated
    state.optimizer.zero_grad()
    state.images_seen += config.batch_size
    state.update_averages(config.batch_size)
    return StepResult(mean_loss, grad_norm, updated, stops > 0, checkpoints > 0, False, rescaled, tuple(of_sources))


def _add_by_source(by_source: Tensor, part: Batch, losses: Tensor, weight: float) -> None:
    """Add the losses and the number of a part's samples to those of their sources, [2, sources]; of a mixture only."""
    if part.sources is not None:
        counted = torch.stack([losses, torch.ones_like(losses)]).double() * weight
        by_source.index_add_(1, part.sources.to(by_source.device), counted)


def _gradient_norm(network: nn.Module) -> Tensor:
    """Return the norm of the whole gradient, a scalar, on every rank."""
    gradients = [p.grad for p in network.parameters() if p.requires_grad and p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _update_weights(context: RunContext, state: TrainingState, norm: Tensor, each: Tensor) -> None:
    """Clip the gradient, step the optimizer, and update the parts that learn from the losses.

    Args:
        norm: the norm of the gradient.
        each: the loss of every sample of the global batch in the order of the ordinals; empty where none learns.
    """
    config = context.config
    if config.optim.grad_clip is not None:
        parameters = [p for p in state.network.parameters() if p.requires_grad]
        nn.utils.clip_grads_with_norm_(parameters, config.optim.grad_clip, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.images_seen, state.length)
    state.optimizer.step()
    state.optimizer_steps += 1
    if state.learns_from_losses:
        # On the device where the timesteps were drawn: another one's cumulative sums may round another way.
        ordinals = torch.arange(config.batch_size, device=each.device) + state.images_seen
        if state.learned_weight is not None:  # before the sampler learns, and would draw others
            t, weights = state.timesteps.sample(ordinals)
            state.learned_weight.update(t, each, weights)
        state.timesteps.update(ordinals, each)


# --- around the steps ---------------------------------------------------------------------------------------


class _Rank:
    """One attempt of one rank: everything around its steps.

    Args:
        shell: the surroundings of the loop.
        clock: of this attempt.
        resources: what is opened here is closed with it.
    """

    def __init__(self, context: RunContext, shell: Shell, clock: Clock, resources: ExitStack) -> None:
        self.config, self.shell, self.clock = context.config, shell, clock
        hardware.configure_process(self.config, default_cache_dir().parent)
        self.log = open_log(context.job) if context.rank == 0 else None
        if self.log:
            resources.callback(self.log.close)

        # Restore the newest checkpoint, or start from new or given weights.
        self.state = make_state(self.config, context.device, context.precision)
        if context.rank == 0 and not isinstance(self.state.network, FSDPModule):  # parts need no disk
            warn_if_short(sum(t.nbytes for t in self.state.tensors().values()), "a checkpoint before its upload")
        self.copies = LocalCopies(context, self.log) if self.config.checkpoint.local_every else None
        restored, damaged = restore(context, self.state, self.log, self.copies)
        if not restored and self.config.init_from is not None:
            load_initial_model(context, self.state)
        self.context = context = with_teacher(context)
        self.resumed_at = self.saved_at = self.state.images_seen
        if self.log:
            self.log.text(context.precision, "precision.txt", self.resumed_at)

        self.stream = training_stream(context, self.resumed_at)
        resources.callback(self.stream.reader.close)
        self.checkpointer = Checkpointer(context, self.log, damaged, self.copies)
        resources.callback(self.checkpointer.close)
        self.health = Health(self.config, self.resumed_at)
        self.preview = Preview(context, self.log, self.health)
        self.length = Length(self.config.training_s, self.config.batch_size, clock, self.state.trained_s)
        self.statistics = StepStatistics(context, clock, self.resumed_at)
        self.profiler = Profiler(context, self.resumed_at, self.log)
        self.guard = SkipGuard(self.config.optim, self.config.batch_size)
        self.batches: Iterator[Batch] = iter(self.stream)
        self.last_batch: Batch | None = None
        self.read_error: ShardCorruptError | None = None
        self.loss = math.nan
        end_startup()
        clock.switch("step")

    @property
    def finished(self) -> bool:
        """Whether the run has seen all its images."""
        return self.state.images_seen >= self.state.length

    def next_batch(self) -> Batch | None:
        """Return the next batch, None at the end of the run; a stand-in where it cannot be read."""
        if self.finished:
            return None
        with self.clock.during("data"):
            try:
                self.last_batch = next(self.batches, None)
            except ShardCorruptError as error:
                # The others wait for this rank in the next step: it takes part, so that all save what there is.
                if self.last_batch is None:
                    raise
                self.read_error = error
                ordinals = torch.from_numpy(self.stream.piece(self.state.images_seen).ordinals)
                self.last_batch = replace(self.last_batch, ordinals=ordinals)
            return self.last_batch

    def requests(self) -> Requests:
        """Return what this rank asks of the next step: rank 0 for the driver, and every rank for its node."""
        first = self.context.rank == 0
        return Requests(
            stop=first and self.shell.stop_requested(),
            checkpoint=self.shell.checkpoint_requested(),
            unreadable=self.read_error is not None,
            length=(self.length.corrected(self.state.images_seen) if first else None) or 0,
        )

    def end_unreadable(self) -> None:
        """Save what was trained before a batch that some rank could not read.

        Raises:
            ShardCorruptError: the batch was this rank's.
        """
        if self.state.images_seen > self.saved_at:
            self._save()
        self._finish_uploads()
        broadcast_object(None)  # the error ends the other ranks: rank 0 has to have stored the checkpoint
        if self.read_error is not None:
            raise self.read_error

    def log_step(self, result: StepResult) -> None:
        """Log on rank 0; raise on every rank where too many updates in a row were left out."""
        seen = self.state.images_seen
        if self.log:
            self.log.begin()
        warning = self.guard.check(result, seen)
        if self.log is None:
            return
        if warning:
            logger.warning("%s", warning)
        self.statistics.add(result)
        self.health.length = self.state.length
        self.health.step(result.loss)
        self._report_progress(result.loss)
        if self.finished or self._crossed(self.config.tracking.log_every):
            values = self.statistics.metrics(self.state)
            self.log.metrics({**values, **self.stream.reader.fetcher.source.metrics()}, seen)
            if "train/loss" in values:
                say(self.health.curves(seen, values["train/loss"], values["updates/grad_norm"]))

    def draw_samples(self) -> None:
        """Draw a preview where one is due; the first after one step, when training is known to work."""
        every = self.config.tracking.grid_every
        first = self.state.images_seen == self.config.batch_size
        if every is None or not (first or self.finished or self._crossed(every)):
            return
        with self.clock.during("grid"):
            drawn = self.preview.show(self.state)
        if drawn is not None:
            self.shell.samples(drawn)

    def evaluate(self) -> None:
        """Call the evaluation hook of a study where it is due."""
        seen, hook = self.state.images_seen, self.context.job.evaluation_hook
        if hook is not None and hook.due(seen - self.config.batch_size, seen):
            with self.clock.during("grid"):
                hook(self.state, self.context.spec, self.context.device)

    def save_if_due(self, result: StepResult) -> None:
        """Save a checkpoint at the end, on request, and where a checkpoint or an evaluation is due."""
        if result.checkpoint and self.log:
            logger.warning(
                "a node is about to be taken away: a checkpoint is saved at %s images", f"{self.state.images_seen:,}"
            )
        due = self._crossed(self.config.checkpoint.every) or self._crossed(self.config.evaluation.every)
        if self.finished or result.stop or result.checkpoint or due:
            self._save()
        elif self._crossed(self.config.checkpoint.local_every):
            self.state.trained_s = self.length.trained_s()
            with self.clock.during("checkpoint"):
                self.checkpointer.keep(self.state)

    def finish(self) -> None:
        """Wait until all checkpoints and metrics are stored."""
        self._finish_uploads()
        if self.copies and self.finished:
            self.copies.delete()
        if self.log:
            if not math.isnan(self.loss):
                self._report_progress(self.loss)
            finish_log(self.context.job, self.log)

    def _report_progress(self, loss: float) -> None:
        self.loss = loss
        stored = self.checkpointer.uploaded_bytes, self.checkpointer.upload_s
        seconds = self.clock.seconds()
        seen, length = self.state.images_seen, self.state.length
        slowed, slow_s, wait_s = self.stream.throttled()
        self.shell.progress(Progress(seen, self.resumed_at, loss, seconds, *stored, length, slowed, slow_s, wait_s))

    def _save(self) -> None:
        seen, config = self.state.images_seen, self.config
        often = (config.checkpoint.publish_every, config.evaluation.every)
        publish = self.finished or any(passes(self.saved_at, seen, every) for every in often)
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
