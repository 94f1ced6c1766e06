"""Trainings that log what they are really given, sample by sample: pixels, never positions."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest

from pipelines.config import Config
from pipelines.shards.joined import read_data
from pipelines.storage import Storage
from pipelines.training.loop import train
from pipelines.training.loop.losses import losses as compute
from tests.forked import FORKING
from tests.pipelines.training.loop.ranks import NO_GRIDS, SMALL, process_group, tiny_config, train_here

BATCH = 20


def logging_losses(path: Path):
    """The loss of a batch, which first writes (ordinal, first pixel, timestep) of each of its samples to a file."""

    def losses(context, network, batch, t, *others):
        values = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()
        rows = zip(batch.ordinals.tolist(), values, t.tolist(), strict=True)
        with path.open("ab", buffering=0) as file:  # in one write: a kill leaves no half of a line
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        return compute(context, network, batch, t, *others)

    return losses


def config_of(root: Path, steps: int, *overrides: str) -> Config:
    """A run of so many steps on pictures of two classes, with flips and dropped labels."""
    plain = [*SMALL, NO_GRIDS, "objective.label_drop=0.3", "data.flip=true", "data.num_classes=2", "seed=11"]
    return tiny_config(root, steps * BATCH, BATCH, "data.window=2", *plain, *overrides)


def train_logged(
    root: Path,
    config: Config,
    rank: int = 0,
    world: int = 1,
    *,
    log: Path | None = None,
    origin: dict[str, str] | None = None,
    **requests: int,
) -> None:
    """Train one rank, which logs what it is given to a folder, `root` by default.

    Args:
        origin: what is recorded of the model besides its MLflow run.
    """
    dataset, quarantine = read_data(config.data, Storage())
    lineage = {"run_id": id_of(config.name), **(origin or {})}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "losses", logging_losses((log or root) / f"given-{rank}.jsonl"))
        train_here(root, dataset, config, rank, world, lineage=lineage, quarantine=quarantine, **requests)


def a_rank(rank: int, world: int, rendezvous: Path, root: Path, config: Config, steps: int | None) -> None:
    """One rank of a group, which stops after some steps."""
    with process_group(rank, world, rendezvous):
        train_logged(root, config, rank, world, **({} if steps is None else {"stop_after": steps}))


def id_of(run: str) -> str:
    """The MLflow run that is recorded with the checkpoints of a run."""
    return hashlib.sha256(run.encode()).hexdigest()[:32]


def until_killed(world: int, rendezvous: Path, root: Path, config: Config, steps: int) -> None:
    """Train on a group of ranks, all of which are killed once they have been given so many batches."""
    group = [
        FORKING.Process(target=a_rank, args=(rank, world, rendezvous, root, config, None)) for rank in range(world)
    ]
    for process in group:
        process.start()
    deadline = time.monotonic() + 120
    while len(given(root)) < steps * BATCH:
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in group)
        time.sleep(0.002)
    for process in group:
        process.kill()
    for process in group:
        process.join()


def given(root: Path) -> dict[int, int]:
    """What the training below a root was given: ordinal -> value of the picture."""
    return {ordinal: value for ordinal, (value, _) in given_at(root).items()}


def given_at(root: Path) -> dict[int, tuple[int, int]]:
    """What the training below a root was given, and when: ordinal -> (value of the picture, timestep)."""
    found: dict[int, tuple[int, int]] = {}
    for path in root.glob("given-*.jsonl"):
        for line in path.read_text().splitlines():
            ordinal, value, t = json.loads(line)
            assert found.setdefault(ordinal, (value, t)) == (value, t)
    return found
