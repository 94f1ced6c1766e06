"""The driver of a training run: opens the MLflow run, starts Ray Train, shows progress, stops cleanly on Ctrl-C."""

from __future__ import annotations

import getpass
import hashlib
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import checkpoints, models, tracking
from pipelines.checkpoints import Published
from pipelines.config import Config, ConfigError
from pipelines.filesystem import Fence, FencedError
from pipelines.shards.index import Dataset, DatasetError, read_dataset
from pipelines.shards.quarantine import read_quarantine
from pipelines.storage import Storage, join
from pipelines.tracking import Tracker
from pipelines.training.fit import Notice, Report, Workers, fit_and_watch, own_workers
from pipelines.training.goodput import Goodput, Ledger
from pipelines.training.monitor import Monitor
from pipelines.training.resources import TrainingError, connect_ray, require_resources
from pipelines.training.resume import newest_checkpoint, run_folder, sweep
from pipelines.training.shell import Job

NAMESPACE = "ddpm-runs"


@dataclass(frozen=True)
class TrainingResult:
    """What a training left behind.

    Attributes:
        status: "finished", "stopped" (on request, with a checkpoint) or "complete" (there was nothing left to do).
        published: the newest checkpoint that stays, if any.
        goodput: where the time of the run went, earlier drivers of it included; None where nothing was measured.
    """

    tracker: Tracker
    status: str
    images_seen: int
    published: Published | None
    goodput: Goodput | None


@dataclass(frozen=True)
class Plan:
    """What a training is about to do, found out before anything starts."""

    job: Job
    resumes_at: int

    @property
    def complete(self) -> bool:
        """Whether the run has seen all its images already."""
        return self.resumes_at >= self.job.config.images


def make_plan(config: Config, storage: Storage, lineage: dict[str, Any]) -> Plan:
    """Check storage, dataset and earlier checkpoints of this name, and open the MLflow run.

    Raises:
        ConfigError, StorageError, DatasetError, ModelError, TrackingError: what is wrong, before anything starts.
    """
    if config.guidance.kind != "classifier_free":
        raise ConfigError(
            f"guidance.kind = {config.guidance.kind}: a training draws its grids by itself; leave it at "
            "classifier_free, and choose guidance by another network in `ddpm evaluate` or `ddpm search guidance`"
        )
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
    tracker, _ = tracking.open_run(config.tracking.uri, config.tracking.experiment, config.name, {})
    job = Job(config, dataset, storage, tracker, {**lineage, "run_id": tracker.run_id}, quarantine)
    return Plan(job, state.images_seen if state else 0)


def train(
    plan: Plan,
    report: Report = lambda values: None,
    notice: Notice = lambda text: None,
    workers: Workers = own_workers,
) -> TrainingResult:
    """Run a plan to its end.

    Args:
        workers: who trains; see `pipelines.training.warm` for some that train other runs as well.
        report: called with `images_seen` and `loss` while training goes on.
        notice: called with lines for the user, such as what Ctrl-C does.

    Raises:
        TrainingError: the cluster is too small, another driver has the run, or the workers failed more often than
            `cluster.max_failures` without a new checkpoint.
    """
    job, config, tracker = plan.job, plan.job.config, plan.job.tracker
    if plan.complete:
        return _result(tracker, "complete", plan.resumes_at, Ledger(job.storage, run_folder(config)).goodput())
    began = time.time()
    connect_ray(config, job.storage)
    require_resources(config, notice)
    with _only_driver(config) as monitor:
        ledger = Ledger(job.storage, run_folder(config))
        error = _train_alone(job, monitor, ledger, began, report, notice, workers)
    goodput = ledger.goodput()
    seen = max(plan.resumes_at, goodput.images_seen if goodput else 0)
    if goodput:
        tracking.patiently(lambda: tracker.metrics(goodput.metrics(), seen))
    if error is not None:
        tracker.status("FAILED")
        if isinstance(error, TrainingError):
            raise error
        raise TrainingError(f"training '{config.name}' failed: {_root_cause(error)}") from error
    finished = seen >= config.images
    tracker.status("FINISHED" if finished else "KILLED")
    return _result(tracker, "finished" if finished else "stopped", seen, goodput)


def _train_alone(
    job: Job, monitor: Any, ledger: Ledger, began: float, report: Report, notice: Notice, workers: Workers
) -> BaseException | None:
    """Train as the only driver of the run; what ended it, None where it finished or stopped as it should."""
    config = job.config
    with ledger.session(began):
        fence = Fence(job.storage, join(run_folder(config), "driver"), uuid.uuid4().hex)
        fence.take()
        sweep(run_folder(config), job.storage)
        _describe_run(job)
        try:
            error = _fit_until_stuck(job, monitor, fence, ledger, report, notice, workers)
        except KeyboardInterrupt:
            job.tracker.status("KILLED")
            raise
        if error is None:
            sweep(run_folder(config), job.storage)
    return error


def _fit_until_stuck(
    job: Job, monitor: Any, fence: Fence, ledger: Ledger, report: Report, notice: Notice, workers: Workers
) -> BaseException | None:
    """Fit, and fit again where it failed with a new checkpoint since the start: what ended it, None where it finished.

    Ray Train counts failures over its whole life and takes some of its own controller's for final. A run of a month
    may fail more often, as long as it gets on.
    """
    while True:
        before = newest_checkpoint(job.config, job.storage)
        error = fit_and_watch(job, monitor, workers(job, monitor, fence), ledger, report, notice)
        if error is None or isinstance(error, TrainingError):
            return error
        try:
            fence.check()
        except FencedError as fenced:
            return TrainingError(str(fenced))
        now = newest_checkpoint(job.config, job.storage)
        if now is None or (before is not None and now.images_seen <= before.images_seen):
            return error
        notice(f"starting again at {now.images_seen:,} images after: {_root_cause(error)}")


def monitor_name(folder: str) -> str:
    """Name of the monitor of the run that is stored in a folder, in the namespace `NAMESPACE` of a cluster."""
    return "run-" + hashlib.sha256(folder.encode()).hexdigest()[:16]


def request_stop(config: Config) -> None:
    """Ask the workers of a run that another thread or process trains on this cluster to stop, as Ctrl-C does."""
    with suppress(ValueError, RayError):  # there is none yet, or no longer
        ray.get_actor(monitor_name(run_folder(config)), namespace=NAMESPACE).request_stop.remote()


@contextmanager
def _only_driver(config: Config, wait_s: float = 15) -> Iterator[Any]:
    """The run's monitor: an actor with the run's name, of which a cluster has one, on the driver's own node.

    Raises:
        TrainingError: another driver of this run is there, and does not go.
    """
    name = monitor_name(run_folder(config))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "name": name, "namespace": NAMESPACE, "scheduling_strategy": here}
    deadline = time.monotonic() + wait_s
    while True:
        try:
            monitor = ray.remote(Monitor).options(**options).remote()
            ray.get(monitor.snapshot.remote())
            break
        except ValueError as error:
            # That of a driver that was killed a moment ago goes with it.
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


def _describe_run(job: Job) -> None:
    """Open the run's page anew: settings, lineage, dataset, and a description in words."""
    config, tracker = job.config, job.tracker
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


def workers_text(config: Config) -> str:
    """How many workers, in words."""
    least, most = config.cluster.min_workers, config.cluster.max_workers
    return f"{most} workers" if least == most else f"{least} to {most} workers"


def _description(job: Job) -> str:
    """The run in words, as the page of the run shows it."""
    config = job.config
    return (
        f"{config.images:,} images of `{job.dataset.uri}` in batches of {config.batch_size} "
        f"on {workers_text(config)}: {config.objective.prediction}-prediction, "
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


def _result(tracker: Tracker, status: str, images_seen: int, goodput: Goodput | None) -> TrainingResult:
    published = checkpoints.list_published(tracker)
    return TrainingResult(tracker, status, images_seen, published[-1] if published else None, goodput)


def _root_cause(error: BaseException) -> str:
    """The innermost message, without the stack of actors around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = next(iter(failures.items()))
        inner = getattr(cause, "_base_exc", cause)
        return f"worker {rank}: {type(inner).__name__}: {inner}"
    return f"{type(error).__name__}: {error}"
