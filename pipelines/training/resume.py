"""The checkpoints of a run: Ray Train's list is the only one, and checkpoint folders that are not in it are deleted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ray
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from pipelines.checkpoints import CheckpointState, ModelError
from pipelines.config import Config
from pipelines.storage import NotFoundError, Storage, join


def run_folder(config: Config) -> str:
    """Return the address of all that a run stores: checkpoints and their list, published ones, the goodput ledger."""
    return join(config.storage.root, "runs", config.name)


def listed_checkpoints(folder: str, storage: Storage) -> list[str]:
    """Return the names of the checkpoints in Ray Train's list in a run's folder, the newest first."""
    snapshot = _snapshot(folder, storage)
    if snapshot is None:
        return []
    newest = snapshot["latest_checkpoint_result"]
    names = [result["checkpoint_dir_name"] for result in snapshot["checkpoint_results"]]
    first = [] if newest is None else [newest["checkpoint_dir_name"]]
    return first + [name for name in sorted(names, reverse=True) if name not in first]


def enter_checkpoint(folder: str, storage: Storage, name: str, metrics: Mapping[str, Any], keep: int) -> None:
    """Add a checkpoint to the list of a run that has no Ray Train run of its own, as Ray Train would.

    Args:
        name: of the checkpoint's folder, where it is stored already; later names sort behind earlier ones.
        keep: how many of the newest stay; the others leave the list and are deleted.
    """
    before = (_snapshot(folder, storage) or {"checkpoint_results": []})["checkpoint_results"]
    entry = {"version": 0, "checkpoint_dir_name": name, "metrics": dict(metrics)}
    results = [*before, entry][-keep:]
    snapshot = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": entry,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    uri = join(folder, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
    storage.write(uri, json.dumps(snapshot).encode())
    sweep(folder, storage)


def _snapshot(folder: str, storage: Storage) -> dict[str, Any] | None:
    """Return Ray Train's list in a run's folder, if there is one."""
    uri = join(folder, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
    try:
        snapshot: dict[str, Any] = json.loads(storage.read(uri))
    except NotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ModelError(f"{uri} is damaged: delete the folder to start anew, or use another name=…") from error
    return snapshot


def newest_checkpoint(config: Config, storage: Storage) -> CheckpointState | None:
    """Return the state of the newest readable checkpoint of the run, None where the run has no checkpoints.

    Raises:
        ModelError: there are checkpoints, and none of them can be read.
    """
    error: ModelError | None = None
    for name in listed_checkpoints(run_folder(config), storage):
        folder = join(run_folder(config), name)
        try:
            return CheckpointState.from_json(storage.read(join(folder, "state.json")), folder)
        except NotFoundError:
            error = error or ModelError(f"{folder} is not a complete checkpoint: state.json is missing")
        except ModelError as damaged:
            error = error or damaged
    if error is not None:
        raise error
    return None


def sweep(folder: str, storage: Storage) -> list[str]:
    """Delete the checkpoints of a run that are not listed, such as uploads that never ended, and return their names."""
    listed = set(listed_checkpoints(folder, storage))
    deleted = set()
    for entry in storage.list(folder):
        name = entry.uri[len(folder) + 1 :].split("/")[0]
        if name.startswith("checkpoint_") and "/" in entry.uri[len(folder) + 1 :] and name not in listed:
            storage.delete(entry.uri)
            deleted.add(name)
    return sorted(deleted)
