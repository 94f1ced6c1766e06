"""The cost of a checkpoint of a sharded network: in parts, gathered on one rank, and by torch's own `async_save`.

    python -m benchmarks.checkpoint [--quick] [--json]

Ranks of one process group, on this machine's cores and gloo, train a diffusion transformer sharded by FSDP2 and save
its state while they train, by each way in turn:

- parts: `Checkpointer`, in which each rank stores what it holds;
- gathered: rank 0 gathers the whole state and stores it, as this project did before;
- dcp: `torch.distributed.checkpoint.async_save`.

Measured are the seconds for which training stands still, images/s while the checkpoint is being stored relative to
those of the same ranks undisturbed, the seconds until it is durable, the memory that saving takes on each rank, and the
bytes that each rank stores.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before torch is imported: spinning threads slow a step down as soon as another process needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from benchmarks.memory import Peak
from benchmarks.results import Size, commit, make_parser, publish
from benchmarks.train_step import machine
from pipelines.checkpoints import Checkpoint, save_checkpoint
from pipelines.config import compose
from pipelines.storage import Storage
from pipelines.training.loop.checkpoint import Checkpointer
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.speed import made_up, made_up_job
from pipelines.training.loop.state import TrainingState, make_state
from pipelines.training.loop.train import step

MIB = 2**20
WAYS = ("parts", "gathered", "dcp")
BATCH = 16
UNDISTURBED_STEPS = 4
SMALL = ["model.width=128", "model.depth=4", "model.heads=4"]
TINY = ["model.width=32", "model.depth=2", "model.heads=2"]


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


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
        self.upload = async_save(state.tensors(), checkpoint_id=self.folder, process_group=self.group)
        done: Callable[[], bool] = self.upload.done
        return done

    def finish(self) -> None:
        """Wait until the checkpoint is durable."""
        self.upload.result()


def main(arguments: list[str] | None = None) -> None:
    """Measure each number of ranks, and publish."""
    parser = make_parser("checkpoint", __doc__, quick="a small network, two ranks, two rounds")
    options = parser.parse_args(arguments)
    size: Size = options.size
    worlds, rounds = size.of((2, 4), (2,), (2,)), size.of(3, 2, 1)
    model = ["model=dit_digits", *size.of(["model.width=384", "model.depth=12", "model.heads=6"], SMALL, TINY)]
    rows = [row for world in worlds for row in measured(world, rounds, model)]
    result: dict[str, Any] = {
        "benchmark": "checkpoint",
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        "torch": torch.__version__,
        "batch_size": BATCH,
        "rounds": rounds,
        "rows": rows,
    }
    stalls = {(row["way"], row["ranks"]): row["stall_s"] for row in rows}
    for way in WAYS[1:]:
        result[f"speedup_{way}"] = {str(world): stalls[way, world] / stalls["parts", world] for world in worlds}
    publish(result, "checkpoint", options)


def measured(world: int, rounds: int, model: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each way on so many ranks: medians over the rounds."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        spawn(one_rank, (world, folder, rounds, model), nprocs=world)
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    for way in WAYS:
        of = [rank["ways"][way] for rank in ranks]
        first = of[0]

        def median(name: str, at: int = 0, of: list[dict[str, Any]] = of) -> float:
            return statistics.median(of[at][name])

        yield {
            "way": way,
            "ranks": world,
            "parameters": ranks[0]["parameters"],
            "stall_s": max(median("stall_s", rank) for rank in range(world)),
            "durable_s": median("durable_s"),
            "speed_while_storing": median("speed"),
            "saving_mib_by_rank": [median("memory_mib", rank) for rank in range(world)],
            "stored_mib_by_rank": [rank["stored_mib"] for rank in of],
            "state_mib_by_rank": [rank["state_mib"] for rank in ranks],
            "stalls_s": first["stall_s"],
        }


def one_rank(rank: int, world: int, folder: Path, rounds: int, model: list[str]) -> None:
    """Train and save on one rank, and write down what it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    settings = ["+experiment=digits", *model, "cluster.parallel=fsdp", "optim.precision=fp32", f"batch_size={BATCH}"]
    config = compose([*settings, "storage=file", f"storage.root=file://{folder}/store", "data.lanes=1"])
    before = resident_bytes()
    context = RunContext.of(made_up_job(config), rank=rank, world_size=world, device=torch.device("cpu"))
    state = make_state(config, context.device, context.precision)
    trained(context, state, 2)
    report: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in state.network.parameters()),
        "state_mib": (resident_bytes() - before) / MIB,
        "ways": {way: {"stall_s": [], "durable_s": [], "speed": [], "memory_mib": []} for way in WAYS},
    }
    makers = {"parts": Parts, "gathered": Gathered, "dcp": Dcp}
    savers = {way: makers[way](context, folder) for way in WAYS}
    for _ in range(1 + rounds):  # the first one is for what is made once, such as buffers and threads
        for way, saver in savers.items():
            saved(context, state, saver, report["ways"][way])
            stored = _stored_mib(folder, way, rank)
            report["ways"][way]["stored_mib"] = stored
            dist.barrier()
            if rank == 0:
                for path in (folder / "gathered", folder / "dcp", folder / "store"):
                    shutil.rmtree(path, ignore_errors=True)
            dist.barrier()
    for way in WAYS:
        for values in report["ways"][way].values():
            if isinstance(values, list):
                del values[0]
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def saved(context: RunContext, state: TrainingState, saver: Any, found: dict[str, list[float]]) -> None:
    """Train undisturbed, save, and train on until the checkpoint is durable; add what it took."""
    dist.barrier()
    undisturbed = trained(context, state, UNDISTURBED_STEPS)
    dist.barrier()
    with Peak(resident_bytes) as memory:
        began = time.monotonic()
        done = saver.save(state)
        found["stall_s"].append(time.monotonic() - began)
        steps, training = 0, time.monotonic()
        over = False
        while not over:
            trained(context, state, 1)
            steps += 1
            flag = torch.tensor([0.0 if done() else 1.0])
            dist.all_reduce(flag)
            over = not flag.item()
        speed = steps * BATCH / (time.monotonic() - training)
        saver.finish()
        found["durable_s"].append(time.monotonic() - began)
    found["speed"].append(speed / undisturbed)
    found["memory_mib"].append(memory.bytes / MIB)


def trained(context: RunContext, state: TrainingState, steps: int) -> float:
    """Train some steps on random images, and return images/s."""
    whole = made_up(context.config)
    piece = whole[context.rank * BATCH // context.world_size : (context.rank + 1) * BATCH // context.world_size]
    began = time.monotonic()
    for _ in range(steps):
        step(context, state, replace(piece, ordinals=piece.ordinals + state.images_seen))
    return steps * BATCH / (time.monotonic() - began)


def _stored_mib(folder: Path, way: str, rank: int) -> float:
    """Return the size of what a rank has stored."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    if way == "parts":
        files = [path for path in files if path.name.startswith(f"part-{rank:05d}")]
    elif way == "dcp":
        files = [path for path in files if path.name.startswith(f"__{rank}_")]
    else:
        files = [path for path in files if path.parent.name == "gathered"] if rank == 0 else []
    return sum(path.stat().st_size for path in files) / MIB


if __name__ == "__main__":
    main()
