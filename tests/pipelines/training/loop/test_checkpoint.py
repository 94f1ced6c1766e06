"""Saving behind training's back."""

import hashlib
import math
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint, checkpoint_name, load_checkpoint, save_checkpoint
from pipelines.checkpoints.parts import TensorRows
from pipelines.shards.read import Batch
from pipelines.storage import Storage, StorageError
from pipelines.training.loop import train as train_module
from pipelines.training.loop.checkpoint import Checkpointer
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.losses import losses
from pipelines.training.loop.speed import made_up_job
from tests.pipelines.training.loop.ranks import NO_GRIDS, SMALL, FolderShell, last_checkpoint, tiny_config, train_here

STEPS, BATCH = 6, 25


def run(folder, dataset, shell=None, *overrides):
    often = ["checkpoint.every=75", "checkpoint.publish_every=150", *SMALL, NO_GRIDS]
    return train_here(folder, dataset, tiny_config(folder, STEPS * BATCH, BATCH, *often, *overrides), shell=shell)


class ReportingShell(FolderShell):
    """Opens a gate after so many steps."""

    def __init__(self, folder, opens_after: int):
        super().__init__(folder, 0)
        self.opens_after, self.gate = opens_after, threading.Event()

    def progress(self, progress):
        super().progress(progress)
        if len(self.reports) >= self.opens_after:
            self.gate.set()


def test_state_json_is_uploaded_once_and_after_all_other_files(digits, tmp_path, monkeypatch):
    uploaded = []

    def noting(store, position):
        def noted(self, *arguments, **patience):
            uploaded.append(arguments[position])
            store(self, *arguments, **patience)

        return noted

    monkeypatch.setattr(Storage, "upload", noting(Storage.upload, 1))
    monkeypatch.setattr(Storage, "write", noting(Storage.write, 0))
    run(tmp_path, digits)
    folders = {uri.rsplit("/", 1)[0] for uri in uploaded if "/checkpoint_" in uri}
    assert len(folders) == 2
    for folder in folders:
        names = [uri.rsplit("/", 1)[1] for uri in uploaded if uri.startswith(f"{folder}/")]
        assert len(names) == len(set(names)) >= 3
        assert names[-1] == "state.json"


def test_training_goes_on_beside_an_upload_of_the_state_as_it_was_when_saved(digits, tmp_path, monkeypatch):
    (tmp_path / "slow").mkdir()
    shell = ReportingShell(tmp_path / "slow", opens_after=5)
    saves: list[int] = []

    def late(folder, checkpoint):
        saves.append(checkpoint.images_seen)
        assert shell.gate.wait(60)  # a loop that waits for the first checkpoint would never open it
        return save_checkpoint(folder, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", late)
        run(tmp_path / "slow", digits, shell)
    assert saves == [75, 150]
    run(tmp_path / "quick", digits)
    for seen in (75, 150):
        one, other = (
            next((tmp_path / n / "runs" / "digits").glob(f"checkpoint_{seen:012d}-*")) for n in ("slow", "quick")
        )
        for name in ("model.safetensors", "training.safetensors"):
            assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    "every, publish_every, evaluate_every, published",
    [
        (75, 150, None, [150]),
        (1000, 1000, 50, [50, 100, 150]),  # an evaluation needs neither of the others
        (1000, 1000, 60, [75, 125, 150]),  # at the first step that reaches a multiple, and at the end
        (50, 100, 75, [75, 100, 150]),
    ],
)
def test_a_checkpoint_is_published_where_that_or_an_evaluation_is_due(
    digits, tmp_path, every, publish_every, evaluate_every, published
):
    often = [f"checkpoint.every={every}", f"checkpoint.publish_every={publish_every}"]
    value = "null" if evaluate_every is None else evaluate_every
    run(tmp_path / "r", digits, None, *often, f"evaluation.every={value}")
    folders = (tmp_path / "r" / "runs" / "digits" / "published").iterdir()
    assert sorted(int(folder.name.split("-")[0]) for folder in folders) == published


@pytest.mark.parametrize("backlog", [0, 2])
def test_training_waits_for_storage_only_when_the_backlog_of_checkpoints_is_full(
    digits, tmp_path, monkeypatch, backlog
):
    (tmp_path / "r").mkdir()
    # Every step saves; the first upload hangs until the loop has done all the steps that it may.
    shell = ReportingShell(tmp_path / "r", opens_after=1 + backlog + 1)
    reports_at_end_of_wait: list[int] = []

    def stalled(folder, checkpoint):
        assert shell.gate.wait(60)
        if checkpoint.images_seen == BATCH:
            time.sleep(0.5)  # would do more steps by now
            reports_at_end_of_wait.append(len(shell.reports))
        return save_checkpoint(folder, checkpoint)

    monkeypatch.setattr(checkpoints, "save_checkpoint", stalled)
    run(tmp_path / "r", digits, shell, f"checkpoint.every={BATCH}", f"checkpoint.backlog={backlog}")
    assert reports_at_end_of_wait == [1 + backlog + 1]


def test_a_published_copy_equals_its_checkpoint_and_is_recorded_in_the_run(digits, tmp_path):
    _, tracker = run(tmp_path / "r", digits, None, "checkpoint.publish_every=50")
    kept = tmp_path / "r" / "runs" / "digits" / "published"
    older, copy = sorted(kept.iterdir())
    assert older.name.startswith("000000000075-e0-")
    assert tracker.names("checkpoints") == ["checkpoints/000000000075.json", "checkpoints/000000000150.json"]
    last = last_checkpoint(tmp_path / "r")
    assert last.name == f"checkpoint_{copy.name}"
    # What MLflow had not taken yet travels with the checkpoint, and is no part of the copy.
    copied, state = load_checkpoint(copy)[0], load_checkpoint(last)[0]
    assert {"model.json", "model.safetensors", "training.safetensors"} <= copied.files.keys()
    assert copied == without_unsent(state)


def without_unsent(state):
    files, sizes = ({n: v for n, v in by.items() if n != "unsent.zip"} for by in (state.files, state.sizes))
    return replace(state, files=files, sizes=sizes)


def test_a_checkpoint_that_cannot_be_stored_ends_the_run_with_the_reason(digits, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "runs").write_text("a file where a folder is wanted")
    with pytest.raises(StorageError, match="runs"):
        run(tmp_path / "r", digits)


def test_an_update_that_is_not_finite_changes_nothing_but_the_count(digits, tmp_path, monkeypatch):
    def poisoned(context, network, batch: Batch, *others):
        found = losses(context, network, batch, *others)
        return torch.where(batch.ordinals == 60, torch.nan, found)

    monkeypatch.setattr(train_module, "losses", poisoned)
    shell, tracker = run(tmp_path / "r", digits, None, "tracking.log_every=25")
    assert [math.isfinite(r.loss) for r in shell.reports[:STEPS]] == [True, True, False, True, True, True]
    assert [tracker.points[seen]["updates/skipped"] for seen in (50, 75, 150)] == [0, 1, 1]
    assert "train/loss" not in tracker.points[75]
    state, tensors = load_checkpoint(last_checkpoint(tmp_path / "r"))
    assert (state.optimizer_steps, state.skipped) == (STEPS - 1, 1)
    assert all(t.isfinite().all() for t in tensors.values())


def test_a_checkpoint_of_a_release_that_kept_no_residuals_of_averages_resumes(digits, tmp_path):
    extra = ["optim.power_ema=[0.05]"]
    run(tmp_path / "r", digits, FolderShell(tmp_path / "r", 0, stop_after=3), *extra)
    folder = last_checkpoint(tmp_path / "r")
    state, tensors = load_checkpoint(folder)
    residuals = {name for name in tensors if name.startswith("residual.")}
    assert {name.split(".")[1] for name in residuals} == {"ema", "power"}
    older = {n: t for n, t in tensors.items() if n not in residuals and not n.startswith(("ema.", "power."))}
    save_file(older, folder / "training.safetensors")
    path = folder / "training.safetensors"
    files = {**state.files, path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    sizes = {**state.sizes, path.name: path.stat().st_size}
    (folder / "state.json").write_text(replace(state, files=files, sizes=sizes).to_json())
    run(tmp_path / "r", digits, None, *extra)
    state, tensors = load_checkpoint(last_checkpoint(tmp_path / "r"))
    assert state.images_seen == STEPS * BATCH
    assert residuals <= tensors.keys()


def test_rank_0_has_given_its_copy_back_when_it_waits_for_the_parts_of_others(tmp_path, monkeypatch):
    context = RunContext.of(made_up_job(tiny_config(tmp_path, 10, 5)), rank=0, world_size=1, device=torch.device("cpu"))
    saver, name, kept = Checkpointer(context, None), checkpoint_name(1, context.job.epoch), []
    memory = np.ones(2, np.float32)
    rows, copy = [TensorRows("network.a", (2,), 0, torch.from_numpy(memory))], weakref.ref(memory)
    del memory
    assert copy() is not None

    def waiting(saver, name):
        kept.append(copy() is not None)
        return iter(())

    monkeypatch.setattr(Checkpointer, "_other_records", waiting)
    saver._run(saver._store_part, name, Checkpoint(context.spec, {}, 1, {}, 1), rows, False)
    saver.close()
    assert kept == [False]
    assert len(checkpoints.complete_checkpoints(context.job.storage, context.job.run_uri)) == 1
