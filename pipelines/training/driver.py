"""The driver of a training run: starts Ray Train, shows progress, starts again after failures, stops on Ctrl-C.

`states` decides what follows what. Beside the driver a thread has published checkpoints scored, see `evaluations`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

from pipelines import checkpoints, tracking
from pipelines.checkpoints import Published
from pipelines.presentation.progress import NOT_WORKING, Notice, Report, TrainingStatus, no_notice, no_report
from pipelines.remote.tasks import alive_nodes
from pipelines.storage import StorageError
from pipelines.tracking import Tracker
from pipelines.training.describe import describe_run, report_goodput
from pipelines.training.errors import TrainingError
from pipelines.training.evaluations import Evaluations
from pipelines.training.goodput import Goodput
from pipelines.training.ledger import Ledger, goodput_of, read_sessions
from pipelines.training.loop.context import Job
from pipelines.training.loop.health import expected_faults
from pipelines.training.loop.log import send_unsent
from pipelines.training.prepare import PreparedRun
from pipelines.training.ray_train.callbacks import cause_of
from pipelines.training.ray_train.monitor import only_driver
from pipelines.training.ray_train.trainer import WorkerProvider, dedicated_workers
from pipelines.training.ray_train.watch import Fit, Watch, checkpoint_images, stop_on_interrupt, taken_over
from pipelines.training.resources import connect_ray, has_room_beside, is_free
from pipelines.training.scoring import Evaluate, needs, score_on_ray
from pipelines.training.states import (
    Event,
    Failed,
    Finished,
    Replaced,
    Running,
    Starting,
    State,
    Stopped,
    WorkersStarted,
    after,
)

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


def train(
    run: PreparedRun,
    report: Report = no_report,
    notice: Notice = no_notice,
    workers: WorkerProvider = dedicated_workers,
    evaluate: Evaluate | None = None,
) -> TrainingResult:
    """Train a prepared run to its end.

    Args:
        report: called with how far the training is while it goes on.
        notice: called with lines for the user, such as what Ctrl-C does.
        workers: provides the workers; see `ReusableWorkers` for some that train other runs as well.
        evaluate: scores published checkpoints, where `evaluation.every` asks for that; by default a task on Ray.

    Raises:
        TrainingError: another driver has the run, or the workers failed more often than `cluster.max_failures`
            without a new checkpoint.
    """
    if run.complete:
        return _complete(run, notice, evaluate)
    config, notice = run.job.config, on_the_page(run.job.tracker, notice)
    for fault in expected_faults(config):
        notice(f"{NOT_WORKING}{fault}")

    # Take the run over from earlier drivers.
    with only_driver(config) as monitor:
        job = replace(run.job, fence=checkpoints.take_over(run.job.storage, run.job.run_uri))
        run = replace(run, job=job)
        ledger = Ledger(job.storage, job.run_uri, job.epoch)

        # Start the workers, and do what the states of the training call for until it is over.
        with _evaluations(job, run.length, evaluate, notice) as evaluations:
            watch = Watch(run, monitor, ledger, _with_scores(report, evaluations), notice)
            with (
                ledger.session(run.began),
                closing(watch),
                stop_on_interrupt(monitor, notice),
                _killed_by_interrupt(job),
            ):
                _sweep(job)
                describe_run(job)
                state: State = Starting()
                while isinstance(state, Starting | Running):
                    if isinstance(state, Starting):
                        if state.reason is not None:
                            seen, cause = state.images_seen, root_cause(state.reason)
                            notice(f"starting again at {seen:,} images after: {cause}")
                            monitor.lost.remote(cause_of(state.reason))
                        event: Event = WorkersStarted(checkpoint_images(config))
                        fit = Fit(workers(job, monitor))
                        fit.start()
                    else:
                        event = watch.next_event(fit)
                    state = _after(state, event, job)
            return _conclude(run, state, ledger, evaluations)


def _after(state: State, event: Event, job: Job) -> State:
    """Return the next state; where no workers train any more, check that this driver still has the run."""
    cluster = job.config.cluster
    state = after(state, event, max_failures=cluster.max_failures, patience_s=cluster.patience_s)
    if not isinstance(state, Running | Replaced) and (replaced := taken_over(job)):
        state = after(state, replaced, max_failures=cluster.max_failures, patience_s=cluster.patience_s)
    return state


def _conclude(run: PreparedRun, state: State, ledger: Ledger, evaluations: Evaluations) -> TrainingResult:
    """Record how a training ended, wait for the evaluations of a finished run, and return its result.

    Raises:
        TrainingError: it failed, or another driver has the run.
    """
    assert not isinstance(state, Starting | Running)
    if isinstance(state, Replaced):
        raise TrainingError(str(state.error)) from state.error  # the MLflow run is another driver's now
    if isinstance(state, Finished | Stopped):
        _sweep(run.job, ended=True)
    goodput, tracker = ledger.goodput(), run.job.tracker
    seen, _ = run.progress(goodput)
    with tracking.warn_on_error(f"the status {state.mlflow_status} of the run"):
        if goodput:
            report_goodput(tracker, goodput, seen)
        tracker.status(state.mlflow_status)
        if isinstance(state, Finished):
            evaluations.finish()
    if isinstance(state, Failed):
        if isinstance(state.error, TrainingError):
            raise state.error
        raise TrainingError(f"training '{run.job.config.name}' failed: {root_cause(state.error)}") from state.error
    return _result(tracker, "finished" if isinstance(state, Finished) else "stopped", seen, goodput)


@contextmanager
def _killed_by_interrupt(job: Job) -> Iterator[None]:
    """Set the status of a run whose training is aborted by a second Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        if not taken_over(job):
            job.tracker.status("KILLED")
        raise


def on_the_page(tracker: Tracker, notice: Notice) -> Notice:
    """Return a notice that also writes warnings about the training onto the page of its run."""
    faults: list[str] = []

    def tell(text: str) -> None:
        notice(text)
        _, prefix, fault = text.partition(NOT_WORKING)
        if prefix:
            faults.append(fault[:1].upper() + fault[1:] + ".")
            with tracking.warn_on_error("the warnings on the page of the run"):
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


def _complete(run: PreparedRun, notice: Notice, evaluate: Evaluate | None) -> TrainingResult:
    """Finish a run that has seen all its images: send metrics that wait, and score the checkpoints that are left."""
    job, tracker = run.job, run.job.tracker
    goodput = goodput_of(read_sessions(job.storage, job.run_uri))
    with tracking.warn_on_error("what waits to be recorded"):
        send_unsent(job)
        if not tracker.is_finished():
            if goodput:
                report_goodput(tracker, goodput, run.resumes_at)
            tracker.status("FINISHED")
        if _evaluations(job, run.length, evaluate, notice).outstanding():
            connect_ray(job.config)
            with only_driver(job.config):
                job = replace(job, fence=checkpoints.take_over(job.storage, job.run_uri))
                with _evaluations(job, run.length, evaluate, notice) as evaluations:
                    evaluations.finish()
    return _result(tracker, "complete", run.resumes_at, goodput)


def _evaluations(job: Job, length: int, evaluate: Evaluate | None, notice: Notice) -> Evaluations:
    """Return the evaluations of a run of this length, on resources that its training never needs."""
    config = job.config

    def has_room() -> bool:
        wanted = needs(config)
        return has_room_beside(config.cluster, alive_nodes(), wanted) and is_free(wanted)

    return Evaluations(job, length, evaluate or score_on_ray(config, job.tracker), has_room, notice)


def _sweep(job: Job, *, ended: bool = False) -> None:
    """Delete the remains of interrupted uploads; where that fails, the next driver of the run does it.

    Args:
        ended: whether all workers of this driver have ended.
    """
    try:
        checkpoints.sweep(job.storage, job.run_uri, job.epoch if ended else None)
    except StorageError as error:
        logger.warning("leftovers of earlier uploads stay for now: %s", error)


def _result(tracker: Tracker, status: str, images_seen: int, goodput: Goodput | None) -> TrainingResult:
    published: list[Published] = []
    with tracking.warn_on_error("the list of published checkpoints"):
        published = checkpoints.list_published(tracker)
    return TrainingResult(tracker, status, images_seen, published[-1] if published else None, goodput)


def root_cause(error: BaseException) -> str:
    """Return the innermost error as text, without the stack of actors around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = next(iter(failures.items()))
        inner = getattr(cause, "_base_exc", cause)
        return f"worker {rank}: {type(inner).__name__}: {inner}"
    return f"{type(error).__name__}: {error}"
