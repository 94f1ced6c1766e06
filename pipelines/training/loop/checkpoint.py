"""Checkpoints of a run: copied to CPU memory at once, written and uploaded while training goes on, and restored."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint, CheckpointState, ModelError
from pipelines.environment.scratch import scratch_folder
from pipelines.presentation.errors import PipelineError
from pipelines.storage import join, layout
from pipelines.tracking import RunLog
from pipelines.training.loop.collectives import broadcast, broadcast_object, gather
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.hardware import precision_change
from pipelines.training.loop.state import ADDED, TrainingState

logger = logging.getLogger(__name__)


class Checkpointer:
    """Stores a run's state while training goes on, in a thread, one checkpoint after the other.

    Args:
        log: rank 0's log, whose unsent metrics go into each checkpoint; None on the other ranks.
        damaged: names of stored checkpoints that could not be read, which leave the run's list.

    Attributes:
        uploaded_bytes: size of the checkpoints stored so far.
        upload_s: seconds that their uploads took, while training went on.
    """

    def __init__(self, context: RunContext, log: RunLog | None, damaged: Collection[str] = frozenset()) -> None:
        self.context, self.log, self.damaged = context, log, damaged
        self.uploaded_bytes, self.upload_s = 0, 0.0
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._uploads: deque[Future[None]] = deque()

    def save(self, state: TrainingState, *, publish: bool) -> None:
        """Copy the state and store it in the background; called by every rank at the same step.

        Rank 0 waits where `checkpoint.backlog` copies wait already behind the one that is being stored: a store that is
        away must not fill the memory.

        Args:
            publish: whether the checkpoint is copied to `published/` as well, where it stays.

        Raises:
            Exception: what kept an earlier checkpoint from being stored.
        """
        if self.context.rank == 0:
            self._wait(self.context.config.checkpoint.backlog)
        tensors = gather(state.tensors())
        if self.context.rank != 0:
            return
        spec = self.context.spec
        checkpoint = Checkpoint(
            replace(spec, lineage={**spec.lineage, "images_seen": state.images_seen}),
            tensors,
            images_seen=state.images_seen,
            identity=self.context.config.identity(),
            optimizer_steps=state.optimizer_steps,
            skipped=state.skipped,
            length=state.length,
            trained_s=state.trained_s,
        )
        self._uploads.append(self._thread.submit(self._store, checkpoint, publish=publish))

    def finish(self) -> None:
        """Wait until all checkpoints are durable.

        Raises:
            Exception: the failure that kept a checkpoint from being stored.
        """
        self._wait(0)

    def close(self) -> None:
        """Let the thread end after its last checkpoint, without waiting for it."""
        self._thread.shutdown(wait=False)

    def _wait(self, unstored: int) -> None:
        """Wait until at most this many checkpoints are not stored yet."""
        while self._uploads and (len(self._uploads) > unstored or self._uploads[0].done()):
            self._uploads.popleft().result()

    def _store(self, checkpoint: Checkpoint, *, publish: bool) -> None:
        began = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=scratch_folder()))
        try:
            self._upload(folder, checkpoint, publish=publish)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self.upload_s += time.monotonic() - began

    def _upload(self, folder: Path, checkpoint: Checkpoint, *, publish: bool) -> None:
        """Write a checkpoint's files, upload them under a new name, `state.json` last, and enter it in the list."""
        job, storage = self.context.job, self.context.job.storage
        name = checkpoints.checkpoint_name(checkpoint.images_seen, job.epoch)
        uri = join(job.run_uri, name)
        state = checkpoints.save_checkpoint(folder, checkpoint)
        for file in state.files:
            self._put(folder / file, uri)
        if publish:
            # Before the checkpoint counts: a run that resumes from it will not come by here again.
            published = checkpoints.publish(storage, uri, job.published_uri(name), state)
            if self.log:
                # It travels with the checkpoint too: sent again after a resume, it must not take the scores away.
                self.log.text(*published.record(), state.images_seen, mark=published.mark)
        if self.log and (unsent := self.log.pack()):
            (folder / layout.UNSENT).write_bytes(unsent)
            state = checkpoints.with_file(state, folder / layout.UNSENT)
            self._put(folder / layout.UNSENT, uri)
        (folder / layout.TRAINING_STATE).write_text(state.to_json())
        self._put(folder / layout.TRAINING_STATE, uri)
        listed = checkpoints.Listed(job.epoch, state.images_seen, name)
        checkpoints.enter_checkpoint(storage, job.run_uri, listed, job.config.checkpoint.keep, self.damaged)

    def _put(self, path: Path, uri: str) -> None:
        self.context.job.storage.upload(path, join(uri, path.name))
        self.uploaded_bytes += path.stat().st_size


@dataclass(frozen=True)
class _Found:
    """The checkpoint that rank 0 found, as the other ranks learn of it.

    Attributes:
        state: its `state.json`; None where there is no checkpoint.
        error: why the run cannot go on from it, if so; every rank raises it.
        damaged: names of newer ones that could not be read.
    """

    state: CheckpointState | None
    error: PipelineError | None
    damaged: frozenset[str] = frozenset()


def restore(context: RunContext, state: TrainingState, log: RunLog | None) -> tuple[bool, frozenset[str]]:
    """Load the newest whole checkpoint of the run into the state.

    Called by every rank. Rank 0 reads and broadcasts, so that any number of ranks, with DDP or FSDP2, can resume what
    any other number saved.

    Returns:
        (whether there was one; the names of newer ones that are damaged).

    Raises:
        ModelError: no checkpoint is whole, or the newest is of a run with other settings or data.
    """
    found = _Found(None, None)
    tensors: dict[str, Tensor] = {}
    if context.rank == 0:
        found, tensors = _read(context, state, log)
    found = broadcast_object(found)
    if found.error is not None:
        raise found.error
    if found.state is None:
        return False, found.damaged
    if context.rank == 0 and (change := precision_change(found.state.precision, context.precision)):
        logger.warning("%s", change)
    broadcast(tensors, state.tensors(), context.device)
    state.set_counters(found.state.images_seen, found.state.optimizer_steps, found.state.skipped)
    state.length, state.trained_s = found.state.ends_at(context.config), found.state.trained_s
    return True, found.damaged


def _read(context: RunContext, state: TrainingState, log: RunLog | None) -> tuple[_Found, dict[str, Tensor]]:
    """Return the newest checkpoint and its tensors; errors are returned, because all ranks must learn of them."""
    job = context.job
    try:
        with tempfile.TemporaryDirectory(prefix="restored-", dir=scratch_folder()) as scratch:
            folder = Path(scratch) / "checkpoint"
            stored, damaged = checkpoints.fetch_newest(job.storage, job.run_uri, folder)
            if stored is None:
                return _Found(None, None), {}
            tensors = checkpoints.load_tensors(folder, stored)
            checkpoints.check_resumable(stored, job.config, job.dataset, job.quarantine)
            shapes = {name: tuple(tensor.shape) for name, tensor in state.tensors().items()}
            added = {name for name in shapes.keys() - tensors.keys() if name.startswith(ADDED)}
            tensors |= {name: torch.zeros(shapes[name]) for name in added}
            differing = {n for n, s in shapes.items() ^ {n: tuple(t.shape) for n, t in tensors.items()}.items()}
            if differing:
                raise ModelError(f"the checkpoint holds other tensors than this release's: {sorted(differing)[:5]}")
            if log and (folder / layout.UNSENT).exists():
                log.adopt(folder / layout.UNSENT)
            return _Found(stored, None, damaged), tensors
    except PipelineError as error:
        return _Found(None, error), {}
