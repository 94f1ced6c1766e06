"""A driver that sleeps through a takeover changes nothing of its successor's when it wakes up."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from pipelines import stack
from pipelines.checkpoints import CheckpointList
from tests.chaos.arena import BATCH, Arena, Training, until
from tests.chaos.test_chaos import FAR, SETTINGS
from tests.integration.workers import forked_workers, slow_steps
from tests.processes import family

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]

FOLDER = "s3://ddpm/runs/taken"
RUN = [*SETTINGS, "name=taken", FAR, f"checkpoint.every={10 * BATCH}", f"checkpoint.publish_every={30 * BATCH}",
       "cluster.num_workers=1", "tracking.sinks=[mlflow,jsonl]"]  # fmt: skip


@pytest.fixture
def elsewhere(arena: Arena, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of another Ray cluster, on another machine's cache, with the same storage and MLflow."""
    home = tmp_path_factory.mktemp("elsewhere") / ".ddpm"
    environment = arena.environment | {
        "DDPM_HOME": str(home),
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache-elsewhere")),
        "AWS_ENDPOINT_URL": str(arena.state.s3_endpoint),
        "AWS_SHARED_CREDENTIALS_FILE": str(arena.state.credentials_file),
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_TRACKING_URI": str(arena.state.tracking_uri),
    }
    try:
        with forked_workers():
            stack.up(home, ["ray"])
        yield environment
    finally:
        stack.down(home)


def everything(arena: Arena, client: MlflowClient, run_id: str) -> dict[str, Any]:
    """Return what the newest driver has written: objects by digest, and the MLflow run."""
    objects = {e.uri: hashlib.sha256(arena.s3.read(e.uri)).hexdigest() for e in arena.s3.list(FOLDER)}
    run = client.get_run(run_id)
    artifacts = {
        info.path: Path(client.download_artifacts(run_id, info.path)).read_bytes()
        for folder in ("", "checkpoints")
        for info in client.list_artifacts(run_id, folder)
        if not info.is_dir
    }
    return {
        "objects": {uri: digest for uri, digest in objects.items() if "-e1-" not in uri and "/000001" not in uri},
        "status": run.info.status,
        "params": run.data.params,
        "tags": run.data.tags,
        "artifacts": artifacts,
    }


def history(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Return every curve but those of the machines as (step, value), sorted."""
    keys = [key for key in client.get_run(run_id).data.metrics if not key.startswith("system/")]
    return {key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key)) for key in keys}


def test_a_driver_that_slept_through_a_takeover_changes_nothing(arena: Arena, elsewhere: dict[str, str]):
    with slow_steps(arena.home, Path(elsewhere["DDPM_HOME"])):
        first = arena.train(*RUN)
        first.gets_on()
        until(lambda: arena.s3.exists(f"{FOLDER}/checkpoints.json"), 60, lambda: "a list")
        until(lambda: listed(arena).checkpoints, 60, lambda: "a checkpoint in the list")
        asleep = [psutil.Process(first.process.pid), *(p for worker in arena.workers() for p in family(worker.pid))]
        for process in asleep:
            process.send_signal(signal.SIGSTOP)

        second = replace_environment(arena, elsewhere)
        second.gets_on()
        until(lambda: listed(arena).checkpoints[0].epoch == 2, 60, lambda: "only checkpoints of the second driver")
        second.process.send_signal(signal.SIGINT)
        answer = second.answer()
        assert answer["status"] == "stopped"
    client = MlflowClient(tracking_uri=arena.state.tracking_uri)
    before, curves = everything(arena, client, answer["run_id"]), history(client, answer["run_id"])
    assert before["status"] == "KILLED"

    for process in asleep:
        process.send_signal(signal.SIGCONT)
    assert first.process.wait(120) == 1
    assert "another driver has taken over" in "".join(first.said)
    until(lambda: not arena.workers(), 60, lambda: "the end of the first driver's workers")
    assert everything(arena, client, answer["run_id"]) == before
    for key, points in history(client, answer["run_id"]).items():
        # MLflow cannot refuse the point that was on its way: it is the successor's own, once more.
        assert set(points) == set(curves[key]), key
        assert len(points) <= len(curves[key]) + 1, key


def listed(arena: Arena) -> CheckpointList:
    found = CheckpointList.from_json(arena.s3.read(f"{FOLDER}/checkpoints.json"))
    assert found is not None
    return found


def replace_environment(arena: Arena, environment: dict[str, str]) -> Training:
    arena.trainings.append(Training(arena.folder, environment, RUN))
    return arena.trainings[-1]
