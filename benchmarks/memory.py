"""Memory that a training takes, beside what `pipelines.training.memory` says beforehand.

    python -m benchmarks.memory [--quick] [--network 30M] [--ranks 4 8] [--json]

Ranks train a diffusion transformer on this machine's cores and save checkpoints meanwhile. Measured is the peak of each
rank's anonymous memory beyond that of the same process before it has the network, when it has trained a tiny one. What
larger networks take on clusters of GPUs is worked out by the same estimate. A part of the cases may be measured alone:
their rows take the place of the older ones in the file of results, and the others stay.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before torch is imported: spinning threads slow a step down as soon as another process needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.results import Rows, Size, commit, make_parser, publish, with_earlier
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
"""Images of a step of all ranks, or one for each rank where there are more."""
SHAPES = {
    "tiny": ("model.width=32", "model.depth=2", "model.heads=2"),
    "3M": ("model.width=128", "model.depth=8", "model.heads=4"),
    "30M": ("model.width=384", "model.depth=11", "model.heads=6"),
    "300M": ("model.width=960", "model.depth=18", "model.heads=15"),
}
CASES = {
    "30M": (("ddp", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("fsdp", 8)),
    "300M": (("ddp", 1), ("fsdp", 2), ("fsdp", 4)),
}
STEPS = 3
NETWORKS = {"0.1 B": (768, 10), "0.7 B": (1152, 28), "2 B": (2048, 28), "8 B": (3584, 36)}
"""Width and depth of diffusion transformers of about so many parameters; heads have 64 channels."""
CLUSTERS, PER_NODE = (8, 64, 512), 8
STORED = 20
"""Bytes of a checkpoint for each parameter: the weight, AdamW's two moments, the average, and what it lacks."""
STORE_EVERY_S, LOCAL_EVERY_S, RESTART_S = 600, 60, 30
"""Seconds between checkpoints, between copies on the nodes, and from a failure until workers read their state."""
REQUEST_MIB = 8
"""Size of the pieces of an upload."""


class Peak:
    """The largest memory of this process while the context lasts, beyond that at its beginning.

    Args:
        measure: returns the bytes that count.
        every_s: seconds between looks.
    """

    def __init__(self, measure: Callable[[], int], every_s: float = 0.002) -> None:
        self.measure, self.every_s = measure, every_s

    def __enter__(self) -> Peak:
        self.over = threading.Event()
        self.before = self.most = self.measure()
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
        while not self.over.wait(self.every_s):
            self.most = max(self.most, self.measure())


def anonymous_bytes() -> int:
    """Return the resident memory of this process that no file backs."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


def settings(shape: str, parallel: str, world: int, folder: Path) -> Config:
    """Return the configuration of a measured training."""
    plain = [
        "+experiment=digits",
        "model=dit_small",
        *SHAPES[shape],
        f"cluster.parallel={parallel}",
        "optim.precision=fp32",
    ]
    batch_size = max(BATCH, world)
    return compose(
        [*plain, f"batch_size={batch_size}", "data.lanes=1", "storage=file", f"storage.root=file://{folder}/store"]
    )


def train(config: Config, rank: int, world: int, *, save: bool) -> None:
    """Train some steps and save a checkpoint, as one rank."""
    context = RunContext.of(made_up_job(config), rank=rank, world_size=world, device=torch.device("cpu"))
    state, whole = make_state(config, context.device, context.precision), made_up(config)
    saver = Checkpointer(context, None)
    piece = whole[rank * config.batch_size // world : (rank + 1) * config.batch_size // world]
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
    train(settings("tiny", parallel, world, folder), rank, world, save=True)
    found = {}
    for save in (False, True):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        dist.barrier()
        with Peak(anonymous_bytes) as peak:
            train(settings(shape, parallel, world, folder), rank, world, save=save)
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
        config = settings(shape, parallel, world, folder)
        expected = estimate(config, Placement(world, world, "cpu", "fp32"))
        spawn(one_rank, (world, folder, shape, parallel), nprocs=world)
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
        with torch.device("meta"):
            parameters = sum(p.numel() for p in make_network(config).parameters())
    row: dict[str, Any] = {
        "network": shape,
        "parameters": parameters,
        "parallel": parallel,
        "ranks": world,
        "batch_size": config.batch_size,
        "commit": commit(),
    }
    sizes = {"training": sum(expected.device.values())}
    sizes["saving"] = sizes["training"] + expected.host["staging"]
    for name, size in sizes.items():
        found = max(rank[name] for rank in ranks)
        row |= {f"{name}_mib": found / MIB, f"{name}_expected_mib": size / MIB, f"{name}_ratio": size / found}
    row["smallest_rank"] = min(rank["training"] for rank in ranks) / max(rank["training"] for rank in ranks)
    return row


def worked_out(name: str, gpus: int) -> dict[str, Any]:
    """Return what a network takes on a cluster, sharded over the eight GPUs of each node."""
    width, depth = NETWORKS[name]
    model = ["model=dit_small", f"model.width={width}", f"model.depth={depth}", f"model.heads={width // 64}"]
    model += ["model.patch_size=4", "model.checkpointing=true", "data.image_size=64", "data.channels=3"]
    cluster = ["cluster.parallel=hsdp", f"cluster.shard_size={PER_NODE}", "cluster.gpus_per_worker=1"]
    cluster += ["cluster.param_dtype=bf16", "optim.precision=bf16", f"cluster.num_workers={gpus}"]
    rest = [f"batch_size={8 * gpus}", "data.lanes=1", "storage=file", "storage.root=file:///nowhere"]
    config = compose(["+experiment=digits", *model, *cluster, *rest])
    found = estimate(config, Placement(gpus, PER_NODE, "cuda", "bf16"))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in make_network(config).parameters())
    part = STORED * parameters / gpus
    write_s = [PER_NODE * part / speed / 1e9 for speed in (1, 10)]
    read_s = [STORED * parameters / speed / 1e9 for speed in (1, 10)]
    return {
        "network": name,
        "parameters": parameters,
        "gpus": gpus,
        "gpu_gib": sum(found.device.values()) / 2**30,
        "node_gib": sum(found.node.values()) / 2**30,
        "part_gib": part / 2**30,
        "requests": gpus * (math.ceil(part / MIB / REQUEST_MIB) + 2) + 3,
        "write_s": write_s,
        "read_s": read_s,
        "failure_s": [STORE_EVERY_S / 2 + RESTART_S + seconds for seconds in read_s],
        # A lost node's part comes from the one node that has it too.
        "local_failure_s": [LOCAL_EVERY_S / 2 + RESTART_S + seconds for seconds in write_s],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure each case, and publish."""
    parser = make_parser("memory", __doc__, quick="a network of 30 M parameters on one and two ranks")
    parser.add_argument("--network", nargs="+", choices=SHAPES, default=list(SHAPES), help="measure these alone")
    parser.add_argument("--ranks", nargs="+", type=int, help="measure these numbers of ranks alone")
    options = parser.parse_args(arguments)
    size: Size = options.size
    full = [(shape, *case) for shape, cases in CASES.items() for case in cases]
    cases = size.of(full, full[:3], [("3M", "fsdp", 2)])
    chosen = [c for c in cases if c[0] in options.network and c[2] in (options.ranks or [c[2]])]
    keys: Rows = [dict(zip(("network", "parallel", "ranks"), case, strict=True)) for case in cases]
    rows = with_earlier(options, "memory", "rows", [measured(*case) for case in chosen], keys)
    result: dict[str, Any] = {
        "benchmark": "memory",
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        "torch": torch.__version__,
        "rows": rows,
        "clusters": [
            worked_out(name, gpus)
            for name in size.of(list(NETWORKS), ["0.1 B"], ["0.1 B"])
            for gpus in size.of(CLUSTERS, CLUSTERS, (8,))
        ],
    }
    publish(result, "memory", options)


if __name__ == "__main__":
    main()
