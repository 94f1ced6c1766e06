"""Ray Train around the training loop: how many workers, and what failures they survive."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

from pipelines.config import ClusterConfig
from pipelines.environment.scratch import closed_folder
from pipelines.storage import Fence
from pipelines.training.loop.context import Job
from pipelines.training.ray_train import worker
from pipelines.training.ray_train.callbacks import FreeWorkers, QuickStart, TellCause
from pipelines.training.resources import group_start_s, per_worker

WorkerProvider = Callable[[Job, Any], Callable[[], object]]
"""Takes a job and the handle of its monitor, and returns a call that trains the job to its end."""


class _Trainer(TorchTrainer):
    """Ray's trainer without Ray Data, which no worker here reads from.

    For it, every group of workers starts an actor, whose imports take two CPU seconds while the workers import theirs.
    """

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]


def make_trainer(
    function: Callable[[worker.Call], None],
    given: object,
    cluster: ClusterConfig,
    name: str,
    monitor: Any = None,
) -> TorchTrainer:
    """Return the Ray Train run of a training: its number of workers, and the failures that it survives.

    Ray Train keeps nothing of a run. It insists on a folder, which holds an empty file.

    Args:
        function: what a worker calls, one of those in `worker`.
        given: to the function, as a pickle that Ray Train's controller need not load; see `worker.given`.
        name: for Ray's dashboard.
        monitor: handle of the run's monitor, which is told why workers are started again; None for several runs.
    """
    buffers: list[pickle.PickleBuffer] = []
    pickled = cloudpickle.dumps(given, protocol=5, buffer_callback=buffers.append)
    return _Trainer(
        function,
        train_loop_config={"pickled": pickled, "buffers": [np.frombuffer(each.raw(), np.uint8) for each in buffers]},
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
            callbacks=[QuickStart(), FreeWorkers(), *([] if monitor is None else [TellCause(monitor)])],
        ),
    )


def torch_config(cluster: ClusterConfig) -> TorchConfig:
    """Return the settings of the process group; a collective times out after the watchdog has logged where it hangs."""
    return TorchConfig(timeout_s=math.ceil(cluster.step_timeout_s) + 60) if cluster.step_timeout_s else TorchConfig()


def dedicated_workers(job: Job, monitor: Any) -> Callable[[], object]:
    """Return a call that trains a job in a Ray Train run of its own; a `WorkerProvider`."""
    trainer = make_trainer(worker.train, (job, monitor), job.config.cluster, job.config.name, monitor)
    if job.fence is not None:
        take_over_reservation(job.fence, trainer)
    return trainer.fit


def take_over_reservation(fence: Fence, trainer: TorchTrainer) -> None:
    """Cancel the reservation of a killed driver's controller, and record the name of this one's.

    Ray's coordinator, which outlives drivers, keeps a reservation for three minutes; for so long an elastic run would
    wait for resources that its own former driver had reserved.
    """
    # Not at the top: it takes half a second.
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    before = fence.note(reservation=f"train-{trainer.train_run_context.run_id}").get("reservation")
    if before is not None:
        with suppress(RayError):
            ray.get(get_or_create_autoscaling_coordinator().cancel_request.remote(requester_id=before), timeout=10)
