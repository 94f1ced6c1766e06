"""The cost of a checkpoint of a sharded network: in parts, gathered on one rank, and by torch's own `async_save`.

    python -m benchmarks.checkpoint [--quick] [--network 32M] [--ranks 2 4] [--json]

Ranks of one process group, on this machine's cores and gloo, train a diffusion transformer sharded by FSDP2 and save
its state while they train, by each way in turn:

- parts: `Checkpointer`, in which each rank stores what it holds;
- gathered: rank 0 gathers the whole state and stores it, as this project did before;
- dcp: `torch.distributed.checkpoint.async_save`.

None of them waits until the disk has what it was given. Measured are the seconds for which training stands still,
images/s while the checkpoint is being stored relative to those of the same ranks undisturbed, the seconds until it is
stored, and the bytes that each rank stores. Memory is that of each rank beyond the same process before it has the
network, when it has trained a tiny one and saved it by every way.

The whole takes some twenty minutes and, for the network of 300 M parameters, 16 GiB of memory. A part of the cases may
be measured alone: their rows take the place of the older ones in the file of results, and the others stay.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Before torch is imported: spinning threads slow a step down as soon as another process needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.checkpoint_ways import WAYS, Way
from benchmarks.memory import SHAPES, Peak
from benchmarks.results import Rows, Size, commit, make_parser, publish, with_earlier
from benchmarks.train_step import machine
from pipelines.config import Config, compose
from pipelines.training.loop.collectives import local_part
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.speed import made_up, made_up_job
from pipelines.training.loop.state import TrainingState, make_state
from pipelines.training.loop.train import step

MIB = 2**20
NETWORKS = {
    "tiny": SHAPES["tiny"],
    "small": ("model.width=128", "model.depth=4", "model.heads=4"),
    "32M": ("model.width=384", "model.depth=12", "model.heads=6"),
    "300M": SHAPES["300M"],
}


@dataclass(frozen=True)
class SavedTraining:
    """What is trained and saved in one process group.

    Attributes:
        network: its name in `NETWORKS`.
        ranks: the number of processes.
        rounds: how often it is saved by each way.
        batch_size: images of a step of all ranks.
        steps: of training without a checkpoint, which each checkpoint is compared with.
    """

    network: str
    ranks: int
    rounds: int
    batch_size: int = 16
    steps: int = 4

    def config(self, folder: Path) -> Config:
        """Return the configuration, with a store below a folder."""
        model = ["+experiment=digits", "model=dit_digits", *NETWORKS[self.network]]
        rest = ["cluster.parallel=fsdp", "optim.precision=fp32", f"batch_size={self.batch_size}", "data.lanes=1"]
        return compose([*model, *rest, "storage=file", f"storage.root=file://{folder}/store"])


FULL = (
    *(SavedTraining("32M", ranks, 3) for ranks in (2, 4, 8)),
    *(SavedTraining("300M", ranks, 2, batch_size=4, steps=2) for ranks in (2, 4)),
)
QUICK, SMOKE = (SavedTraining("small", 2, 2),), (SavedTraining("tiny", 2, 1),)


def memory_bytes() -> int:
    """Return the resident memory of this process that no file on a disk backs."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(found[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def freed() -> None:
    """Give back to the system what this process no longer uses."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main(arguments: list[str] | None = None) -> None:
    """Measure each network on each number of ranks, and publish."""
    parser = make_parser("checkpoint", __doc__, quick="a small network, two ranks, two rounds")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="measure these alone")
    parser.add_argument("--ranks", nargs="+", type=int, help="measure these numbers of ranks alone")
    options = parser.parse_args(arguments)
    size: Size = options.size
    cases = size.of(FULL, QUICK, SMOKE)
    chosen = [c for c in cases if c.network in options.network and c.ranks in (options.ranks or [c.ranks])]
    if not chosen:
        parser.error(f"there are {', '.join(f'--network {c.network} --ranks {c.ranks}' for c in cases)}")
    found, keys = [measured(case) for case in chosen], [{"network": c.network, "ranks": c.ranks} for c in cases]
    tables = {
        name: with_earlier(options, "checkpoint", name, [row for each in found for row in each[name]], keys)
        for name in ("rows", "memory", "shares")
    }
    result: dict[str, Any] = {
        "benchmark": "checkpoint",
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        "torch": torch.__version__,
        **tables,
        "memory_exponent": exponents(tables["memory"]),
    }
    stalls = {(row["network"], row["ranks"], row["way"]): row["stall_s"] for row in tables["rows"]}
    for way in sorted({*WAYS} - {"parts"}, reverse=True):
        speedups: dict[str, dict[str, float]] = {}
        for (network, ranks, of), stall_s in stalls.items():
            if of == way:
                speedups.setdefault(network, {})[str(ranks)] = stall_s / stalls[network, ranks, "parts"]
        result[f"speedup_{way}"] = speedups
    publish(result, "checkpoint", options)


def exponents(memory: Rows) -> dict[str, dict[str, float]]:
    """Return the power of the number of ranks that a rank's memory follows, by least squares of logarithms."""
    found: dict[str, dict[str, float]] = {}
    for network, during in dict.fromkeys((row["network"], row["during"]) for row in memory):
        same = [row for row in memory if (row["network"], row["during"]) == (network, during)]
        if len(same) > 1:
            ranks, sizes = [row["ranks"] for row in same], [statistics.fmean(row["mib_by_rank"]) for row in same]
            line = statistics.linear_regression([*map(math.log, ranks)], [*map(math.log, sizes)])
            found.setdefault(network, {})[during] = line.slope
    return found


def measured(case: SavedTraining) -> dict[str, Rows]:
    """Return rows of a case by the name of their table: of each way to save, of memory, and of parameters."""
    of_code = commit()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        spawn(one_rank, (case, folder), nprocs=case.ranks)
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(case.ranks)]
    what = {"network": case.network, "ranks": case.ranks}
    rows: Rows = []
    memory = {during: [rank[f"{during}_mib"] for rank in ranks] for during in ("idle", "training")}
    for way in WAYS:
        of = [rank["ways"][way] for rank in ranks]
        memory[way] = [statistics.median(each["memory_mib"]) for each in of]
        # The next step waits for the last rank.
        stalls_s = [max(stalls) for stalls in zip(*(each["stall_s"] for each in of), strict=True)]
        row = {
            "way": way,
            **what,
            "commit": of_code,
            "batch_size": case.batch_size,
            "rounds": case.rounds,
            "stall_s": statistics.median(stalls_s),
            "durable_s": statistics.median(of[0]["durable_s"]),
            "speed_while_storing": statistics.median(of[0]["speed"]),
            "stalls_s": stalls_s,
            "speeds": of[0]["speed"],
            "stored_mib_by_rank": [round(statistics.median(each["stored_mib"]), 1) for each in of],
        }
        rows.append(row)
    return {
        "rows": rows,
        "memory": [
            {
                **what,
                "during": during,
                "mib_by_rank": [round(each, 1) for each in sizes],
                "first_to_mean": sizes[0] / statistics.fmean(sizes),
            }
            for during, sizes in memory.items()
        ],
        "shares": [
            {**what, "parameters": ranks[0]["parameters"], "parameters_by_rank": [rank["share"] for rank in ranks]}
        ],
    }


def one_rank(rank: int, case: SavedTraining, folder: Path) -> None:
    """Train and save on one rank, and write down what it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=case.ranks)
    # Threads, connections and buffers are made by the first training and the first checkpoint of each way.
    train_and_save(replace(case, network="tiny", rounds=1, steps=1), rank, folder)
    (folder / f"{rank}.json").write_text(json.dumps(train_and_save(case, rank, folder)))
    dist.barrier()
    dist.destroy_process_group()


def train_and_save(case: SavedTraining, rank: int, folder: Path) -> dict[str, Any]:
    """Return what training takes of this rank, and what saving does, by the name of the way."""
    freed()
    dist.barrier()
    before, config = memory_bytes(), case.config(folder)
    context = RunContext.of(made_up_job(config), rank=rank, world_size=case.ranks, device=torch.device("cpu"))
    with Peak(memory_bytes, every_s=0.02) as peak:
        state = make_state(config, context.device, context.precision)
        trained(context, state, 2)
    freed()
    report: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in state.network.parameters()),
        "share": sum(local_part(parameter).numel() for parameter in state.network.parameters()),
        "training_mib": peak.bytes / MIB,
        "idle_mib": (memory_bytes() - before) / MIB,
        "ways": {way: {} for way in WAYS},
    }
    savers = {way: make(context, folder) for way, make in WAYS.items()}
    for _ in range(case.rounds):
        for way, saver in savers.items():
            found = saved(context, state, saver, case.steps)
            memory = found["memory_mib"] - before / MIB
            found |= {"memory_mib": memory, "stored_mib": _stored_mib(folder, way, rank)}
            for key, value in found.items():
                report["ways"][way].setdefault(key, []).append(value)
            dist.barrier()
            if rank == 0:
                for path in (folder / "gathered", folder / "dcp", folder / "store"):
                    shutil.rmtree(path, ignore_errors=True)
            dist.barrier()
    for saver in savers.values():
        saver.close()
    return report


def saved(context: RunContext, state: TrainingState, saver: Way, steps: int) -> dict[str, float]:
    """Train undisturbed, save, and train on until the checkpoint is durable; return what it took.

    Args:
        steps: to train undisturbed.
    """
    dist.barrier()
    undisturbed = trained(context, state, steps)
    freed()
    dist.barrier()
    with Peak(memory_bytes, every_s=0.02) as memory:
        began = time.monotonic()
        done = saver.save(state)
        stall_s = time.monotonic() - began
        count, training = 0, time.monotonic()
        over = False
        while not over:
            trained(context, state, 1)
            count += 1
            flag = torch.tensor([0.0 if done() else 1.0])
            dist.all_reduce(flag)
            over = not flag.item()
        speed = count * context.config.batch_size / (time.monotonic() - training)
        saver.finish()
        durable_s = time.monotonic() - began
    return {
        "stall_s": stall_s,
        "durable_s": durable_s,
        "speed": speed / undisturbed,
        "memory_mib": memory.most / MIB,
    }


def trained(context: RunContext, state: TrainingState, steps: int) -> float:
    """Train some steps on random images, and return images/s."""
    whole, size = made_up(context.config), context.config.batch_size
    piece = whole[context.rank * size // context.world_size : (context.rank + 1) * size // context.world_size]
    began = time.monotonic()
    for _ in range(steps):
        step(context, state, replace(piece, ordinals=piece.ordinals + state.images_seen))
    return steps * size / (time.monotonic() - began)


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
