"""The end of a run while MLflow is away."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import pytest

from pipelines.storage import Storage, StorageError
from pipelines.tracking import UnreachableError, run_log
from pipelines.training.loop import log
from pipelines.training.loop.context import Job
from pipelines.training.loop.log import finish_log, open_log, send_unsent
from tests.pipelines.training.loop import ranks
from tests.pipelines.training.loop.ranks import MemoryTracker, tiny_config, train_here


@dataclass
class Away(MemoryTracker):
    """MLflow, which does not answer."""

    def last_steps(self):
        raise UnreachableError("no answer")

    last_pictures = last_steps

    def text(self, text, name):
        raise UnreachableError("no answer")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(run_log, "RETRY_S", 0.02)
    monkeypatch.setattr(log, "FLUSH_S", 0.3)


def job_of(folder, config, tracker) -> Job:
    storage = config.storage.model_copy(update={"root": f"file://{folder}"})
    return Job(config.model_copy(update={"storage": storage}), None, tracker, {})


def test_a_finished_run_ends_well_and_another_node_sends_what_mlflow_had_not_taken(
    digits, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(ranks, "MemoryTracker", Away)
    config = tiny_config(
        tmp_path, 75, 25, "tracking.log_every=25", "tracking.profile_at=25", "tracking.profile_steps=1"
    )
    with caplog.at_level(logging.WARNING):
        shell, _ = train_here(tmp_path / "r", digits, config)
    assert shell.reports[-1].images_seen == 75
    (left,) = (tmp_path / "r" / "runs").glob("*/unsent.zip")
    assert f"points of the run wait in {tmp_path}/unsent" in caplog.text
    assert f"and in file://{left}: the same command sends them, on any node" in caplog.text

    # Another node, where nothing waits but what is in storage.
    tracker = MemoryTracker()
    elsewhere = config.model_copy(
        update={"data": config.data.model_copy(update={"cache_dir": str(tmp_path / "elsewhere" / "cache")})}
    )
    send_unsent(job_of(tmp_path / "r", elsewhere, tracker))
    assert sorted(tracker.points) == [25, 50, 75]
    assert {name.split("/")[0] for name in tracker.texts} == {"checkpoints", "profile", "precision.txt"}
    assert len(tracker.images) > 0
    assert not left.exists()


def test_a_store_that_is_away_as_well_leaves_the_points_on_the_node_and_says_so(tmp_path, monkeypatch, caplog):
    config = tiny_config(tmp_path, 50, 25)
    job = job_of(tmp_path / "r", config, Away())
    log = open_log(job)
    log.metrics({"train/loss": 1.0}, 25)
    monkeypatch.setattr(Storage, "write", lambda *a, **k: (_ for _ in ()).throw(StorageError("s3 is away")))
    finish_log(job, log)
    log.close()
    assert "when the same command runs on this node again (s3 is away)" in caplog.text
    assert len(list((tmp_path / "unsent" / "test").iterdir())) == 1


def test_points_left_in_storage_are_sent_once_by_a_resumed_run(tmp_path):
    config = tiny_config(tmp_path, 50, 25)
    away = job_of(tmp_path / "r", config, Away())
    log = open_log(away)
    log.metrics({"train/loss": 1.0}, 25)
    finish_log(away, log)
    log.close()
    tracker = MemoryTracker()
    for _ in range(2):
        log = open_log(replace(away, tracker=tracker))
        log.metrics({"train/loss": 0.5}, 50)
        log.flush(10)
        log.close()
    assert {step: values["train/loss"] for step, values in tracker.points.items()} == {25: 1.0, 50: 0.5}
