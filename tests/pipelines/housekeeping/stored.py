"""Runs on files, with a list of runs in place of MLflow."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipelines.checkpoints import CheckpointList, CheckpointState, Listed, run_folder
from pipelines.config import Config
from pipelines.housekeeping import Folder
from pipelines.storage import Entry, Storage, StorageError, join
from pipelines.tracking import ModelVersion, RunRecord

NOW = 1_000_000_000.0
OLD, NEW = NOW - 2 * 86_400, NOW - 5
ROOT = "s3://b"


def folder(address: str, *names: str, modified: float | None = OLD) -> Folder:
    return Folder(f"{ROOT}/{address}", tuple(Entry(f"{ROOT}/{address}/{name}", 10, "t", modified) for name in names))


def record(name: str = "first", status: str = "FINISHED", **fields) -> RunRecord:
    return RunRecord(f"id-{name}", name, "ddpm", status, began=OLD, **fields)


def version(run_id: str = "id-first", **tags: str) -> ModelVersion:
    return ModelVersion("digits", "1", run_id, tags, ("champion",))


@dataclass(frozen=True)
class Stubborn(Storage):
    """A store that fails when `LEFT` deletions are made."""

    def delete(self, uri: str, *, patience_s: float = 0) -> None:
        LEFT[0] -= 1
        if LEFT[0] < 0:
            raise StorageError("interrupted")
        super().delete(uri, patience_s=patience_s)


LEFT = [0]


def store_run(config: Config) -> int:
    """Store a run of two checkpoints, both listed, one of them published; return the number of its objects."""
    storage, folder = Storage(), run_folder(config)
    names = ["checkpoint_000000000009-e1-x", "checkpoint_000000000002-e2-x"]
    for place, seen in ((names[0], 9), (names[1], 2), ("published/000000000002", 2)):
        state = CheckpointState(seen, {}, "digest", 1, 0, files={"model": "x"}, sizes={"model": 5})
        storage.write(join(folder, place, "model"), b"bytes")
        storage.write(join(folder, place, "state.json"), state.to_json().encode())
    listed = CheckpointList(2, (Listed(1, 9, names[0]), Listed(2, 2, names[1])))
    storage.write(join(folder, "checkpoints.json"), listed.to_json())
    storage.write(join(folder, "goodput/000001.json"), b"{}")
    return len(storage.list(folder))


def age(config: Config) -> None:
    for path in Path(run_folder(config).removeprefix("file://")).rglob("*"):
        os.utime(path, (0, 0))
