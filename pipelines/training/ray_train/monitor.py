"""The monitor actor of a run: created by the run's only driver, found by name from other threads and processes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.checkpoints import run_folder
from pipelines.config import Config
from pipelines.training.errors import TrainingError
from pipelines.training.ray_train.answers import answer
from pipelines.training.ray_train.mailboxes import Monitor

NAMESPACE = "ddpm-runs"


def monitor_name(folder: str) -> str:
    """Return the name of the monitor of the run stored in a folder, in the namespace `NAMESPACE` of a cluster."""
    return "run-" + hashlib.sha256(folder.encode()).hexdigest()[:16]


def request_stop(config: Config) -> None:
    """Ask the workers of a run that another thread or process trains on this cluster to stop, as Ctrl-C does."""
    with suppress(ValueError, RayError):  # there is none yet, or no longer
        ray.get_actor(monitor_name(run_folder(config)), namespace=NAMESPACE).request_stop.remote()


@contextmanager
def only_driver(config: Config, wait_s: float = 15) -> Iterator[Any]:
    """Create the monitor of a run and return its handle; inside the context no other driver of the run can.

    Raises:
        TrainingError: another driver of this run is there, and does not end.
    """
    name = monitor_name(run_folder(config))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "name": name, "namespace": NAMESPACE, "scheduling_strategy": here}
    deadline = time.monotonic() + wait_s
    while True:
        try:
            monitor = ray.remote(Monitor).options(**options).remote()
            answer(monitor.snapshot.remote(), "the start of the run's monitor actor")
            break
        except ValueError as error:
            # The monitor of a driver that was killed a moment ago ends with it.
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"run '{config.name}' is being trained by another driver on this cluster: "
                    "wait for it, stop it with Ctrl-C, or use another name=…"
                ) from error
            time.sleep(0.5)
    try:
        yield monitor
    finally:
        ray.kill(monitor)
