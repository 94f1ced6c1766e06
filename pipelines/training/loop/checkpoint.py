"""Checkpoints of a run: copied to CPU memory at once, written and uploaded while training goes on, and restored.

A network that every rank has whole is stored by rank 0. Of a sharded one, each rank stores what it holds, and rank 0
enters the checkpoint in the list of the run when all parts are there.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint, CheckpointState, ModelError, Resumable
from pipelines.checkpoints.parts import Part, PartsIndex, TensorRows
from pipelines.checkpoints.sharded import check_file, read_index, read_rows
from pipelines.environment.scratch import scratch_folder
from pipelines.presentation.errors import PipelineError
from pipelines.storage import NotFoundError, join, layout
from pipelines.tracking import RunLog
from pipelines.training.loop.collectives import (
    all_gather_objects,
    broadcast,
    broadcast_object,
    copies_on_cpu,
    from_rank_0,
    group_store,
    held_rows,
    written_rows,
)
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.hardware import precision_change
from pipelines.training.loop.local_copies import LocalCopies
from pipelines.training.loop.state import ADDED, TrainingState

logger = logging.getLogger(__name__)
T = TypeVar("T")
POLL_S = 0.1
"""Seconds between looks whether the other ranks have stored their parts."""
PARTS_GRACE_S = 30.0
"""Seconds for which rank 0 waits for the parts of the others after its training has ended by an error: they may be
well, and still uploading."""


class Checkpointer:
    """Stores a run's state while training goes on, in a thread, one checkpoint after the other.

    Args:
        log: rank 0's log, whose unsent metrics go into each checkpoint; None on the other ranks.
        damaged: names of stored checkpoints that could not be read, which leave the run's list.
        copies: the copies on the nodes, where they are kept.

    Attributes:
        uploaded_bytes: size of the checkpoints stored so far; on other ranks than 0, of this rank's parts of them.
        upload_s: seconds that their uploads took, while training went on.
    """

    def __init__(
        self,
        context: RunContext,
        log: RunLog | None,
        damaged: Collection[str] = frozenset(),
        copies: LocalCopies | None = None,
    ) -> None:
        self.context, self.log, self.damaged, self.copies = context, log, damaged, copies
        self.uploaded_bytes, self.upload_s = 0, 0.0
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._uploads: deque[Future[None]] = deque()
        self._give_up_at = math.inf
        self._store = group_store()

    def save(self, state: TrainingState, *, publish: bool) -> None:
        """Copy the state and store it in the background; called by every rank at the same step.

        A rank waits where `checkpoint.backlog` copies wait already behind the one that is being stored: a store that is
        away must not fill the memory.

        Args:
            publish: whether the checkpoint is copied to `published/` as well, where it stays.

        Raises:
            Exception: what kept an earlier checkpoint from being stored.
        """
        name, checkpoint = self._described(state)
        sharded, backlog = isinstance(state.network, FSDPModule), self.context.config.checkpoint.backlog
        if sharded or self.context.rank == 0:
            self._wait(backlog)
        rows = written_rows(state.tensors()) if sharded or self.copies else []
        if self.copies:
            self.copies.keep(name, checkpoint, rows)
        if sharded:
            self._uploads.append(self._thread.submit(self._run, self._store_part, name, checkpoint, [*rows], publish))
        elif self.context.rank == 0:
            checkpoint = replace(checkpoint, tensors=copies_on_cpu(state.tensors()))
            self._uploads.append(self._thread.submit(self._run, self._store_whole, name, checkpoint, publish))

    def keep(self, state: TrainingState) -> None:
        """Copy the state to the memory of the nodes alone; called by every rank at the same step.

        Raises:
            Exception: what kept an earlier copy from being made.
        """
        assert self.copies is not None
        name, checkpoint = self._described(state)
        self.copies.keep(name, checkpoint, written_rows(state.tensors()))

    def _described(self, state: TrainingState) -> tuple[str, Checkpoint]:
        """Return the name of a checkpoint of a state, the same on all ranks, and its description without tensors."""
        spec = self.context.spec
        name = broadcast_object(checkpoints.checkpoint_name(state.images_seen, self.context.job.epoch))
        return name, Checkpoint(
            replace(spec, lineage={**spec.lineage, "images_seen": state.images_seen}),
            {},
            images_seen=state.images_seen,
            identity=self.context.config.identity(),
            optimizer_steps=state.optimizer_steps,
            skipped=state.skipped,
            length=state.length,
            trained_s=state.trained_s,
        )

    def finish(self) -> None:
        """Wait until all checkpoints are durable, and copies made; of a sharded one, rank 0 waits for all parts.

        Raises:
            Exception: the failure that kept a checkpoint from being stored.
        """
        self._wait(0)
        if self.copies:
            self.copies.finish()

    def close(self) -> None:
        """Let the thread end after its last checkpoint, without waiting for it."""
        self._give_up_at = time.monotonic() + PARTS_GRACE_S
        self._thread.shutdown(wait=False)
        if self.copies:
            self.copies.close()

    def _wait(self, unstored: int) -> None:
        """Wait until at most this many checkpoints are not stored yet."""
        while self._uploads and (len(self._uploads) > unstored or self._uploads[0].done()):
            self._uploads.popleft().result()

    def _run(self, store: Callable[..., int], *arguments: Any) -> None:
        """Store a checkpoint, or this rank's part of one, and count it."""
        began = time.monotonic()
        try:
            self.uploaded_bytes += store(*arguments)
        finally:
            self.upload_s += time.monotonic() - began

    def _store_whole(self, name: str, checkpoint: Checkpoint, publish: bool) -> int:
        """Write a checkpoint's files, upload them under a new name, and enter it in the list."""
        uri = join(self.context.job.run_uri, name)
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=scratch_folder()) as scratch:
            folder = Path(scratch)
            state = checkpoints.save_checkpoint(folder, checkpoint)
            for file in state.files:
                self.context.job.storage.upload(folder / file, join(uri, file))
        return self._enter(name, state, publish)

    def _store_part(self, name: str, checkpoint: Checkpoint, rows: list[TensorRows], publish: bool) -> int:
        """Upload what this rank holds as a part; on rank 0, enter the checkpoint when all parts are there.

        Args:
            rows: what is uploaded; the list is emptied then, so that rank 0 keeps no copy while it waits for others.
        """
        rank, storage = self.context.rank, self.context.job.storage
        uri, file = join(self.context.job.run_uri, name), layout.part_file(rank)
        part = Part.of(rank, rows)
        storage.upload_stream(part.stream, join(uri, file))
        size, record = part.size, json.dumps([part.sha256(), part.size, part.index.to_json().decode()])
        del part
        rows.clear()
        if rank != 0:
            assert self._store is not None
            self._store.set(f"{name}/{rank}", record)
            return size
        indices, files, sizes = [], {}, {}
        for other, stored in enumerate([record.encode(), *self._other_records(name)]):
            file = layout.part_file(other)
            files[file], sizes[file], index = json.loads(stored)
            indices.append(PartsIndex.from_json(index.encode(), file))
        spec = checkpoint.spec.to_json().encode()
        for file, data in ((layout.MODEL, spec), (layout.PARTS_INDEX, PartsIndex.joined(indices, uri).to_json())):
            storage.write(join(uri, file), data)
            files[file], sizes[file] = hashlib.sha256(data).hexdigest(), len(data)
        return self._enter(name, checkpoint.state(files, sizes), publish)

    def _other_records(self, name: str) -> Iterator[bytes]:
        """Yield what the other ranks say of their parts, in the order of their ranks.

        Raises:
            PipelineError: the training has ended meanwhile, so that nobody knows whether they ever will.
        """
        assert self._store is not None
        for rank in range(1, self.context.world_size):
            key = f"{name}/{rank}"
            while not self._store.check([key]):
                time.sleep(POLL_S)
                if time.monotonic() > self._give_up_at:
                    raise PipelineError(f"{name} is not complete: rank {rank} had not stored its part at the end")
            yield self._store.get(key)
            self._store.delete_key(key)

    def _enter(self, name: str, state: CheckpointState, publish: bool) -> int:
        """Complete a checkpoint, whose other files are stored, with `state.json`, enter it in the list, and return its
        size in bytes."""
        job, storage = self.context.job, self.context.job.storage
        uri = join(job.run_uri, name)
        if publish:
            # Before the checkpoint counts: a run that resumes from it will not come by here again.
            published = checkpoints.publish(storage, uri, job.published_uri(name), state)
            if self.log:
                # It travels with the checkpoint too: sent again after a resume, it must not take the scores away.
                self.log.text(*published.record(), state.images_seen, mark=published.mark)
        if self.log and (unsent := self.log.pack()):
            storage.write(join(uri, layout.UNSENT), unsent)
            state = checkpoints.with_file(state, layout.UNSENT, unsent)
        text = state.to_json().encode()
        storage.write(join(uri, layout.TRAINING_STATE), text)
        listed = checkpoints.Listed(job.epoch, state.images_seen, name)
        checkpoints.enter_checkpoint(storage, job.run_uri, listed, job.config.checkpoint.keep, self.damaged)
        return sum(state.sizes.values()) + len(text)


def restore(
    context: RunContext, state: TrainingState, log: RunLog | None, copies: LocalCopies | None = None
) -> tuple[bool, frozenset[str]]:
    """Load the newest whole checkpoint of the run into the state; called by every rank.

    It is read from the memory of the nodes, where they have it or a newer one between them, else from the store. Any
    number of ranks, with DDP or FSDP2, can resume what any other number saved: a checkpoint in whole files is read and
    broadcast by rank 0, of a sharded one each rank reads the rows that it holds.

    Returns:
        (whether there was one; the names of newer ones that are damaged).

    Raises:
        ModelError: no checkpoint is whole, or the newest is of a run with other settings or data.
    """
    found = from_rank_0(lambda: _resumable(context))
    tensors = state.tensors()
    stored, damaged = _load_copy(context, copies, tensors, found), dict[str, str]()
    if stored is None:
        stored, damaged = found.load_newest(lambda uri, stored: _load(context, uri, stored, tensors))
    if context.rank == 0:
        for name, problem in damaged.items():
            logger.warning("%s: %s; an older checkpoint is used", join(found.folder, name), problem)
    if stored is None:
        return False, frozenset()
    if stored.differing:
        raise ModelError(f"the checkpoint holds other tensors than this release's: {stored.differing[:5]}")
    if log and stored.unsent:
        log.adopt(io.BytesIO(stored.unsent))
    if context.rank == 0 and (change := precision_change(stored.state.precision, context.precision)):
        logger.warning("%s", change)
    state.set_counters(stored.state.images_seen, stored.state.optimizer_steps, stored.state.skipped)
    state.length, state.trained_s = stored.state.ends_at(context.config), stored.state.trained_s
    return True, frozenset(damaged)


@dataclass(frozen=True)
class _Loaded:
    """What a rank knows of the checkpoint that it has loaded.

    Attributes:
        differing: names of tensors that the checkpoint lacks, or has in another shape; nothing was loaded then.
        unsent: on rank 0, the metrics that came with it.
    """

    state: CheckpointState
    differing: tuple[str, ...] = ()
    unsent: bytes | None = None


def _resumable(context: RunContext) -> Resumable:
    """Return the checkpoints of the run.

    Raises:
        ModelError: none is complete, or they are of other settings or data.
    """
    job = context.job
    found = checkpoints.resumable_checkpoints(job.storage, job.run_uri)
    if found.complete:
        checkpoints.check_resumable(found.complete[0][1], job.config, job.dataset, job.quarantine)
    return found


def _load_copy(
    context: RunContext, copies: LocalCopies | None, tensors: Mapping[str, Tensor], stored: Resumable
) -> _Loaded | None:
    """Overwrite the tensors with those of the newest copy on the nodes; None where the store has a newer checkpoint,
    or no copy is whole. Called by every rank.

    Raises:
        ModelError: the newest copy is of other settings or data.
    """
    began = time.monotonic()
    newest = stored.complete[0][0] if stored.complete else None
    for listed, uri, state in copies.found(tensors, newest) if copies else ():
        checkpoints.check_resumable(state, context.job.config, context.job.dataset, context.job.quarantine)
        try:
            found = _load(context, uri, state, tensors)
        except ModelError as error:
            logger.warning("the local copy at %s images is left out: %s", f"{listed.images_seen:,}", error)
            continue
        if context.rank == 0:
            seconds = time.monotonic() - began
            logger.warning(
                "the state at %s images came from local copies in %.2f s", f"{listed.images_seen:,}", seconds
            )
        return found
    return None


def _load(context: RunContext, uri: str, state: CheckpointState, tensors: Mapping[str, Tensor]) -> _Loaded:
    """Overwrite the tensors with those of a checkpoint; called by every rank.

    Raises:
        ModelError: on every rank, where any of them has found a byte that is not as it was written.
    """
    storage, first = context.job.storage, context.rank == 0
    values: dict[str, Tensor] = {}
    index, unsent = PartsIndex({}), None
    with tempfile.TemporaryDirectory(prefix="restored-", dir=scratch_folder()) as scratch:
        with _on_every_rank():
            if state.sharded:
                index = read_index(storage, uri, state.files)
            elif first:
                folder = Path(scratch) / "checkpoint"
                values = checkpoints.load_tensors(folder, checkpoints.fetch_checkpoint(storage, uri, folder))
            if first and layout.UNSENT in state.files:
                unsent = storage.read(join(uri, layout.UNSENT))
                check_file(state.files, layout.UNSENT, unsent)
        there = {name: tuple(tensor.shape) for name, tensor in (index.tensors if state.sharded else values).items()}
        there = broadcast_object(there)
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        added = {name for name in wanted.keys() - there.keys() if name.startswith(ADDED)}
        there |= {name: wanted[name] for name in added}
        if differing := tuple(sorted(name for name, _ in wanted.items() ^ there.items())):
            return _Loaded(state, differing)
        if state.sharded:
            held = held_rows(tensors)
            with _on_every_rank():
                read_rows(storage, uri, index, [rows for rows in held if rows.name not in added])
            for rows in held:
                if rows.name in added:
                    rows.values.zero_()
        else:
            broadcast(values | {name: torch.zeros(wanted[name]) for name in added}, tensors, context.device)
    return _Loaded(state, (), unsent)


@contextmanager
def _on_every_rank() -> Iterator[None]:
    """Do something on every rank that may find a damaged file, and raise on all of them what the first one found.

    Raises:
        ModelError: a file is damaged or gone.
    """
    problem = None
    try:
        yield
    except (ModelError, NotFoundError) as error:
        problem = str(error)
    if found := [other for other in all_gather_objects(problem) if other]:
        raise ModelError(found[0])
