"""Ray Train around the rank loop: what a worker runs, what Ray survives, and the driver's watch over it."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipelines import tracking
from pipelines.checkpoints import ModelError
from pipelines.config import ClusterConfig
from pipelines.shards.cache import ShardCorruptError
from pipelines.storage import Fence, NotFoundError, Storage, join
from pipelines.storage.arrow import open_filesystem
from pipelines.training import STARTED, worker
from pipelines.training.goodput import Ledger
from pipelines.training.ray_shell import RayShell
from pipelines.training.resources import TrainingError, alive_nodes, per_worker, shortage
from pipelines.training.resume import run_folder
from pipelines.training.shell import Job

WATCH_EVERY_S = 0.5
FINAL = (FloatingPointError, ShardCorruptError, ModelError)
"""What comes again however often the workers are started: the stream is the same, and so are data and checkpoints."""
Report = Callable[[dict[str, float]], None]
Notice = Callable[[str], None]
Workers = Callable[[Job, Any, Fence], Callable[[], object]]
"""(job, monitor, fence) -> a call that trains the job to its end; see `own_workers`."""


def train_rank(job: Job, monitor: Any, shell: RayShell, started: float) -> None:
    """This Ray Train worker's part of a run, in a shell that is new.

    Args:
        started: `time.monotonic()` when this attempt began.
    """
    from ray.train.torch import get_device

    if ray.get(monitor.why_final.remote()) is not None:
        return  # Ray Train starts the workers again whatever it was; the driver says why
    torch.set_num_threads(job.config.cluster.threads_per_worker)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    node = f"node-{context.get_node_rank()}"
    with tracking.system_metrics(job.tracker, node) if context.get_local_rank() == 0 else nullcontext():
        try:
            worker.train(job, shell, rank=rank, world_size=world_size, device=get_device(), started=started)
        except FINAL as error:
            ray.get(monitor.give_up.remote(str(error)))
            raise  # the others may be waiting for this rank: Ray Train ends them
        shell.close()


def _worker_main(settings: dict[str, Any]) -> None:
    """One Ray Train worker."""
    job, monitor = settings["job"], settings["monitor"]
    rank = ray.train.get_context().get_world_rank()
    shell = RayShell(monitor, rank, job.storage, run_folder(job.config), settings["fence"], STARTED)
    train_rank(job, monitor, shell, STARTED)


def make_trainer(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    cluster: ClusterConfig,
    storage: Storage,
    folder: str,
    keep: int,
    fence: Fence | None,
) -> TorchTrainer:
    """Ray's side of a training: how many workers, where their checkpoints are listed, what it survives.

    Args:
        loop: what a worker runs, with `settings`.
        folder: where Ray Train keeps its list.
        keep: checkpoints that stay in it.
        fence: asked before Ray Train writes there.
    """
    parent, name = folder.rsplit("/", 1)
    filesystem, path = open_filesystem(storage, parent, fence)
    return TorchTrainer(
        loop,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=per_worker(cluster),
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            # A group of workers that does not come up in a minute is tried again as long as patience lasts.
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=math.ceil(cluster.patience_s / 60)
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=keep),
        ),
    )


def own_workers(job: Job, monitor: Any, fence: Fence) -> Callable[[], object]:
    """A Ray Train run for this run alone: call it to train."""
    settings = {"job": job, "monitor": monitor, "fence": fence}
    config, folder = job.config, run_folder(job.config)
    trainer = make_trainer(_worker_main, settings, config.cluster, job.storage, folder, config.checkpoint.keep, fence)
    _take_over_reservation(job, trainer)
    return trainer.fit


def fit_and_watch(
    job: Job, monitor: Any, fit: Callable[[], object], ledger: Ledger, report: Report, notice: Notice
) -> BaseException | None:
    """Fit in a thread, so that the main thread shows progress and owns Ctrl-C; the error that ended it, if any.

    Args:
        fit: trains the job to its end; see `own_workers`.
    """
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            fit()
            outcome.append(None)
        except BaseException as error:  # noqa: BLE001 - it is handed to the main thread
            outcome.append(error)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    missing = _Missing(job.config.cluster)
    with _interrupts(monitor, notice):
        thread.start()
        while thread.is_alive():
            thread.join(WATCH_EVERY_S)
            try:
                attempts, loss = ray.get(monitor.snapshot.remote())
                gone = missing.too_long()
            except RayError as error:
                return TrainingError(f"the Ray cluster is lost, the same command resumes on another: {error}")
            ledger.update(attempts)
            if attempts:
                report({"images_seen": attempts[-1].images_seen, **({} if loss is None else {"loss": loss})})
            if gone:
                return TrainingError(gone)
    final = ray.get(monitor.why_final.remote())
    return outcome[0] if final is None else TrainingError(f"training '{job.config.name}' failed: {final}")


class _Missing:
    """Watches whether the cluster can hold the workers at all: Ray Train would wait for ever."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self.looked = time.monotonic()
        self.since: float | None = None

    def too_long(self) -> str | None:
        """Why not, where that has been so for `cluster.patience_s`; looks every few seconds."""
        now = time.monotonic()
        if now - self.looked < 5:
            return None
        self.looked = now
        short = shortage(self.cluster, alive_nodes())
        self.since = None if short is None else self.since or now
        return short if self.since is not None and now - self.since > self.cluster.patience_s else None


def _take_over_reservation(job: Job, trainer: TorchTrainer) -> None:
    """Give back what the controller of a killed driver had reserved, and leave word of what this one will.

    Ray's coordinator, which outlives drivers, keeps a reservation for three minutes; so long an elastic run would wait
    for its own former self.
    """
    # Workers import this module too, and half a second of Ray Data with it.
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    uri = join(run_folder(job.config), "reservation")
    with suppress(NotFoundError):
        before = job.storage.read(uri).decode()
        with suppress(RayError):
            ray.get(get_or_create_autoscaling_coordinator().cancel_request.remote(requester_id=before), timeout=10)
    job.storage.write(uri, f"train-{trainer.train_run_context.run_id}".encode())


@contextmanager
def _interrupts(monitor: Any, notice: Notice) -> Iterator[None]:
    """First Ctrl-C: stop at a step boundary with a checkpoint. Second: abort."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    presses = 0

    def handle(signum: int, frame: Any) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt
        notice("stopping at the next step with a checkpoint; press Ctrl-C again to abort without one")
        monitor.request_stop.remote()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
