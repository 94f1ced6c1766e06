"""Which checkpoint a run resumes from, and which checkpoints are deleted."""

from __future__ import annotations

import json

import pytest
from ray.train import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from pipelines.checkpoints import CheckpointState, ModelError
from pipelines.config import compose
from pipelines.storage import Storage
from pipelines.training.resume import enter_checkpoint, listed_checkpoints, newest_checkpoint, run_folder, sweep

STORAGE = Storage()


@pytest.fixture
def config(tmp_path):
    return compose(["+experiment=digits", "name=run", "storage=file", f"storage.root=file://{tmp_path}"])


def store(tmp_path, name: str, images_seen: int) -> None:
    state = CheckpointState(images_seen, {}, "digest", optimizer_steps=1, skipped=0, files={}, sizes={})
    STORAGE.write(f"file://{tmp_path}/runs/run/{name}/state.json", state.to_json().encode())


def snapshot(tmp_path, names: list[str], newest: str | None) -> None:
    results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    latest = None if newest is None else {"checkpoint_dir_name": newest, "metrics": {}}
    listed = {"checkpoint_results": results, "latest_checkpoint_result": latest}
    STORAGE.write(f"file://{tmp_path}/runs/run/checkpoint_manager_snapshot.json", json.dumps(listed).encode())


def test_a_run_resumes_from_rays_list_and_from_nothing_else(config, tmp_path):
    assert newest_checkpoint(config, STORAGE) is None
    store(tmp_path, "checkpoint_3", 300)  # complete, but the driver died before it was listed
    assert newest_checkpoint(config, STORAGE) is None
    store(tmp_path, "checkpoint_1", 100)
    store(tmp_path, "checkpoint_2", 200)
    snapshot(tmp_path, ["checkpoint_1", "checkpoint_2"], "checkpoint_2")
    found = newest_checkpoint(config, STORAGE)
    assert found is not None
    assert found.images_seen == 200


def test_a_sweep_deletes_what_is_not_listed_and_nothing_else(config, tmp_path):
    for name in ("checkpoint_1", "checkpoint_2", "checkpoint_3", "published/000000000100"):
        store(tmp_path, name, 100)
    STORAGE.write(f"file://{tmp_path}/runs/run/checkpoint_4/model.safetensors", b"half an upload")
    snapshot(tmp_path, ["checkpoint_1", "checkpoint_2"], "checkpoint_2")
    assert sweep(run_folder(config), STORAGE) == ["checkpoint_3", "checkpoint_4"]
    left = {entry.uri.split("/runs/run/")[1] for entry in STORAGE.list(f"file://{tmp_path}/runs/run")}
    assert left == {"checkpoint_1/state.json", "checkpoint_2/state.json", "published/000000000100/state.json",
                    "checkpoint_manager_snapshot.json"}  # fmt: skip
    assert listed_checkpoints(f"file://{tmp_path}/runs/run", STORAGE) == ["checkpoint_2", "checkpoint_1"]
    assert sweep(run_folder(config), STORAGE) == []


def test_a_list_of_our_own_is_one_that_ray_train_reads_and_keeps_the_newest(config, tmp_path):
    folder = run_folder(config)
    for number in (1, 2, 3):
        store(tmp_path, f"checkpoint_{number}", number * 100)
        enter_checkpoint(folder, STORAGE, f"checkpoint_{number}", {"images_seen": number * 100}, keep=2)
        found = newest_checkpoint(config, STORAGE)
        assert found is not None
        assert found.images_seen == number * 100
    assert listed_checkpoints(folder, STORAGE) == ["checkpoint_3", "checkpoint_2"]
    assert not STORAGE.exists(f"{folder}/checkpoint_1/state.json")
    assert STORAGE.exists(f"{folder}/checkpoint_2/state.json")
    context = StorageContext(str(tmp_path / "runs"), "run")
    newest = CheckpointManager(CheckpointConfig(), context).latest_checkpoint_result
    assert newest is not None
    assert newest.checkpoint.path.endswith("runs/run/checkpoint_3")
    assert newest.metrics == {"images_seen": 300}


def test_a_damaged_list_and_checkpoints_of_another_release_are_named(config, tmp_path):
    STORAGE.write(f"file://{tmp_path}/runs/run/checkpoint_1/state.json", b'{"checkpoint_version": 99}')
    snapshot(tmp_path, ["checkpoint_1"], "checkpoint_1")
    with pytest.raises(ModelError, match="this release reads"):
        newest_checkpoint(config, STORAGE)
    store(tmp_path, "checkpoint_0", 50)
    snapshot(tmp_path, ["checkpoint_0", "checkpoint_1"], "checkpoint_1")
    assert newest_checkpoint(config, STORAGE).images_seen == 50  # the older one can be read
    STORAGE.write(f"file://{tmp_path}/runs/run/checkpoint_manager_snapshot.json", b"{")
    with pytest.raises(ModelError, match="is damaged"):
        newest_checkpoint(config, STORAGE)
