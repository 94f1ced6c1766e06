"""The driver's watch over its workers: their progress and messages, Ctrl-C, and what ends them."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.train import ControllerError

from pipelines.checkpoints import newest_checkpoint
from pipelines.config import Config
from pipelines.presentation.progress import Notice, Report, TrainingStatus
from pipelines.remote.tasks import alive_nodes
from pipelines.storage import FencedError, StorageError
from pipelines.storage.retry import PATIENCE_S
from pipelines.training.errors import TrainingError
from pipelines.training.ledger import Ledger
from pipelines.training.loop.context import Job
from pipelines.training.prepare import PreparedRun
from pipelines.training.ray_train.answers import answer
from pipelines.training.ray_train.worker_logs import LogDeduplicator
from pipelines.training.resources import shortage
from pipelines.training.states import AnotherDriver, Event, NodesCounted, WorkersEnded, WorkersUnreachable

logger = logging.getLogger(__name__)
WATCH_EVERY_S = 0.5
SHORTAGE_EVERY_S = 5.0
TAKEOVER_EVERY_S = 10.0


class Fit(threading.Thread):
    """A call that trains a job to its end, in a thread of its own, because the main thread handles Ctrl-C.

    Attributes:
        error: what ended the training, None where it ended well or goes on.
    """

    def __init__(self, fit: Callable[[], object]) -> None:
        super().__init__(name="ray-train", daemon=True)
        self.fit = fit
        self.error: BaseException | None = None

    def run(self) -> None:
        """Train."""
        try:
            self.fit()
        except BaseException as error:  # noqa: BLE001 - the driver decides what follows
            self.error = error


class Watch:
    """Observes the workers of a training and returns events; updates the ledger and shows progress meanwhile.

    Args:
        run: that is trained.
        monitor: handle of the run's monitor actor.
        report: called with the newest progress.
        notice: called with messages of the workers.
    """

    def __init__(self, run: PreparedRun, monitor: Any, ledger: Ledger, report: Report, notice: Notice) -> None:
        self.run, self.job, self.monitor, self.ledger, self.report = run, run.job, monitor, ledger, report
        self.messages = LogDeduplicator(notice, self.job.config.name)
        self.patience_s = self.job.config.cluster.patience_s
        self.asked_nodes_at = self.asked_fence_at = time.monotonic()

    def next_event(self, fit: Fit) -> Event:
        """Wait for the next event of a training, and return it."""
        while True:
            fit.join(WATCH_EVERY_S)
            ended = not fit.is_alive()
            try:
                self._read_progress()
                final = self._ask(self.monitor.final_error, "the errors of the workers") if ended else None
                shortage = None if ended else self._shortage()
            except (TrainingError, RayError) as error:
                return self._end(fit, None) if fit.error else WorkersUnreachable(_unreachable(error, ended))
            if ended:
                return self._end(fit, final)
            if shortage is not None:
                return shortage
            if taken_over := self._taken_over():
                return taken_over

    def close(self) -> None:
        """Show the last counts of repeated messages."""
        self.messages.close()

    def _ask(self, method: Any, what: str) -> Any:
        return answer(method.remote(), what, self.patience_s)

    def _read_progress(self) -> None:
        update = self._ask(self.monitor.take, "the progress of the workers")
        self.ledger.update(update.attempts)
        self.messages.add(update.lines)
        if update.attempts:
            goodput, newest = self.ledger.goodput(), update.attempts[-1]
            fraction = goodput.fraction if goodput else None
            self.report(
                TrainingStatus(newest.images_seen, update.loss, fraction, samples=update.samples, length=newest.length)
            )

    def _end(self, fit: Fit, final: str | None) -> WorkersEnded:
        """Return how the workers ended.

        Args:
            final: an error that a restart cannot mend; None where there is none.
        """
        config = self.job.config
        error = fit.error if final is None else TrainingError(f"training '{config.name}' failed: {final}")
        lost = isinstance(error, ControllerError) and isinstance(error.controller_failure, RayActorError)
        seen, length = self.run.progress(self.ledger.goodput())
        return WorkersEnded(error, lost, checkpoint_images(config), seen >= length)

    def _shortage(self) -> NodesCounted | None:
        """Return whether the nodes are too few for the workers; None where it was asked a moment ago."""
        now_s = time.monotonic()
        if now_s - self.asked_nodes_at < SHORTAGE_EVERY_S:
            return None
        self.asked_nodes_at = now_s
        return NodesCounted(now_s, shortage(self.job.config.cluster, alive_nodes()))

    def _taken_over(self) -> AnotherDriver | None:
        """Return whether another driver has the run; None where it was asked a moment ago, or the store is away."""
        if time.monotonic() - self.asked_fence_at < TAKEOVER_EVERY_S:
            return None
        self.asked_fence_at = time.monotonic()
        return taken_over(self.job, patience_s=0)


def _unreachable(error: Exception, ended: bool) -> TrainingError:
    """Return the error of a driver that cannot learn how its workers do."""
    if ended:
        return TrainingError(f"how the workers ended is not known, the same command finds out: {error}")
    if isinstance(error, TrainingError):
        return error
    return TrainingError(f"the Ray cluster is lost, the same command resumes on another: {error}")


def checkpoint_images(config: Config) -> int | None:
    """Return how many images the newest checkpoint of a run has seen; None where there is none."""
    state = newest_checkpoint(config)
    return None if state is None else state.images_seen


def taken_over(job: Job, patience_s: float = PATIENCE_S) -> AnotherDriver | None:
    """Return the event that another driver has taken over a run; None where none has, or the store is away.

    Args:
        patience_s: how long to wait for a store that is away; whoever writes to it will learn it, too.
    """
    assert job.fence is not None
    try:
        job.fence.check(patience_s=patience_s)
    except FencedError as error:
        return AnotherDriver(error)
    except StorageError as error:
        if patience_s:
            logger.warning("whether another driver has taken over cannot be known: %s", error)
    return None


@contextmanager
def stop_on_interrupt(monitor: Any, notice: Notice) -> Iterator[None]:
    """Handle Ctrl-C: the first stops at a step boundary with a checkpoint, the second raises KeyboardInterrupt."""
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
