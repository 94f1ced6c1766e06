"""Checkpoints of a run: copied to CPU memory at once, written and uploaded while training goes on, and restored."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint, CheckpointState, ModelError
from pipelines.references import initial_weights
from pipelines.scratch import scratch_folder
from pipelines.storage import StorageError, join
from pipelines.tracking import RunLog
from pipelines.training.loop.collectives import broadcast, broadcast_object, gather
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.shell import Shell
from pipelines.training.loop.state import RESIDUAL, TrainingState, load_weights

UNSENT = "unsent.zip"
"""File in a checkpoint's folder with the metrics not yet sent to MLflow: a resumed run does not compute them again."""


class Checkpointer:
    """Saves a run's state through its shell, one checkpoint at a time, which bounds the memory of copies.

    Args:
        log: rank 0's log, whose unsent metrics go into each checkpoint; None on the other ranks.

    Attributes:
        uploaded_bytes: size of the checkpoints stored so far.
        upload_s: seconds that their uploads took, while training went on.
    """

    def __init__(self, context: RunContext, shell: Shell, log: RunLog | None) -> None:
        self.context, self.shell, self.log = context, shell, log
        self.uploaded_bytes, self.upload_s = 0, 0.0
        self._idle = threading.Event()
        self._idle.set()

    def save(self, state: TrainingState, *, publish: bool) -> None:
        """Copy the state and hand it to the shell; called by every rank at the same step.

        Args:
            publish: whether the checkpoint is copied to `published/` as well, where it stays.
        """
        self._idle.wait()
        tensors = gather(state.tensors())
        metrics = {"images_seen": state.images_seen}
        if self.context.rank != 0:
            self.shell.save(None, metrics)
            return
        spec = self.context.spec
        checkpoint = Checkpoint(
            replace(spec, lineage={**spec.lineage, "images_seen": state.images_seen}),
            tensors,
            images_seen=state.images_seen,
            identity=self.context.config.identity(),
            optimizer_steps=state.optimizer_steps,
            skipped=state.skipped,
        )
        self._idle.clear()

        def store(uri: str) -> None:
            began = time.monotonic()
            try:
                self._store(checkpoint, uri, publish=publish)
            finally:
                self.upload_s += time.monotonic() - began
                self._idle.set()

        self.shell.save(store, metrics)

    def finish(self) -> None:
        """Wait until all checkpoints are durable; called by every rank.

        Raises:
            Exception: the failure that kept a checkpoint from being stored.
        """
        self.shell.flush()

    def _store(self, checkpoint: Checkpoint, uri: str, *, publish: bool) -> None:
        """Write the files of a checkpoint and upload them, `state.json` last."""
        job, storage = self.context.job, self.context.job.storage
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=scratch_folder()))
        try:
            state = checkpoints.save_checkpoint(folder, checkpoint)
            if self.log and (unsent := self.log.pack()):
                storage.write(join(uri, UNSENT), unsent)
                self.uploaded_bytes += len(unsent)
            for name in [*state.files, "state.json"]:
                storage.upload(folder / name, join(uri, name))
                self.uploaded_bytes += (folder / name).stat().st_size
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if publish:
            target = join(job.published_uri, f"{state.images_seen:012d}")
            published = checkpoints.publish(storage, uri, target, state)
            if self.log:
                self.log.text(*published.record(), state.images_seen)


@dataclass(frozen=True)
class _Found:
    """The checkpoint that rank 0 found, as the other ranks learn of it.

    Attributes:
        state: its `state.json`; None where there is no checkpoint.
        error: why the run cannot go on from it, if so.
    """

    state: CheckpointState | None
    error: str | None


def restore(context: RunContext, state: TrainingState, shell: Shell, log: RunLog | None) -> bool:
    """Load the newest checkpoint into the state and return True, or return False where there is none.

    Called by every rank. Rank 0 reads and broadcasts, so that any number of ranks, with DDP or FSDP2, can resume what
    any other number saved.

    Raises:
        ModelError: the checkpoint is damaged, or of a run with other settings or data.
    """
    found = _Found(None, None)
    tensors: dict[str, Tensor] = {}
    if context.rank == 0:
        found, tensors = _read(context, state, shell, log)
    found = broadcast_object(found)
    if found.error is not None:
        raise ModelError(found.error)
    if found.state is None:
        return False
    broadcast(tensors, state.tensors(), context.device)
    state.set_counters(found.state.images_seen, found.state.optimizer_steps, found.state.skipped)
    return True


def load_initial_model(context: RunContext, state: TrainingState) -> None:
    """Start a fine-tuning from the weights that `init_from` names, averages included; called by every rank.

    Raises:
        ModelError: there is no such model, or it is of another network.
    """
    weights: dict[str, Tensor] = {}
    error = None
    if context.rank == 0:
        try:
            weights = initial_weights(context.config, context.job.tracker.uri, context.job.storage)
        except (ModelError, StorageError) as failure:
            error = str(failure)
    error = broadcast_object(error)
    if error is not None:
        raise ModelError(error)
    load_weights(state, weights, context.device)


def _read(
    context: RunContext, state: TrainingState, shell: Shell, log: RunLog | None
) -> tuple[_Found, dict[str, Tensor]]:
    """Return the newest checkpoint and its tensors; errors are returned, because all ranks must learn of them."""
    job = context.job
    try:
        with shell.restored() as folder:
            if folder is None:
                return _Found(None, None), {}
            stored, tensors = checkpoints.load_checkpoint(folder)
            checkpoints.check_resumable(stored, job.config, job.dataset, job.quarantine)
            shapes = {name: tuple(tensor.shape) for name, tensor in state.tensors().items()}
            added = {name for name in shapes.keys() - tensors.keys() if name.startswith(RESIDUAL)}
            tensors |= {name: torch.zeros(shapes[name]) for name in added}
            differing = {n for n, s in shapes.items() ^ {n: tuple(t.shape) for n, t in tensors.items()}.items()}
            if differing:
                raise ModelError(f"the checkpoint holds other tensors than this release's: {sorted(differing)[:5]}")
            if log and (folder / UNSENT).exists():
                log.adopt(folder / UNSENT)
            return _Found(stored, None), tensors
    except ModelError as error:
        return _Found(None, str(error)), {}
