"""The driver of a training run: opens the MLflow run, starts Ray Train, shows progress, stops cleanly on Ctrl-C."""

from __future__ import annotations

import getpass
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipelines import checkpoints, models, tracking
from pipelines.checkpoints import CheckpointState, Published
from pipelines.config import Config
from pipelines.shards.index import Dataset, DatasetError, read_dataset, read_quarantine
from pipelines.storage import Storage, join
from pipelines.tracking import Tracker
from pipelines.training import STARTED, worker
from pipelines.training.progress import Progress
from pipelines.training.shell import Job, Store

Report = Callable[[dict[str, float]], None]


class TrainingError(RuntimeError):
    """A run that could not start or did not finish; says why and what to do."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training left behind.

    Attributes:
        status: "finished", "stopped" (on request, with a checkpoint) or "complete" (there was nothing left to do).
        published: the newest checkpoint that stays, if any.
    """

    tracker: Tracker
    status: str
    images_seen: int
    published: Published | None


@dataclass(frozen=True)
class Plan:
    """What a training is about to do, found out before anything starts."""

    job: Job
    resumes_at: int
    run_existed: bool

    @property
    def complete(self) -> bool:
        """Whether the run has seen all its images already."""
        return self.resumes_at >= self.job.config.images


def connect_ray(config: Config, storage: Storage) -> None:
    """Join the Ray cluster of the configuration, once per process.

    Job-level environment reaches every worker; Ray's dashboard shows it, so it holds paths and endpoints, no secrets.
    """
    if ray.is_initialized():
        return
    environment = {
        **storage.environment(),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning barriers ruin a step beside any busy process
        "OMP_NUM_THREADS": str(config.cluster.threads_per_worker),
        "RAY_TRAIN_V2_ENABLED": "1",
    }
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": environment},
            log_to_driver=False,
            logging_level="ERROR",
            namespace="ddpm",
        )
    except ConnectionError as error:
        raise TrainingError(f"no Ray cluster answers at {address}: check cluster.address or RAY_ADDRESS") from error


def require_resources(config: Config, timeout_s: float = 60) -> None:
    """Wait a while for a cluster that is still growing; refuse what it cannot give.

    Raises:
        TrainingError: fewer CPUs or GPUs than the workers need.
    """
    cluster = config.cluster
    needed = {
        "CPU": cluster.num_workers * cluster.cpus_per_worker,
        "GPU": cluster.num_workers * cluster.gpus_per_worker,
    }
    deadline = time.monotonic() + timeout_s
    while True:
        there = ray.cluster_resources()
        short = {k: (v, there.get(k, 0.0)) for k, v in needed.items() if there.get(k, 0.0) < v}
        if not short:
            return
        # A one-node cluster without an autoscaler will not grow: say so at once.
        if time.monotonic() > deadline or (len(ray.nodes()) == 1 and config.storage.local_stack):
            listed = ", ".join(f"{need:g} {k} needed, {have:g} there" for k, (need, have) in short.items())
            raise TrainingError(
                f"the Ray cluster is too small for {cluster.num_workers} workers: {listed}. "
                "Lower cluster.num_workers, cpus_per_worker or gpus_per_worker, or add nodes"
            )
        time.sleep(1)


def make_plan(config: Config, storage: Storage, lineage: dict[str, Any]) -> Plan:
    """Check storage, dataset and earlier checkpoints of this name, and open the MLflow run.

    Raises:
        StorageError, DatasetError, ModelError, TrackingError: what is wrong, before anything starts.
    """
    storage.require(config.storage.root)
    dataset = read_dataset(config.data.uri, storage)
    check_dataset(dataset, config)
    quarantine = read_quarantine(config.data.uri, storage)
    state = newest_checkpoint(config, storage)
    if state is not None:
        checkpoints.check_resumable(state, config, dataset, quarantine)
    elif config.init_from is not None:
        models.initial_weights(config, config.tracking.uri, storage)  # whether there are any
    assert config.tracking.uri is not None
    tracker, existed = tracking.open_run(config.tracking.uri, config.tracking.experiment, config.name, {})
    job = Job(config, dataset, storage, tracker, {**lineage, "run_id": tracker.run_id}, quarantine)
    return Plan(job, state.images_seen if state else 0, existed)


def train(
    plan: Plan, report: Report = lambda values: None, notice: Callable[[str], None] = lambda text: None
) -> TrainingResult:
    """Run a plan to its end.

    Args:
        report: called with `images_seen` and `loss` while training goes on.
        notice: called with lines for the user, such as what Ctrl-C does.

    Raises:
        TrainingError: the workers failed more often than `cluster.max_failures`.
    """
    job, config, tracker = plan.job, plan.job.config, plan.job.tracker
    if plan.complete:
        return _result(tracker, "complete", plan.resumes_at)
    connect_ray(config, job.storage)
    require_resources(config)
    tracker.status("RUNNING")
    tracker.params(config.identity() | {"images": config.images, "name": config.name})
    commit = str(job.lineage.get("git_commit") or "unknown")
    tracker.tags(
        {
            "dataset_digest": job.dataset.digest,
            "dataset_uri": job.dataset.uri,
            "git_commit": commit,
            "code_version": str(job.lineage.get("code_version")),
            "mlflow.source.git.commit": commit,
            "mlflow.source.name": f"ddpm train name={config.name}",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": getpass.getuser(),
            "mlflow.note.content": _description(job),
        }
    )
    counts = {split: job.dataset.samples(split) for split in job.dataset.splits}
    tracker.dataset(job.dataset.uri.rsplit("/", 1)[-1], job.dataset.digest, job.dataset.uri, counts)
    tracker.text(tracking.to_json(config.model_dump(mode="json")), "config.json")
    monitor = ray.remote(num_cpus=0)(Monitor).remote()
    try:
        error = _fit_and_watch(job, monitor, report, notice)
        last = ray.get(monitor.snapshot.remote())
    except KeyboardInterrupt:
        tracker.status("KILLED")
        raise
    finally:
        ray.kill(monitor)
    if error is not None:
        tracker.status("FAILED")
        raise TrainingError(f"training '{config.name}' failed: {_root_cause(error)}") from error
    seen = int(last.get("images_seen", plan.resumes_at))
    finished = seen >= config.images
    tracker.status("FINISHED" if finished else "KILLED")
    return _result(tracker, "finished" if finished else "stopped", seen)


def _description(job: Job) -> str:
    """The run in words, as the page of the run shows it."""
    config = job.config
    return (
        f"{config.images:,} images of `{job.dataset.uri}` in batches of {config.batch_size} "
        f"on {config.cluster.num_workers} workers: {config.objective.prediction}-prediction, "
        f"{config.schedule.kind} schedule. Steps of all curves are images seen. Sample grids are under *Artifacts*, "
        "`images/`, and, with a step slider, at the end of *Model metrics*. "
        f"Resume with `ddpm train … name={config.name}`; "
        f"sample with `ddpm sample runs:/{job.tracker.run_id} --out DIR`."
    )


def check_dataset(dataset: Dataset, config: Config) -> None:
    """Refuse a dataset that is not what the configuration says.

    Raises:
        DatasetError: names each field that differs.
    """
    data = config.data
    pairs = {
        "image_size": (dataset.image_size, data.image_size),
        "channels": (dataset.channels, data.channels),
        "num_classes": (len(dataset.classes), data.num_classes),
    }
    wrong = [
        f"data.{k} is {set_} in the config, {there} in the dataset"
        for k, (there, set_) in pairs.items()
        if there != set_
    ]
    if wrong:
        raise DatasetError(f"{dataset.uri} does not fit the configuration: {'; '.join(wrong)}")


def newest_checkpoint(config: Config, storage: Storage) -> CheckpointState | None:
    """The newest complete checkpoint that Ray Train would resume this name from."""
    found = checkpoints.complete_checkpoints(storage, join(config.storage.root, "runs", config.name))
    return found[0][1] if found else None


def _result(tracker: Tracker, status: str, images_seen: int) -> TrainingResult:
    published = checkpoints.list_published(tracker)
    return TrainingResult(tracker, status, images_seen, published[-1] if published else None)


class Monitor:
    """A mailbox between rank 0 and the driver: progress one way, the wish to stop the other way."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.stop = False

    def post(self, values: dict[str, float]) -> bool:
        """Newest progress; answers whether to stop."""
        self.values = values
        return self.stop

    def request_stop(self) -> None:
        """Ask rank 0 to stop at its next step."""
        self.stop = True

    def snapshot(self) -> dict[str, float]:
        """Newest progress."""
        return self.values


class RayShell:
    """`Shell` inside a Ray Train worker."""

    def __init__(self, monitor: Any, rank: int) -> None:
        self.monitor, self.rank = monitor, rank
        self.answer: Any = None
        self.stop = False
        self.posted = 0.0

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        """Ray Train's newest checkpoint."""
        newest = ray.train.get_checkpoint()
        if newest is None:
            yield None
        else:
            with newest.as_directory() as folder:
                yield Path(folder)

    def save(self, store: Store | None, metrics: dict[str, Any]) -> None:
        """Upload through Ray Train, which keeps the list that a restart reads."""
        with tempfile.TemporaryDirectory(prefix="ddpm-report-") as folder:
            if store is not None:
                store(f"file://{folder}")
            ray.train.report(metrics, checkpoint=None if store is None else Checkpoint.from_directory(folder))
        if self.rank == 0:
            ray.get(self.monitor.post.remote(metrics))

    def flush(self) -> None:
        """Nothing is under way: `save` waits."""

    def progress(self, progress: Progress) -> None:
        """Send at most four times a second; the answer is looked at later, without waiting."""
        if self.answer is not None:
            done, _ = ray.wait([self.answer], timeout=0)
            if done:
                self.stop = self.stop or ray.get(self.answer)
                self.answer = None
        if self.answer is None and time.monotonic() - self.posted > 0.25:
            values = {"images_seen": progress.images_seen, "loss": progress.loss}
            self.answer, self.posted = self.monitor.post.remote(values), time.monotonic()

    def stop_requested(self) -> bool:
        """What the driver last answered."""
        return self.stop

    def checkpoint_requested(self) -> bool:
        """No preemption notice is listened to yet."""
        return False


def _worker_main(settings: dict[str, Any]) -> None:
    """One Ray Train worker."""
    from ray.train.torch import get_device

    job: Job = settings["job"]
    torch.set_num_threads(job.config.cluster.threads_per_worker)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    worker.train(
        job,
        RayShell(settings["monitor"], rank),
        rank=rank,
        world_size=context.get_world_size(),
        device=get_device(),
        started=STARTED,
    )


def _fit_and_watch(job: Job, monitor: Any, report: Report, notice: Callable[[str], None]) -> BaseException | None:
    """Fit in a thread, so that the main thread shows progress and owns Ctrl-C; the error that ended it, if any."""
    config = job.config
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config={"job": job, "monitor": monitor},
        scaling_config=ScalingConfig(
            num_workers=config.cluster.num_workers,
            use_gpu=config.cluster.gpus_per_worker > 0,
            resources_per_worker=_resources(config),
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=job.storage.arrow_uri(join(config.storage.root, "runs")),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
        ),
    )
    outcome: list[BaseException | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            outcome.append(None)
        except BaseException as error:  # noqa: BLE001 - it is handed to the main thread
            outcome.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    with _interrupts(monitor, notice):
        thread.start()
        while thread.is_alive():
            thread.join(0.25)
            values = ray.get(monitor.snapshot.remote())
            if values:
                report(values)
    return outcome[0]


@contextmanager
def _interrupts(monitor: Any, notice: Callable[[str], None]) -> Iterator[None]:
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


def _resources(config: Config) -> dict[str, float]:
    resources = {"CPU": float(config.cluster.cpus_per_worker)}
    if config.cluster.gpus_per_worker:
        resources["GPU"] = float(config.cluster.gpus_per_worker)
    return resources


def _root_cause(error: BaseException) -> str:
    """The innermost message, without the stack of actors around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = next(iter(failures.items()))
        inner = getattr(cause, "_base_exc", cause)
        return f"worker {rank}: {type(inner).__name__}: {inner}"
    return f"{type(error).__name__}: {error}"
