"""The driver of a training run: opens the MLflow run, starts Ray Train, shows progress, stops cleanly on Ctrl-C.

Beside it a thread has published checkpoints scored, see `evaluations`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayActorError
from ray.train import ControllerError

from pipelines import checkpoints, tracking
from pipelines.checkpoints import CheckpointState, Published, newest_checkpoint, references
from pipelines.config import Config, ConfigError
from pipelines.presentation.progress import NOT_WORKING, Notice, Report, TrainingStatus, no_notice, no_report
from pipelines.shards.captions import caption_width
from pipelines.shards.index import Dataset, DatasetError, read_dataset
from pipelines.shards.ingest.report import recorded_encoder
from pipelines.shards.quarantine import read_quarantine
from pipelines.shards.text import is_path, local_encoder
from pipelines.storage import FencedError, Storage, StorageError
from pipelines.storage.retry import PATIENCE_S
from pipelines.tracking import FIRST_ANSWER_S, Tracker
from pipelines.training.describe import describe_run, report_goodput
from pipelines.training.errors import TrainingError
from pipelines.training.evaluations import Evaluations
from pipelines.training.goodput import Goodput
from pipelines.training.ledger import Ledger, goodput_of, read_sessions
from pipelines.training.loop.context import Job
from pipelines.training.loop.health import expected_faults
from pipelines.training.loop.log import send_unsent
from pipelines.training.ray_train.monitor import only_driver
from pipelines.training.ray_train.resources import (
    alive_nodes,
    connect_ray,
    has_room_beside,
    is_free,
    require_resources,
)
from pipelines.training.ray_train.trainer import WorkerProvider, dedicated_workers
from pipelines.training.ray_train.watch import fit_and_watch
from pipelines.training.run_id import open_training_run
from pipelines.training.scoring import Evaluate, needs, score_on_ray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training.

    Attributes:
        tracker: the MLflow run.
        status: "finished", "stopped" (on request, with a checkpoint) or "complete" (there was nothing left to do).
        images_seen: by the run, over all its drivers.
        published: the newest published checkpoint, if any.
        goodput: where the time of the run went, earlier drivers of it included; None where nothing was measured.
    """

    tracker: Tracker
    status: str
    images_seen: int
    published: Published | None
    goodput: Goodput | None


@dataclass(frozen=True)
class Plan:
    """A training that has been checked and not started.

    Attributes:
        job: what the workers need.
        resumes_at: images seen by the newest checkpoint; 0 for a new run.
        length: images after which the run ends, as far as is known.
    """

    job: Job
    resumes_at: int
    length: int

    @property
    def complete(self) -> bool:
        """Whether the run has seen all its images already."""
        return self.resumes_at >= self.length


def make_plan(config: Config, storage: Storage, lineage: dict[str, Any], tags: Mapping[str, str] | None = None) -> Plan:
    """Check storage, dataset and earlier checkpoints of this name, open the MLflow run, and return the plan.

    Args:
        tags: of a trial of a study, whose MLflow server has answered before; for a new MLflow run.

    Raises:
        ConfigError, StorageError, DatasetError, ModelError, TrackingError, TrainingError: what is wrong, before
            anything starts.
    """
    if config.guidance.kind != "classifier_free":
        raise ConfigError(
            f"guidance.kind = {config.guidance.kind}: a training draws its grids by itself; leave it at "
            "classifier_free, and choose guidance by another network in `ddpm evaluate` or `ddpm search guidance`"
        )
    storage.require(config.storage.root)
    dataset = read_dataset(config.data.uri, storage)
    check_dataset(dataset, config)
    check_captions(dataset, config, storage)
    quarantine = read_quarantine(config.data.uri, storage)
    state = newest_checkpoint(config, storage)
    if state is not None:
        checkpoints.check_resumable(state, config, dataset, quarantine)
    initial = initial_lineage(config, storage, new=state is None)
    # A driver is often restarted together with MLflow, or while it is away.
    patience_s = FIRST_ANSWER_S if state is None and tags is None else PATIENCE_S
    tracker = open_training_run(config, storage, tags, patience_s)
    origin = {**lineage, **initial, **encoder_lineage(config, storage), "run_id": tracker.run_id}
    job = Job(config, dataset, storage, tracker, origin, quarantine)
    return Plan(job, state.images_seen, state.ends_at(config)) if state else Plan(job, 0, config.images)


def initial_lineage(config: Config, storage: Storage, *, new: bool) -> dict[str, Any]:
    """Return which model a run starts from; nothing for a run that starts from new weights.

    Args:
        new: whether the run has no checkpoint yet; otherwise what its newest one has recorded stays.

    Returns:
        `init_from` and `init_from_digest`, the SHA-256 of the weights that it named when the run began.

    Raises:
        ModelError: there is no such model, or it does not fit the configuration.
    """
    if config.init_from is None:
        return {}
    if new:
        found = references.initial_model(config, config.tracking.uri, storage)
        return {"init_from": config.init_from, "init_from_digest": found.digest}
    stored = checkpoints.newest_lineage(config, storage)
    return {key: stored[key] for key in ("init_from", "init_from_digest") if key in stored}


def encoder_lineage(config: Config, storage: Storage) -> dict[str, Any]:
    """Return which encoder has embedded the captions of a run on text; nothing for other runs.

    It is the one that the report of the dataset's ingest names, where it is a hub name or a folder that is here, else
    that of the configuration: the same encoder in another place.

    Returns:
        `text_encoder`, by which the model can be given prompts, and `text_encoder_digest` of its weights, by which
        another one is told from it, where that is known.
    """
    if config.model.text_dim == 0:
        return {}
    recorded = recorded_encoder(config.data.uri, storage)
    there = recorded.name is not None and (local_encoder(recorded.name) is not None or not is_path(recorded.name))
    name = recorded.name if there else config.data.text_encoder or recorded.name
    return {"text_encoder": name, **({"text_encoder_digest": recorded.digest} if recorded.digest else {})}


def check_captions(dataset: Dataset, config: Config, storage: Storage) -> None:
    """Refuse data on whose captions the network of the configuration cannot be conditioned.

    Raises:
        DatasetError: they have no embeddings.
        ConfigError: the embeddings are of another width than the network's.
    """
    width = config.model.text_dim
    for split in ("train", "test"):
        if not width or split not in dataset.splits:
            continue
        found = caption_width(dataset, split, storage)
        if found is None:
            raise DatasetError(
                f"{dataset.uri} has no embeddings of captions (emb.npy) in its split {split!r}, and model.text_dim = "
                f"{width} asks for them: ingest it with data.text_encoder from a source with captions, or set "
                "model.text_dim=0"
            )
        if found != width:
            raise ConfigError(
                f"model.text_dim = {width}, and the embeddings of the captions of {dataset.uri} have {found} numbers: "
                f"set model.text_dim={found}"
            )


def check_dataset(dataset: Dataset, config: Config) -> None:
    """Refuse a dataset that does not fit the configuration.

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
        f"data.{key} is {configured} in the config, {found} in the dataset"
        for key, (found, configured) in pairs.items()
        if found != configured
    ]
    if wrong:
        raise DatasetError(f"{dataset.uri} does not fit the configuration: {'; '.join(wrong)}")


def train(
    plan: Plan,
    report: Report = no_report,
    notice: Notice = no_notice,
    workers: WorkerProvider = dedicated_workers,
    evaluate: Evaluate | None = None,
) -> TrainingResult:
    """Run a plan to its end.

    Args:
        report: called with how far the training is while it goes on.
        notice: called with lines for the user, such as what Ctrl-C does.
        workers: provides the workers; see `ReusableWorkers` for some that train other runs as well.
        evaluate: scores published checkpoints, where `evaluation.every` asks for that; by default a task on Ray.

    Raises:
        TrainingError: the cluster is too small, another driver has the run, or the workers failed more often than
            `cluster.max_failures` without a new checkpoint.
    """
    job, config, tracker = plan.job, plan.job.config, plan.job.tracker
    if plan.complete:
        return _complete(plan, notice, evaluate)
    began, notice = time.time(), on_the_page(tracker, notice)
    for fault in expected_faults(config):
        notice(f"{NOT_WORKING}{fault}")
    connect_ray(config, job.storage)
    require_resources(config, notice)
    with only_driver(config) as monitor:
        job = replace(job, fence=checkpoints.take_over(job.storage, job.run_uri))
        ledger = Ledger(job.storage, job.run_uri, job.epoch)
        with _evaluations(job, plan.length, evaluate, notice) as evaluations:
            with ledger.session(began):
                error = _fit_until_stuck(job, monitor, ledger, _with_scores(report, evaluations), notice, workers)
            if isinstance(error, FencedError):
                raise TrainingError(str(error)) from error  # the MLflow run is another driver's now
            goodput = ledger.goodput()
            seen = max(plan.resumes_at, goodput.images_seen if goodput else 0)
            finished = seen >= ((goodput and goodput.length) or plan.length)
            status = "FAILED" if error is not None else "FINISHED" if finished else "KILLED"
            with tracking.recording(f"does not know that the run is {status}"):
                if goodput:
                    report_goodput(tracker, goodput, seen)
                tracker.status(status)
                if status == "FINISHED":
                    evaluations.finish()
    if error is not None:
        if isinstance(error, TrainingError):
            raise error
        raise TrainingError(f"training '{config.name}' failed: {_root_cause(error)}") from error
    return _result(tracker, "finished" if finished else "stopped", seen, goodput)


def on_the_page(tracker: Tracker, notice: Notice) -> Notice:
    """Return a notice that writes what does not work in a training onto the page of its run as well."""
    faults: list[str] = []

    def tell(text: str) -> None:
        notice(text)
        _, prefix, fault = text.partition(NOT_WORKING)
        if prefix:
            faults.append(fault[:1].upper() + fault[1:] + ".")
            with tracking.recording("does not say on the run's page what is wrong with it"):
                tracking.describe(replace(tracker, patience_s=0), {"Warnings": " ".join(faults)})

    return tell


def _with_scores(report: Report, evaluations: Evaluations) -> Report:
    """Return a report that knows the distance of the newest checkpoint that has been scored.

    It tells the evaluations which checkpoint is the last one.
    """

    def tell(status: TrainingStatus) -> None:
        evaluations.end = status.length or evaluations.end
        scored_at, distance = evaluations.newest_distance() or (None, None)
        report(replace(status, scored_at=scored_at, distance=distance))

    return tell


def _complete(plan: Plan, notice: Notice, evaluate: Evaluate | None) -> TrainingResult:
    """Do what earlier drivers of a run that has seen all its images could not: send what waits, score what is left."""
    job, tracker = plan.job, plan.job.tracker
    goodput = goodput_of(read_sessions(job.storage, job.run_uri))
    with tracking.recording("has not got all that waits"):
        send_unsent(job)
        if not tracker.is_finished():
            if goodput:
                report_goodput(tracker, goodput, plan.resumes_at)
            tracker.status("FINISHED")
        if _evaluations(job, plan.length, evaluate, notice).outstanding():
            connect_ray(job.config, job.storage)
            with only_driver(job.config):
                job = replace(job, fence=checkpoints.take_over(job.storage, job.run_uri))
                with _evaluations(job, plan.length, evaluate, notice) as evaluations:
                    evaluations.finish()
    return _result(tracker, "complete", plan.resumes_at, goodput)


def _evaluations(job: Job, length: int, evaluate: Evaluate | None, notice: Notice) -> Evaluations:
    """Return the evaluations of a run of this length, on resources that its training will never want."""
    config = job.config

    def has_room() -> bool:
        wanted = needs(config)
        return has_room_beside(config.cluster, alive_nodes(), wanted) and is_free(wanted)

    return Evaluations(job, length, evaluate or score_on_ray(config, job.storage, job.tracker), has_room, notice)


def _fit_until_stuck(
    job: Job, monitor: Any, ledger: Ledger, report: Report, notice: Notice, workers: WorkerProvider
) -> BaseException | None:
    """Train, and train again after a failure that came later than a new checkpoint; return the error that ended it.

    Ray Train counts failures over its whole life: a run of a month may fail more often, as long as it makes progress.
    And a worker that is lost just before Ray Train launches the training on it is an error of its controller, which it
    takes for final: here it is one of `cluster.max_failures`.

    Returns:
        None where the run finished, or stopped on request.
    """
    config, storage = job.config, job.storage
    _sweep(job)
    describe_run(job)
    lost_in_vain = 0
    try:
        while True:
            # Train until the workers end.
            before = newest_checkpoint(config, storage)
            error = fit_and_watch(job, monitor, workers(job, monitor), ledger, report, notice)

            # Start again only where this driver still has the run, and the run has got further.
            if fenced := _fenced(job):
                return fenced
            if error is None:
                _sweep(job, ended=True)
                return None
            if isinstance(error, TrainingError):
                return error
            now = newest_checkpoint(config, storage)
            if now is not None and _is_newer(now, before):
                lost_in_vain = 0
            elif _is_loss_of_worker(error) and lost_in_vain < config.cluster.max_failures:
                lost_in_vain += 1
            else:
                return error
            seen = 0 if now is None else now.images_seen
            notice(f"starting again at {seen:,} images after: {_root_cause(error)}")
    except KeyboardInterrupt:
        if not _fenced(job):
            job.tracker.status("KILLED")
        raise


def _is_loss_of_worker(error: BaseException) -> bool:
    """Return whether an error of Ray Train's controller is the loss of a worker that it was just starting."""
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, RayActorError)


def _fenced(job: Job) -> FencedError | None:
    """Return the error of a driver that another one has replaced; None where it has not been, or the store is away."""
    assert job.fence is not None
    try:
        job.fence.check()
    except FencedError as error:
        return error
    except StorageError as error:
        logger.warning("whether another driver has taken over cannot be known: %s", error)
    return None


def _sweep(job: Job, *, ended: bool = False) -> None:
    """Delete what is left of earlier uploads; where that fails, the next driver of the run does it.

    Args:
        ended: whether all workers of this driver have ended.
    """
    try:
        checkpoints.sweep(job.storage, job.run_uri, job.epoch if ended else None)
    except StorageError as error:
        logger.warning("leftovers of earlier uploads stay for now: %s", error)


def _is_newer(now: CheckpointState, before: CheckpointState | None) -> bool:
    return before is None or now.images_seen > before.images_seen


def _result(tracker: Tracker, status: str, images_seen: int, goodput: Goodput | None) -> TrainingResult:
    published: list[Published] = []
    with tracking.recording("does not say which checkpoints are published"):
        published = checkpoints.list_published(tracker)
    return TrainingResult(tracker, status, images_seen, published[-1] if published else None, goodput)


def _root_cause(error: BaseException) -> str:
    """Return the innermost message, without the stack of actors around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = next(iter(failures.items()))
        inner = getattr(cause, "_base_exc", cause)
        return f"worker {rank}: {type(inner).__name__}: {inner}"
    return f"{type(error).__name__}: {error}"
