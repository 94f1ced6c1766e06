"""Ranks as real processes that note, batch by batch, which samples they are given, and that can be killed."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader

from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.index import Dataset, read_dataset
from pipelines.shards.stream import StreamSettings
from pipelines.shards.torch_dataset import ShardDataset
from pipelines.storage import Storage
from tests.forked import FORKING

Seen = list[tuple[int, str]]
"""(ordinal, key) of each sample, in order."""


@dataclass(frozen=True)
class Reading:
    """What all ranks of a run have in common."""

    uri: str
    settings: StreamSettings
    batch_size: int

    def source(self, rank: int, world_size: int, samples_seen: int) -> ShardDataset:
        return ShardDataset(
            read_dataset(self.uri, Storage()),
            "train",
            Storage(),
            self.settings,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            samples_seen=samples_seen,
        )


def write_shards(folder: Path, sizes: Sequence[int]) -> Dataset:
    """Shards of so many samples; a key says where its sample lies."""
    folder.mkdir(parents=True)
    picture = io.BytesIO()
    Image.new("L", (2, 2)).save(picture, "png")
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for index in range(size):
                info = tarfile.TarInfo(f"{shard:03d}-{index:04d}.png")
                info.size = len(picture.getvalue())
                tar.addfile(info, io.BytesIO(picture.getvalue()))
    return index_tars(f"file://{folder}", Storage()).dataset


FURTHEST = 40
"""Batches after which a rank that is going to be killed waits for that."""


def run_rank(
    reading: Reading, rank: int, world_size: int, loaders: int, start: int, stop: int, notes: Path, killed: bool
) -> None:
    """Note each batch as soon as it is whole; a process group of its own, so that its loaders die with it.

    Args:
        killed: whether it waits at `stop` until it is killed.
    """
    os.setsid()
    loader = DataLoader(
        reading.source(rank, world_size, start),
        batch_size=None,
        num_workers=loaders,
        multiprocessing_context="fork" if loaders else None,
    )
    with notes.open("w") as file:
        for batch, samples in itertools.groupby(loader, key=lambda sample: sample["__ordinal__"] // reading.batch_size):
            if batch * reading.batch_size >= stop:
                while killed:
                    signal.pause()
                break
            file.write(json.dumps([batch, [(s["__ordinal__"], s["__key__"]) for s in samples]]) + "\n")
            file.flush()
            time.sleep(0.003)  # a step of training
    os.killpg(0, signal.SIGKILL)  # the noted batches are on disk: nothing else is worth waiting for


def run(
    reading: Reading, world_size: int, loaders: int, start: int, stop: int, notes: Path, kill: random.Random | None
) -> dict[int, list[Seen]]:
    """Each rank's part of every batch that all ranks have noted, by number of the batch.

    Args:
        kill: chooses a rank and a moment for a SIGKILL; None lets the ranks come to `stop`.
    """
    notes.mkdir()
    files = [notes / str(rank) for rank in range(world_size)]
    if kill is not None:  # who kills them may be late, and something has to be left for those that come after
        stop = start + FURTHEST * reading.batch_size
    ranks = [
        FORKING.Process(
            target=run_rank,
            args=(reading, rank, world_size, loaders, start, stop, files[rank], kill is not None),
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        if kill is not None:
            wanted, victim = kill.randint(2, 25), kill.randrange(world_size)
            wait_until(lambda: min(lines(file) for file in files) >= wanted)
            time.sleep(kill.uniform(0, 0.01))
            end(ranks[victim])
        else:
            wait_until(lambda: not any(process.is_alive() for process in ranks))
    finally:
        for process in ranks:
            end(process)
    noted = [dict(parse(file)) for file in files]
    return {batch: [part[batch] for part in noted] for batch in sorted(set.intersection(*map(set, noted)))}


def lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def parse(file: Path) -> list[tuple[int, Seen]]:
    """A line that a kill has cut off was not seen."""
    whole = file.read_text().rpartition("\n")[0].splitlines()
    return [(batch, [tuple(pair) for pair in seen]) for batch, seen in map(json.loads, whole)]


def wait_until(condition, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the ranks are stuck"
        time.sleep(0.005)


def end(process) -> None:
    """A rank and its loaders, at once."""
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()  # it has no group of its own yet
    process.join()
