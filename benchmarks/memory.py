"""What a training takes of memory beside what `pipelines.training.memory` says beforehand.

    python -m benchmarks.memory [--quick] [--json]

Ranks train a diffusion transformer on this machine's cores and save checkpoints meanwhile. Measured is the peak of each
rank's anonymous memory beyond that of the same process before it has the network, when it has trained a tiny one.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before torch is imported: spinning threads slow a step down as soon as another process needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.results import Size, commit, make_parser, publish
from benchmarks.train_step import machine
from pipelines.config import Config, compose
from pipelines.training.loop.checkpoint import Checkpointer
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.speed import made_up, made_up_job
from pipelines.training.loop.state import make_network, make_state
from pipelines.training.loop.train import step
from pipelines.training.memory import Placement, estimate

MIB = 2**20
BATCH = 4
SHAPES = {
    "tiny": ("model.width=32", "model.depth=2", "model.heads=2"),
    "3M": ("model.width=128", "model.depth=8", "model.heads=4"),
    "30M": ("model.width=384", "model.depth=11", "model.heads=6"),
    "300M": ("model.width=960", "model.depth=18", "model.heads=15"),
}
CASES = (("ddp", 1), ("ddp", 2), ("fsdp", 2))
STEPS = 3


class Peak:
    """The largest anonymous memory of this process while the context lasts, beyond that at its beginning."""

    def __enter__(self) -> Peak:
        self.over = threading.Event()
        self.before = self.most = anonymous_bytes()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    @property
    def bytes(self) -> int:
        """The growth."""
        return self.most - self.before

    def _watch(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, anonymous_bytes())


def anonymous_bytes() -> int:
    """Return the resident memory of this process that no file backs."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


def settings(shape: str, parallel: str, folder: Path) -> Config:
    """Return the configuration of a measured training."""
    plain = [
        "+experiment=digits",
        "model=dit_small",
        *SHAPES[shape],
        f"cluster.parallel={parallel}",
        "optim.precision=fp32",
    ]
    return compose(
        [*plain, f"batch_size={BATCH}", "data.lanes=1", "storage=file", f"storage.root=file://{folder}/store"]
    )


def train(config: Config, rank: int, world: int, *, save: bool) -> None:
    """Train some steps and save a checkpoint, as one rank."""
    context = RunContext.of(made_up_job(config), rank=rank, world_size=world, device=torch.device("cpu"))
    state, whole = make_state(config, context.device, context.precision), made_up(config)
    saver = Checkpointer(context, None)
    piece = whole[rank * BATCH // world : (rank + 1) * BATCH // world]
    for at in range(STEPS):
        step(context, state, replace(piece, ordinals=piece.ordinals + state.images_seen))
        if save and at == 0:
            saver.save(state, publish=False)
    saver.finish()
    saver.close()


def one_rank(rank: int, world: int, folder: Path, shape: str, parallel: str) -> None:
    """Measure one rank, and write down what it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    train(settings("tiny", parallel, folder), rank, world, save=True)
    found = {}
    for save in (False, True):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        dist.barrier()
        with Peak() as peak:
            train(settings(shape, parallel, folder), rank, world, save=save)
        found["saving" if save else "training"] = peak.bytes
        found["process"] = peak.before
        if rank == 0:
            shutil.rmtree(folder / "store", ignore_errors=True)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured(shape: str, parallel: str, world: int) -> dict[str, Any]:
    """Return the estimate and the measurement of one case, of the rank that took most."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = settings(shape, parallel, folder)
        expected = estimate(config, Placement(world, world, "cpu", "fp32"))
        spawn(one_rank, (world, folder, shape, parallel), nprocs=world)
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
        with torch.device("meta"):
            parameters = sum(p.numel() for p in make_network(config).parameters())
    row: dict[str, Any] = {"parameters": parameters, "parallel": parallel, "ranks": world}
    sizes = {"training": sum(expected.device.values())}
    sizes["saving"] = sizes["training"] + expected.host["staging"]
    for name, size in sizes.items():
        found = max(rank[name] for rank in ranks)
        row |= {f"{name}_mib": found / MIB, f"{name}_expected_mib": size / MIB, f"{name}_ratio": size / found}
    row["smallest_rank"] = min(rank["training"] for rank in ranks) / max(rank["training"] for rank in ranks)
    return row


def main(arguments: list[str] | None = None) -> None:
    """Measure each case, and publish."""
    parser = make_parser("memory", __doc__, quick="a network of 30 M parameters on one and two ranks")
    options = parser.parse_args(arguments)
    size: Size = options.size
    full = [("30M", *case) for case in CASES] + [("300M", *case) for case in (CASES[0], CASES[2])]
    rows = [measured(*case) for case in size.of(full, full[:3], [("3M", "fsdp", 2)])]
    result: dict[str, Any] = {
        "benchmark": "memory",
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        "torch": torch.__version__,
        "batch_size": BATCH,
        "rows": rows,
    }
    publish(result, "memory", options)


if __name__ == "__main__":
    main()
