"""The states of a training as its driver sees it, what may happen in them, and what follows: values and one function.

                WorkersStarted              WorkersEnded without an error
    Starting ------------------> Running ---------------------------------> Finished, or Stopped on request
       ^                            |
       |  WorkersEnded, and there   |  WorkersEnded by a final error or too often, WorkersUnreachable,
       |  is a newer checkpoint or  |  NodesCounted, too few for too long ---------> Failed
       |  a failure is left         |
       +----------------------------+  AnotherDriver, in any state ----------------> Replaced

Nothing here asks Ray, the store or the clock: `driver.train` observes events, and does what a state calls for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.storage import FencedError
from pipelines.training.errors import TrainingError

# --- states -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Starting:
    """Workers are to be started.

    Attributes:
        failures: of a kind that Ray Train does not count, in a row without a new checkpoint.
        reason: the error after which they start again; None at the first start.
        images_seen: by the checkpoint from which they go on, as far as is known.
    """

    failures: int = 0
    reason: BaseException | None = None
    images_seen: int = 0


@dataclass(frozen=True)
class Running:
    """Workers train, or Ray Train is starting them again.

    Attributes:
        failures: as of `Starting`.
        images_seen: by the newest checkpoint when they were started; None where there was none.
        short_since_s: since when the nodes cannot hold the workers, on the driver's clock; None where they can.
    """

    failures: int
    images_seen: int | None
    short_since_s: float | None = None


@dataclass(frozen=True)
class Finished:
    """The run has seen all its images."""

    mlflow_status = "FINISHED"


@dataclass(frozen=True)
class Stopped:
    """The run was stopped on request, with a checkpoint."""

    mlflow_status = "KILLED"


@dataclass(frozen=True)
class Failed:
    """The run needs a person, or another cluster.

    Attributes:
        error: what ended it.
    """

    error: BaseException
    mlflow_status = "FAILED"


@dataclass(frozen=True)
class Replaced:
    """Another driver has taken over the run: this one must not write any more.

    Attributes:
        error: says which.
    """

    error: FencedError


Over = Finished | Stopped | Failed | Replaced
"""The states in which nothing is done any more; all that may follow is that another driver is found to have the run."""
State = Starting | Running | Over

# --- events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkersStarted:
    """Ray Train has been asked for workers.

    Attributes:
        images_seen: by the newest checkpoint; None where there is none.
    """

    images_seen: int | None


@dataclass(frozen=True)
class WorkersEnded:
    """The workers have ended, and Ray Train does not start them again.

    Attributes:
        error: what ended them; None where they came to the end of the run or were asked to stop.
        lost_at_start: whether it is the loss of a worker that was just being started, which Ray Train takes for final.
        images_seen: by the newest checkpoint; None where there is none.
        complete: whether the run has seen all its images.
    """

    error: BaseException | None
    lost_at_start: bool
    images_seen: int | None
    complete: bool


@dataclass(frozen=True)
class NodesCounted:
    """The cluster was asked whether it can hold the workers.

    Attributes:
        now_s: on the driver's clock.
        shortage: what is missing, in words; None where nothing is.
    """

    now_s: float
    shortage: str | None


@dataclass(frozen=True)
class WorkersUnreachable:
    """The driver cannot learn any more how the workers do."""

    error: TrainingError


@dataclass(frozen=True)
class AnotherDriver:
    """The run's fence has been taken by another driver."""

    error: FencedError


Event = WorkersStarted | WorkersEnded | NodesCounted | WorkersUnreachable | AnotherDriver

# --- transitions --------------------------------------------------------------------------------------------


def after(state: State, event: Event, *, max_failures: int, patience_s: float) -> State:
    """Return the state that follows where an event happens in a state.

    Args:
        max_failures: how often in a row workers may be lost at their start without a new checkpoint.
        patience_s: how long the cluster may be too small for the workers, in seconds.
    """
    match state, event:
        case (Replaced(), _):
            return state
        case (_, AnotherDriver(error)):
            return Replaced(error)
        case (Starting() | Running(), WorkersUnreachable(error)):
            return Failed(error)
        case (Starting(failures), WorkersStarted(images_seen)):
            return Running(failures, images_seen)
        case (Running(), NodesCounted(now_s, shortage)):
            return _while_short(state, now_s, shortage, patience_s)
        case (Running(), WorkersEnded(None)):
            return Finished() if event.complete else Stopped()
        case (Running(), WorkersEnded()):
            return _after_failure(state, event, max_failures)
    return state


def _while_short(state: Running, now_s: float, shortage: str | None, patience_s: float) -> State:
    """Return the state after nodes were counted: Ray Train alone would wait for missing ones for ever."""
    if shortage is None:
        return replace(state, short_since_s=None)
    since_s = now_s if state.short_since_s is None else state.short_since_s
    return Failed(TrainingError(shortage)) if now_s - since_s > patience_s else replace(state, short_since_s=since_s)


def _after_failure(state: Running, event: WorkersEnded, max_failures: int) -> State:
    """Start again where the run has got further, or only a worker was lost that was being started.

    Ray Train counts failures over its whole life: a run of a month may fail more often, as long as it makes progress.
    """
    assert event.error is not None
    if isinstance(event.error, TrainingError):
        return Failed(event.error)
    seen = event.images_seen or 0
    if event.images_seen is not None and (state.images_seen is None or seen > state.images_seen):
        return Starting(0, event.error, seen)
    if event.lost_at_start and state.failures < max_failures:
        return Starting(state.failures + 1, event.error, seen)
    return Failed(event.error)
