"""Reusable workers: one group of Ray Train workers trains one run after another.

A Ray Train run starts several processes around its workers, and they and the workers import for seconds, which takes
longer than training a small model. The trials of a study are many and alike: a group trains the next one as soon as
the last has ended. To Ray the group is one run, whose workers ask for the next job; what a training stores, resumes
from and logs to MLflow is the same as with dedicated workers.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from pipelines.config import ClusterConfig
from pipelines.training import STARTED
from pipelines.training.errors import TrainingError
from pipelines.training.loop.context import Job
from pipelines.training.ray_train import worker
from pipelines.training.ray_train.answers import answer
from pipelines.training.ray_train.mailboxes import JobQueue
from pipelines.training.ray_train.shell import failed_for_good, get_reply, open_rank
from pipelines.training.ray_train.trainer import dedicated_workers, make_trainer
from pipelines.training.startup import collect_all

POLL_S = 0.1
IDLE_S = 20.0
"""How long workers are kept without a job; a trial that needs more workers than are free waits at most so long."""
CLOSE_S = 60.0


class ReusableWorkers:
    """The group of workers of a driver, started with its first run and whenever a run needs other workers.

    Args:
        name: of the driver's study, for Ray's dashboard.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.group: _Group | None = None

    def provide(self, job: Job, monitor: Any) -> Callable[[], object]:
        """Return a call that trains a job on these workers; a `WorkerProvider`.

        An elastic run gets dedicated workers, because Ray resizes their group at any time.
        """
        cluster = job.config.cluster
        if cluster.min_workers != cluster.max_workers:
            return dedicated_workers(job, monitor)
        return partial(self._train, job, monitor)

    def close(self) -> None:
        """End the workers."""
        if self.group is not None:
            self.group.close()
            self.group = None

    def _train(self, job: Job, monitor: Any) -> None:
        # A reference into the object store: the queue's process need not import what a job consists of.
        reference = [ray.put({"job": job, "monitor": monitor})]
        number = None
        if self.group is not None and self.group.fits(job.config.cluster):
            number = self.group.put(reference)
        if number is None:
            self.close()
            self.group = _Group(job.config.cluster, f"{self.name}-{uuid.uuid4().hex[:8]}")
            number = self.group.put(reference)
            assert number is not None
            self.group.start()
        self.group.wait(number)  # type: ignore[union-attr]


class _Group:
    """One Ray Train run, whose workers take their jobs from a queue.

    Args:
        cluster: of the first job, which decides the number and kind of workers.
        name: for Ray's dashboard.
    """

    def __init__(self, cluster: ClusterConfig, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.queue = ray.remote(JobQueue).options(num_cpus=0).remote(IDLE_S)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._fit, name="reusable-workers", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def fits(self, cluster: ClusterConfig) -> bool:
        """Return whether the group fits a run, is idle, and has never failed: Ray Train counts failures."""
        if self.cluster != cluster or not self.thread.is_alive():
            return False
        with suppress(RayError, TrainingError):
            _, training, starts = self._state()
            return not training and starts == 1
        return False

    def put(self, reference: list[Any]) -> int | None:
        """Hand over a job and return its number; None where the workers are ending."""
        number: int | None = answer(self.queue.put.remote(reference), "a job for the reusable workers")
        return number

    def wait(self, number: int) -> None:
        """Wait until a job has ended.

        Raises:
            Exception: what ended the workers.
        """
        while True:
            ended = not self.thread.is_alive()
            last, training, _ = self._state()
            if last > number or not training:
                return
            if ended:
                raise self.error or TrainingError("the workers ended before the run")
            self.thread.join(POLL_S)

    def close(self) -> None:
        """End the workers."""
        starts = 0
        with suppress(RayError, TrainingError):
            _, _, starts = self._state()
            answer(self.queue.close.remote(), "the end of the reusable workers")
        # A group that has never started, for want of resources, has nothing to end; Ray drops it with its driver.
        if starts and self.thread.is_alive():
            self.thread.join(CLOSE_S)
        with suppress(RayError):
            ray.kill(self.queue)

    def _state(self) -> tuple[int, bool, int]:
        state: tuple[int, bool, int] = answer(self.queue.state.remote(), "the state of the reusable workers")
        return state

    def _fit(self) -> None:
        try:
            make_trainer(worker.train_one_after_another, self.queue, self.cluster, self.name).fit()
        except BaseException as error:  # noqa: BLE001 - `wait` raises it
            self.error = error


def train_jobs(queue: Any) -> None:
    """Train job after job as one worker of a group, until there are no more; an error in one ends the group.

    Args:
        queue: handle of the driver's job queue.
    """
    rank = ray.train.get_context().get_world_rank()
    if rank == 0:
        answer(queue.group_started.remote(), "the start of the reusable workers")
    last = 0
    while True:
        number, reference = _next_job(queue, last)
        if number == JobQueue.END:
            return
        started = time.monotonic() if last else STARTED
        _train_job(started, **ray.get(reference[0]))
        if rank == 0:
            answer(queue.done.remote(number), "the end of a job")
        last = number


def _train_job(started: float, job: Job, monitor: Any) -> None:
    # Not at the top: the driver imports this module too, and this takes it a second.
    from pipelines.training.loop.train import train_rank

    if failed_for_good(monitor):
        return
    with open_rank(job, monitor, started) as (context, shell):
        train_rank(context, shell, started)
    # Leave the process as a new one would be: without this run's memory and compiled graphs.
    collect_all()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if job.config.cluster.compile:
        torch.compiler.reset()


def _next_job(queue: Any, last: int) -> tuple[int, Any]:
    """Wait for the next job and return (number, reference to it), or (END, None) where there are no more.

    Raises:
        DriverLostError: the driver, which owns the queue, has ended.
    """
    while True:
        number, reference = get_reply(queue.take.remote(last)) or (JobQueue.WAIT, None)
        if number != JobQueue.WAIT:
            return number, reference
        time.sleep(POLL_S)
