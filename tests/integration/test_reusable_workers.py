"""Workers that train one run after another: what they save, and that nothing of it shows in a run."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
import torch

from pipelines import stack
from pipelines.checkpoints import complete_checkpoints, load_checkpoint, newest_checkpoint, run_folder
from pipelines.config import Config, compose
from pipelines.shards.ingest.write import ingest
from pipelines.stack import StackState
from pipelines.stack.connect import fill
from pipelines.storage import Storage
from pipelines.training import driver
from pipelines.training.ledger import read_sessions
from pipelines.training.prepare import prepare_run
from pipelines.training.ray_train.monitor import request_stop
from pipelines.training.ray_train.reusable_workers import ReusableWorkers
from pipelines.training.ray_train.trainer import dedicated_workers
from tests.integration.workers import slow_steps
from tests.networks import TINY_UNET
from tests.pipelines.checkpoints.tiny import fetch_newest
from tests.processes import ray_train_workers

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

BATCH = 64
SETTINGS = [
    "+experiment=digits", *TINY_UNET,
    "optim.precision=fp32", f"batch_size={BATCH}", "tracking.grid_every=null", "cluster.num_workers=1",
    "data.uri=s3://ddpm/datasets/reused",
]  # fmt: skip


@pytest.fixture(scope="module")
def drive(
    local_stack: StackState, s3: Storage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., None]]:
    """Calls a function in a process that is a driver of the stack's Ray: Ray reads its token when it is imported."""
    ingest("digits", "s3://ddpm/datasets/reused", s3, image_size=8, channels=1, shard_samples=200)
    environment = stack.ray_environment(local_stack.home) | {
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda body, *arguments: pool.submit(body, s3, local_stack, *arguments).result(timeout=500)
            pool.submit(ray.shutdown).result(timeout=60)


def config_of(local_stack: StackState, name: str, *overrides: str) -> Config:
    return fill(compose([*SETTINGS, f"name={name}", *overrides]), {}, local_stack)


def train(config: Config, storage: Storage, workers: ReusableWorkers | None = None) -> driver.TrainingResult:
    provider = workers.provide if workers else dedicated_workers
    return driver.train(prepare_run(config, {}), workers=provider)


def worker_processes(local_stack: StackState) -> list[psutil.Process]:
    (head,) = [service.pid for service in stack.status(local_stack.home) if service.name == "ray"]
    return ray_train_workers(head)


def weights(config: Config, storage: Storage, folder: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint, averages and optimizer state included."""
    fetch_newest(storage, run_folder(config), folder)
    return load_checkpoint(folder)[1]


def await_no_worker(local_stack: StackState) -> None:
    """Wait until the processes of a closed group have ended, which takes a moment longer than closing it."""
    deadline = time.monotonic() + 20
    while worker_processes(local_stack):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_group_trains_run_after_run_as_workers_of_their_own_would(drive, tmp_path):
    drive(run_after_run, tmp_path)


def run_after_run(storage: Storage, local_stack: StackState, tmp_path: Path) -> None:
    workers = ReusableWorkers("reused")
    try:
        first = config_of(local_stack, "reused-1", "images=1280", "optim.lr=0.004", "objective.prediction=v")
        assert train(first, storage, workers).status == "finished"
        (before,) = worker_processes(local_stack)

        second = config_of(local_stack, "reused-2", "images=2560", "checkpoint.every=640", "checkpoint.keep=2")
        result = train(second, storage, workers)
        assert (result.status, result.images_seen) == ("finished", 2560)
        (after,) = worker_processes(local_stack)
        assert after.pid == before.pid
        assert len(complete_checkpoints(storage, run_folder(second))) == 2
        assert result.published is not None
        (attempt,) = read_sessions(storage, run_folder(second))[-1].attempts
        (slow,) = read_sessions(storage, run_folder(first))[-1].attempts
        assert attempt.seconds["startup"] < slow.seconds["startup"]
        assert train(second, storage, workers).status == "complete"

        alone = second.model_copy(update={"name": "reused-alone"})
        other = config_of(local_stack, "reused-3", "images=640", "cluster.num_workers=2")
        assert train(other, storage, workers).status == "finished"  # two workers instead of the one
        assert before.pid not in {p.pid for p in worker_processes(local_stack)}
    finally:
        workers.close()
    await_no_worker(local_stack)

    train(alone, storage)
    found, expected = (weights(c, storage, tmp_path / c.name) for c in (second, alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def test_a_worker_that_is_killed_is_replaced_and_the_run_goes_on_from_its_checkpoint(drive, local_stack):
    with slow_steps(local_stack.home):
        drive(a_worker_is_killed)


def a_worker_is_killed(storage: Storage, local_stack: StackState) -> None:
    workers = ReusableWorkers("reused")
    config = config_of(local_stack, "reused-killed", "images=64000", "checkpoint.every=640")
    results: list[driver.TrainingResult] = []
    thread = threading.Thread(target=lambda: results.append(train(config, storage, workers)), daemon=True)
    try:
        thread.start()
        deadline = time.monotonic() + 120
        while newest_checkpoint(config) is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        (victim,) = worker_processes(local_stack)
        victim.kill()
        while len(read_sessions(storage, run_folder(config))[-1].attempts) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        request_stop(config)
        thread.join(120)
        (result,) = results
        assert result.status == "stopped"
        attempts = read_sessions(storage, run_folder(config))[-1].attempts
        assert len(attempts) == 2
        assert attempts[1].resumed_at > 0
        assert result.images_seen == newest_checkpoint(config).images_seen

        (replaced,) = worker_processes(local_stack)
        after = config_of(local_stack, "reused-after", "images=640")
        assert train(after, storage, workers).status == "finished"
        assert worker_processes(local_stack)[0].pid != replaced.pid  # a group that has failed is not taken again
    finally:
        workers.close()
