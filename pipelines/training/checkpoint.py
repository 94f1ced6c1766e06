"""Checkpoints of a run: a quick copy to CPU memory, written and uploaded behind training's back; and the way back."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ddpm.interop import ModelSpec
from pipelines.checkpoints import (
    Checkpoint,
    CheckpointState,
    ModelError,
    check_resumable,
    load_checkpoint,
    publish,
    save_checkpoint,
)
from pipelines.models import initial_weights
from pipelines.storage import StorageError, join
from pipelines.tracking import RunLog
from pipelines.training.parallel import gather, share, spread
from pipelines.training.shell import Job, Shell
from pipelines.training.state import Training, start_from

UNSENT = "unsent.zip"
"""What of the run MLflow has not been told, in a checkpoint's folder: a resumed run does not come by it again."""


class Checkpointer:
    """Saves a run's state through its shell, one checkpoint under way at a time, which bounds the memory of copies.

    Attributes:
        uploaded_bytes: of the checkpoints that are stored.
        upload_s: seconds that this took, while training went on.
    """

    def __init__(self, job: Job, spec: ModelSpec, shell: Shell, log: RunLog | None, rank: int) -> None:
        self.job, self.spec, self.shell, self.log, self.rank = job, spec, shell, log, rank
        self.uploaded_bytes, self.upload_s = 0, 0.0
        self._idle = threading.Event()
        self._idle.set()

    def save(self, training: Training, *, keep: bool) -> None:
        """Copy the state and hand it to the shell; called by every rank at the same step.

        Args:
            keep: copy the checkpoint to `published/` as well, where it stays.
        """
        self._idle.wait()
        tensors = gather(training.tensors())
        metrics = {"images_seen": training.images_seen}
        if self.rank != 0:
            self.shell.save(None, metrics)
            return
        lineage = {**self.spec.lineage, "images_seen": training.images_seen}
        checkpoint = Checkpoint(
            replace(self.spec, lineage=lineage),
            tensors,
            images_seen=training.images_seen,
            identity=self.job.config.identity(),
            optimizer_steps=training.optimizer_steps,
            skipped=training.skipped,
        )
        self._idle.clear()

        def store(uri: str) -> None:
            began = time.monotonic()
            try:
                self._store(checkpoint, uri, keep=keep)
            finally:
                self.upload_s += time.monotonic() - began
                self._idle.set()

        self.shell.save(store, metrics)

    def finish(self) -> None:
        """Wait until all is durable; called by every rank.

        Raises:
            Exception: what kept a checkpoint from being stored.
        """
        self.shell.flush()

    def _store(self, checkpoint: Checkpoint, uri: str, *, keep: bool) -> None:
        storage = self.job.storage
        folder = Path(tempfile.mkdtemp(prefix="ddpm-checkpoint-"))
        try:
            state = save_checkpoint(folder, checkpoint)
            if self.log and (unsent := self.log.pack()):
                storage.write(join(uri, UNSENT), unsent)
                self.uploaded_bytes += len(unsent)
            for name in [*state.files, "state.json"]:
                storage.upload(folder / name, join(uri, name))
                self.uploaded_bytes += (folder / name).stat().st_size
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if keep:
            target = join(self.job.published_uri, f"{state.images_seen:012d}")
            published = publish(storage, uri, target, state)
            if self.log:
                self.log.text(*published.record(), state.images_seen)


@dataclass(frozen=True)
class _Found:
    """What rank 0 tells the others of a checkpoint: its state, or why there is none to go on from."""

    state: CheckpointState | None
    error: str | None


def restore(training: Training, shell: Shell, job: Job, log: RunLog | None, rank: int, device: torch.device) -> bool:
    """Put the newest checkpoint's state back, if there is one; whether there was. Called by every rank.

    Rank 0 reads and sends; so any number of ranks, with whole networks or parts, resumes what any other saved.

    Raises:
        ModelError: damaged, or of a run with other settings or data.
    """
    found = _Found(None, None)
    tensors: dict[str, Tensor] = {}
    if rank == 0:
        found, tensors = _read(training, shell, job, log)
    found = share(found)
    if found.error is not None:
        raise ModelError(found.error)
    if found.state is None:
        return False
    spread(tensors, training.tensors(), device)
    training.images_seen, training.optimizer_steps = found.state.images_seen, found.state.optimizer_steps
    training.skipped = found.state.skipped
    if training.power is not None:
        training.power.images_seen = training.images_seen
    return True


def initialize(training: Training, job: Job, rank: int, device: torch.device) -> None:
    """Start a fine-tuning from the weights that `init_from` names, averages included; called by every rank.

    Raises:
        ModelError: no such model, or one of another network.
    """
    weights, error = {}, None
    if rank == 0:
        try:
            weights = initial_weights(job.config, job.tracker.uri, job.storage)
        except (ModelError, StorageError) as failure:
            error = str(failure)
    error = share(error)
    if error is not None:
        raise ModelError(error)
    start_from(training, weights, device)


def _read(training: Training, shell: Shell, job: Job, log: RunLog | None) -> tuple[_Found, dict[str, Tensor]]:
    try:
        with shell.restored() as folder:
            if folder is None:
                return _Found(None, None), {}
            state, tensors = load_checkpoint(folder)
            check_resumable(state, job.config, job.dataset, job.quarantine)
            shapes = {name: tuple(tensor.shape) for name, tensor in training.tensors().items()}
            differing = {n for n, s in shapes.items() ^ {n: tuple(t.shape) for n, t in tensors.items()}.items()}
            if differing:
                raise ModelError(f"the checkpoint holds other tensors than this release's: {sorted(differing)[:5]}")
            if log and (folder / UNSENT).exists():
                log.adopt(folder / UNSENT)
            return _Found(state, None), tensors
    except ModelError as error:
        return _Found(None, str(error)), {}
