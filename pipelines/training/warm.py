"""Workers that stay: one group of Ray Train workers trains one run after another.

A Ray Train run starts several processes around its workers, and they and the workers import for seconds, which takes
longer than training a small model. The trials of a study are many and alike: a group takes the next where the last has
ended. To Ray it is one run, whose workers ask for what to train; what a training stores, resumes from and tells MLflow
is what it would be with workers of its own.
"""

from __future__ import annotations

import gc
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from pipelines.config import ClusterConfig
from pipelines.storage import Fence, Storage, StorageError, join
from pipelines.training import STARTED
from pipelines.training.fit import make_trainer, own_workers, train_rank
from pipelines.training.monitor import Orders
from pipelines.training.ray_shell import RayShell, fetched, heard
from pipelines.training.resources import TrainingError
from pipelines.training.resume import enter_checkpoint, listed_checkpoints, run_folder
from pipelines.training.shell import Job, Store

POLL_S = 0.1
IDLE_S = 20.0
"""How long workers are kept without a run: a trial that needs more of them than are free waits for so long at most."""
CLOSE_S = 60.0


class WarmWorkers:
    """A driver's group of workers, started with its first run and whenever a run needs another kind.

    Args:
        folder: address below which Ray Train keeps the little that it keeps of groups.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.group: _Group | None = None

    def take(self, job: Job, monitor: Any, fence: Fence) -> Callable[[], object]:
        """`fit.Workers` that stay; an elastic run has its own, for Ray resizes its group as it likes."""
        cluster = job.config.cluster
        if cluster.min_workers != cluster.max_workers:
            return own_workers(job, monitor, fence)
        return partial(self._train, job, monitor, fence)

    def close(self) -> None:
        """End the workers."""
        if self.group is not None:
            self.group.close()
            self.group = None

    def _train(self, job: Job, monitor: Any, fence: Fence) -> None:
        # Put into the object store: what a job holds is imported where it is used, not where orders are kept.
        order = [ray.put({"job": job, "monitor": monitor, "fence": fence})]
        number = None
        if self.group is not None and self.group.fits(job.config.cluster):
            number = self.group.put(order)
        if number is None:
            self.close()
            self.group = _Group(job, join(self.folder, f"group-{uuid.uuid4().hex[:8]}"))
            number = self.group.put(order)
            assert number is not None
            self.group.start()
        self.group.wait(number)  # type: ignore[union-attr]


class _Group:
    """One Ray Train run."""

    def __init__(self, first: Job, folder: str) -> None:
        self.cluster, self.storage, self.folder = first.config.cluster, first.storage, folder
        self.orders = ray.remote(Orders).options(num_cpus=0).remote(IDLE_S)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._fit, name="warm-workers", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def fits(self, cluster: ClusterConfig) -> bool:
        """Whether these workers are what a run asks for, free, and have never failed: Ray Train counts failures."""
        if self.cluster != cluster or not self.thread.is_alive():
            return False
        with suppress(RayError):
            _, under_way, starts = ray.get(self.orders.state.remote())
            return not under_way and starts == 1
        return False

    def put(self, order: Any) -> int | None:
        number: int | None = ray.get(self.orders.put.remote(order))
        return number

    def wait(self, number: int) -> None:
        """Until a run has ended.

        Raises:
            Exception: what ended the workers.
        """
        while True:
            ended = not self.thread.is_alive()
            last, under_way, _ = ray.get(self.orders.state.remote())
            if last > number or not under_way:
                return
            if ended:
                raise self.error or TrainingError("the workers ended before the run")
            self.thread.join(POLL_S)

    def close(self) -> None:
        starts = 0
        with suppress(RayError):
            _, _, starts = ray.get(self.orders.state.remote())
            ray.get(self.orders.close.remote())
        # One that has never come up, for want of resources, has nothing to end; Ray drops it with its driver.
        if starts and self.thread.is_alive():
            self.thread.join(CLOSE_S)
        with suppress(RayError):
            ray.kill(self.orders)
        with suppress(StorageError):  # a store that is away keeps a few small files
            self.storage.delete_folder(self.folder, patience_s=0)

    def _fit(self) -> None:
        try:
            make_trainer(_serve, {"orders": self.orders}, self.cluster, self.storage, self.folder, 1, None).fit()
        except BaseException as error:  # noqa: BLE001 - it is raised where the run is waited for
            self.error = error


class ListingShell(RayShell):
    """`RayShell` of a run that has no Ray Train run of its own: it keeps the list of its checkpoints itself."""

    def __init__(
        self, monitor: Any, rank: int, storage: Storage, folder: str, fence: Fence, started: float, keep: int
    ) -> None:
        super().__init__(monitor, rank, storage, folder, fence, started)
        self.keep = keep
        self.pool = ThreadPoolExecutor(1, "checkpoints")

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        """The newest checkpoint of the list that is whole."""
        with fetched(self.folder, listed_checkpoints(self.folder, self.storage), self.storage) as folder:
            yield folder

    def save(self, store: Store | None, metrics: dict[str, Any]) -> None:
        """Upload in a thread, then enter the checkpoint in the list."""
        if store is None:
            return
        self.make_room()
        self.uploads.append(self.pool.submit(self._store, store, metrics))

    def close(self) -> None:
        """Send the last progress; the run is over."""
        super().close()
        self.pool.shutdown()

    def _store(self, store: Store, metrics: dict[str, Any]) -> None:
        self.fence.check()
        name = f"checkpoint_{metrics['images_seen']:012d}_{self.attempt[:8]}"
        store(join(self.folder, name))
        self.fence.check()
        enter_checkpoint(self.folder, self.storage, name, metrics, self.keep)


def _serve(settings: dict[str, Any]) -> None:
    """One worker of a group: run after run, until there are no more. What fails in one ends the group."""
    orders = settings["orders"]
    rank = ray.train.get_context().get_world_rank()
    if rank == 0:
        ray.get(orders.begin.remote())
    last = 0
    while True:
        number, order = _next(orders, last)
        if number == Orders.END:
            return
        started = time.monotonic() if last else STARTED
        _train(rank, started, **ray.get(order[0]))
        if rank == 0:
            ray.get(orders.done.remote(number))
        last = number


def _train(rank: int, started: float, job: Job, monitor: Any, fence: Fence) -> None:
    keep = job.config.checkpoint.keep
    shell = ListingShell(monitor, rank, job.storage, run_folder(job.config), fence, started, keep)
    train_rank(job, monitor, shell, started)
    # As in a new process: no memory of this run's, no graphs of its network.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if job.config.cluster.compile:
        torch.compiler.reset()


def _next(orders: Any, last: int) -> tuple[int, Any]:
    """The next run, or that there is none; waits for it.

    Raises:
        DriverLostError: nobody gives orders any more.
    """
    while True:
        number, order = heard(orders.take.remote(last)) or (Orders.WAIT, None)
        if number != Orders.WAIT:
            return number, order
        time.sleep(POLL_S)
