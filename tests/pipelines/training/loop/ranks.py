"""Training ranks under plain torch.distributed for tests, with checkpoints in folders and metrics in memory."""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pipelines import checkpoints
from pipelines.config import Config, compose
from pipelines.shards.index import Dataset
from pipelines.shards.quarantine import Quarantine
from pipelines.storage import Storage
from pipelines.training.loop.context import Job, RunContext
from pipelines.training.loop.progress import Progress
from pipelines.training.loop.train import train_rank
from tests.networks import TINY_UNET

TINY = {
    "unet": TINY_UNET,
    "dit": ["model=dit_digits", "model.width=32", "model.depth=2", "model.heads=2", "model.checkpointing=true"],
    "jit": ["model=jit_digits", "model.width=32", "model.depth=2", "model.heads=2", "model.checkpointing=true"],
}
"""Overrides by which every registered kind of network is small."""
SMALL = ["model.channels=[8]", "model.norm_groups=4", "model.head_dim=8"]
"""Overrides by which the UNet is still smaller, where a test does not look at what is learnt."""
NO_GRIDS = "tracking.grid_every=null"
"""An override with which a run draws nothing, where a test does not look at it."""


@dataclass
class MemoryTracker:
    """A replacement for the MLflow tracker that keeps everything in memory."""

    uri: str = "http://nowhere"
    run_id: str = "test"
    patience_s: float = 300.0
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    images: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def metric(self, key):
        return [(step, values[key]) for step, values in self.points.items() if key in values]

    def last_steps(self):
        return {}

    def last_pictures(self):
        return {}

    def metrics(self, values, step, at_ms):
        self.points.setdefault(step, {}).update(values)

    def image(self, key, pixels, step):
        self.images.append((step, pixels.shape))

    def text(self, text, name):
        self.texts[name] = text

    def holds(self, mark, name):
        return mark in self.texts.get(name, "")

    def read_text(self, name):
        return self.texts[name]

    def names(self, folder):
        return [name for name in self.texts if name.startswith(f"{folder}/")]


class FolderShell:
    """A shell that keeps losses in a file with a line per step.

    Args:
        folder: folder of the run, shared by all its attempts.
        stop_after: number of steps of this attempt after which to stop.
        checkpoint_after: number of steps of this attempt after which this rank requests a checkpoint.
    """

    def __init__(
        self, folder: Path, rank: int, *, stop_after: int | None = None, checkpoint_after: int | None = None
    ) -> None:
        self.folder, self.rank = folder, rank
        self.stop_after, self.checkpoint_after = stop_after, checkpoint_after
        self.reports: list[Progress] = []
        self.shown: list[np.ndarray] = []
        self.asked = 0

    def progress(self, progress):
        self.reports.append(progress)
        with (self.folder / "trace.jsonl").open("a") as file:
            file.write(json.dumps([progress.images_seen, progress.loss]) + "\n")

    def samples(self, images):
        self.shown.append(images)

    def stop_requested(self):
        return self.stop_after is not None and len(self.reports) >= self.stop_after - 1

    def checkpoint_requested(self):
        self.asked += 1
        return self.asked == self.checkpoint_after


def tiny_config(root: Path, images: int, batch_size: int, *overrides: str, network: str = "unet") -> Config:
    """Return a run of a network of 30 k parameters on digits; only the last step saves and draws."""
    plain = ["+experiment=digits", *TINY[network], f"images={images}", f"batch_size={batch_size}"]
    plain += ["data.lanes=5", "checkpoint.every=100000", "tracking.grid_every=100000", "tracking.grid_images=10"]
    plain += ["storage=file", f"storage.root=file://{root}", f"data.cache_dir={root}/cache", "sampler.steps=2"]
    plain += ["optim.precision=fp32"]
    return compose([*plain, *overrides])


def train_here(
    folder: Path,
    dataset: Dataset,
    config: Config,
    rank: int = 0,
    world: int = 1,
    *,
    shell: FolderShell | None = None,
    lineage: dict[str, str] | None = None,
    quarantine: Quarantine | None = None,
    **requests: int,
) -> tuple[FolderShell, MemoryTracker]:
    """Train one rank in this process, in its process group if there is one, and return its shell and tracker.

    Args:
        folder: the storage root, whatever the configuration names.
        shell: shell of the rank; default is a new `FolderShell` with `requests`.
        lineage: what the driver records of the model's origin.
        quarantine: samples that are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"root": f"file://{folder}"})})
    shell, tracker = shell or FolderShell(folder, rank, **requests), MemoryTracker()
    job = Job(config, dataset, tracker, lineage or {}, quarantine)
    context = RunContext.of(job, rank=rank, world_size=world, device=torch.device("cpu"))
    train_rank(context, shell)
    return shell, tracker


def trace(folder: Path) -> dict[int, float]:
    """Return images seen -> loss, after checking that steps computed twice have the same loss."""
    found: dict[int, float] = {}
    for line in (folder / "trace.jsonl").read_text().splitlines():
        seen, loss = json.loads(line)
        if seen in found:
            torch.testing.assert_close(torch.tensor(loss), torch.tensor(found[seen]), rtol=1e-3, atol=0)
        found[seen] = loss
    return found


def last_checkpoint(folder: Path) -> Path:
    """Return the folder of the newest checkpoint."""
    (run,) = (folder / "runs").iterdir()
    listed, _ = checkpoints.complete_checkpoints(Storage(), f"file://{run}")[0]
    return run / listed.name


def run_ranks(rank: int, world: int, rendezvous: Path, dataset: Dataset, runs: Sequence[tuple[Path, Config]]) -> None:
    """Run several trainings one after the other, as one rank of a group started by `start_ranks`."""
    with process_group(rank, world, rendezvous):
        for folder, config in runs:
            train_here(folder, dataset, config, rank, world)


@contextmanager
def process_group(rank: int, world: int, rendezvous: Path) -> Iterator[None]:
    """Be one rank of a group; a signal that ends the process is told with the place where it was."""
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
