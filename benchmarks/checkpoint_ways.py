"""Three ways to save a sharded network, which `benchmarks.checkpoint` compares."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from pipelines.checkpoints import Checkpoint, save_checkpoint
from pipelines.storage import Storage
from pipelines.training.loop.checkpoint import Checkpointer
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.state import TrainingState


class Parts:
    """This project's way."""

    def __init__(self, context: RunContext, folder: Path) -> None:
        self.saver = Checkpointer(context, None)

    def save(self, state: TrainingState) -> Callable[[], bool]:
        """Begin to save, and return whether this rank's part is stored."""
        self.saver.save(state, publish=False)
        upload = self.saver._uploads[-1]
        return upload.done

    def finish(self) -> None:
        """Wait until the checkpoint is durable."""
        self.saver.finish()

    def close(self) -> None:
        """Let the thread end."""
        self.saver.close()


class Gathered:
    """Rank 0 gathers whole tensors, one after the other, and stores them in whole files."""

    def __init__(self, context: RunContext, folder: Path) -> None:
        self.context, self.folder = context, folder / "gathered"
        self.thread = ThreadPoolExecutor(1)
        self.upload: Future[None] | None = None

    def save(self, state: TrainingState) -> Callable[[], bool]:
        """Begin to save, and return whether that is done."""
        found = {name: _whole(tensor) for name, tensor in state.tensors().items()}
        if self.context.rank != 0:
            return lambda: True
        tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
        checkpoint = Checkpoint(self.context.spec, tensors, state.images_seen, {}, state.optimizer_steps)
        self.upload = self.thread.submit(self._store, checkpoint)
        return self.upload.done

    def finish(self) -> None:
        """Wait until the checkpoint is durable."""
        if self.upload:
            self.upload.result()

    def close(self) -> None:
        """Let the thread end."""
        self.thread.shutdown()

    def _store(self, checkpoint: Checkpoint) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as scratch:
            state = save_checkpoint(Path(scratch), checkpoint)
            for name in [*state.files, "state.json"]:
                Storage().upload(Path(scratch, name), f"file://{self.folder}/{name}")


def _whole(tensor: Tensor) -> Tensor | None:
    """Return a copy of a whole tensor on rank 0, None on the others."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone() if rank == 0 else None
    rows, part = -(-tensor.shape[0] // ranks), tensor.to_local().detach()
    part = torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])
    if rank != 0:
        dist.gather(part, dst=0)
        return None
    whole = part.new_empty(rows * ranks, *part.shape[1:])
    dist.gather(part, list(whole.split(rows)), dst=0)
    return whole[: tensor.shape[0]]


class Dcp:
    """torch's distributed checkpoint, copied and written while training goes on."""

    def __init__(self, context: RunContext, folder: Path) -> None:
        self.folder, self.group = folder / "dcp", dist.new_group(backend="gloo")
        self.upload: Any = None

    def save(self, state: TrainingState) -> Callable[[], bool]:
        """Begin to save, and return whether that is done."""
        writer = FileSystemWriter(self.folder, sync_files=False)
        self.upload = async_save(state.tensors(), storage_writer=writer, process_group=self.group)
        done: Callable[[], bool] = self.upload.done
        return done

    def finish(self) -> None:
        """Wait until the checkpoint is durable."""
        self.upload.result()
        self.upload = None  # it holds the copies

    def close(self) -> None:
        """Let the process group end."""
        dist.destroy_process_group(self.group)


Way = Parts | Gathered | Dcp
WAYS: dict[str, Callable[[RunContext, Path], Way]] = {"parts": Parts, "gathered": Gathered, "dcp": Dcp}
"""Makes each way, by its name, for a rank and a folder."""
