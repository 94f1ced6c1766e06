"""Ray Train around the training loop: what a worker runs, and the Ray Train run of a training of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import ray
import torch
from ray import cloudpickle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

from pipelines import tracking
from pipelines.checkpoints import ModelError
from pipelines.config import ClusterConfig
from pipelines.environment.scratch import closed_folder
from pipelines.shards.cache import ShardCorruptError
from pipelines.storage import FencedError
from pipelines.training import STARTED
from pipelines.training.loop.context import Job
from pipelines.training.ray_train.answers import answer
from pipelines.training.ray_train.quick_start import QuickStart, run
from pipelines.training.ray_train.reservations import FreeWorkers, take_over_reservation
from pipelines.training.ray_train.resources import group_start_s, per_worker
from pipelines.training.ray_train.worker_logs import recorded

FINAL_ERRORS = (FloatingPointError, ShardCorruptError, ModelError, FencedError)
"""Errors that come again however often the workers are started: stream, data and checkpoints are the same."""
WorkerProvider = Callable[[Job, Any], Callable[[], object]]
"""Takes a job and the handle of its monitor, and returns a call that trains the job to its end."""


def worker_main(settings: dict[str, Any]) -> None:
    """Train as one Ray Train worker of a run that has a Ray Train run of its own."""
    train_rank(settings["job"], settings["monitor"], STARTED)


def train_rank(job: Job, monitor: Any, started: float) -> None:
    """Train this Ray Train worker's part of a run.

    Args:
        monitor: handle of the run's monitor actor.
        started: `time.monotonic()` when this attempt began.
    """
    # Not at the top: the driver and Ray Train's controller import this module too, and these take them a second.
    from ray.train.torch import get_device

    from pipelines.training.loop.context import RunContext
    from pipelines.training.loop.train import train_rank as run_rank
    from pipelines.training.ray_train.shell import RayShell

    if answer(monitor.final_error.remote(), "errors that no restart mends") is not None:
        return  # Ray Train starts the workers again whatever the error was; the driver reports it
    torch.set_num_threads(job.config.cluster.threads_per_worker)
    worker = ray.train.get_context()
    rank, world_size = worker.get_world_rank(), worker.get_world_size()
    node = f"node-{worker.get_node_rank()}"
    shell = RayShell(monitor, started)
    with (
        recorded(job.storage, job.run_uri, monitor, epoch=job.epoch, rank=rank, attempt=shell.attempt[:8]),
        tracking.system_metrics(job.tracker, node, job.fence) if worker.get_local_rank() == 0 else nullcontext(),
    ):
        try:
            if job.fence is not None:
                job.fence.check()  # a driver that was replaced may be starting its workers again
            context = RunContext.of(job, rank=rank, world_size=world_size, device=get_device())
            run_rank(context, shell, started)
        except FINAL_ERRORS as error:
            answer(monitor.set_final_error.remote(str(error)), f"an error that no restart mends ({error})")
            raise  # the others may be waiting for this rank: Ray Train ends them
        shell.close()


class _Trainer(TorchTrainer):
    """Ray's trainer without Ray Data, which no worker here reads from.

    For it, every group of workers starts an actor, whose imports take two CPU seconds while the workers import theirs.
    """

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]


def make_trainer(
    loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], cluster: ClusterConfig, name: str
) -> TorchTrainer:
    """Return Ray's side of a training: how many workers, and what failures it survives.

    Ray Train keeps nothing of a run. It insists on a folder, which holds an empty file.

    Args:
        loop: what a worker runs, with `settings`.
        name: for Ray's dashboard.
    """
    return _Trainer(
        run,
        train_loop_config={"pickled": cloudpickle.dumps((loop, settings))},
        torch_config=torch_config(cluster),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=per_worker(cluster),
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(closed_folder() / "ray-train"),
            # A group of workers whose resources are not there is tried again until patience_s has passed.
            failure_config=FailureConfig(
                max_failures=cluster.max_failures,
                controller_failure_limit=math.ceil(cluster.patience_s / group_start_s()),
                max_preemption_failures=cluster.max_preemption_failures,
                preemption_grace_s=cluster.preemption_grace_s,
            ),
            callbacks=[QuickStart(), FreeWorkers()],
        ),
    )


def torch_config(cluster: ClusterConfig) -> TorchConfig:
    """Return the settings of the process group: a collective is given up after the watchdog has said where it hangs."""
    return TorchConfig(timeout_s=math.ceil(cluster.step_timeout_s) + 60) if cluster.step_timeout_s else TorchConfig()


def dedicated_workers(job: Job, monitor: Any) -> Callable[[], object]:
    """Return a call that trains a job in a Ray Train run of its own; a `WorkerProvider`."""
    trainer = make_trainer(worker_main, {"job": job, "monitor": monitor}, job.config.cluster, job.config.name)
    if job.fence is not None:
        take_over_reservation(job.fence, trainer)
    return trainer.fit
