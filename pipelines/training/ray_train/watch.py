"""The driver's watch over its workers: progress, Ctrl-C, and a cluster that no longer holds them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from ray.exceptions import RayError

from pipelines.config import ClusterConfig
from pipelines.presentation.progress import Notice, Report, TrainingStatus
from pipelines.storage import FencedError, StorageError
from pipelines.training.errors import TrainingError
from pipelines.training.ledger import Ledger
from pipelines.training.loop.context import Job
from pipelines.training.ray_train.answers import answer
from pipelines.training.ray_train.resources import alive_nodes, shortage
from pipelines.training.ray_train.worker_logs import Heard

WATCH_EVERY_S = 0.5
SHORTAGE_EVERY_S = 5.0
TAKEOVER_EVERY_S = 10.0


def fit_and_watch(
    job: Job, monitor: Any, fit: Callable[[], object], ledger: Ledger, report: Report, notice: Notice
) -> BaseException | None:
    """Call `fit` in a thread, and return the error that ended it, None where it finished or stopped on request.

    The calling thread keeps the ledger, reports progress and handles Ctrl-C.

    Args:
        monitor: handle of the run's monitor actor.
        fit: trains the job to its end.
    """
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            fit()
            ended.append(None)
        except BaseException as error:  # noqa: BLE001 - it is returned by the main thread
            ended.append(error)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    lasting_shortage, takeover = LastingShortage(job.config.cluster), Takeover(job)
    heard, patience_s = Heard(notice, job.config.name), job.config.cluster.patience_s
    with _stop_on_interrupt(monitor, notice), closing(heard):
        thread.start()
        while thread.is_alive():
            thread.join(WATCH_EVERY_S)
            try:
                news = answer(monitor.take.remote(), "the progress of the workers", patience_s)
                short = lasting_shortage.check()
            except TrainingError as error:
                return error
            except RayError as error:
                return TrainingError(f"the Ray cluster is lost, the same command resumes on another: {error}")
            ledger.update(news.attempts)
            heard.add(news.lines)
            if news.attempts:
                goodput = ledger.goodput()
                fraction = goodput.fraction if goodput else None
                newest = news.attempts[-1]
                report(
                    TrainingStatus(newest.images_seen, news.loss, fraction, samples=news.samples, length=newest.length)
                )
            if fenced := takeover.check():
                return fenced
            if short:
                return TrainingError(short)
        try:
            heard.add(answer(monitor.take.remote(), "the messages of the workers", patience_s).lines)
            final = answer(monitor.final_error.remote(), "the errors of the workers", patience_s)
        except (TrainingError, RayError) as error:
            return ended[0] or TrainingError(f"how the workers ended is not known, the same command finds out: {error}")
    return ended[0] if final is None else TrainingError(f"training '{job.config.name}' failed: {final}")


class LastingShortage:
    """Detects that the cluster has been too small for the workers for long: Ray Train would wait for ever."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self.checked_at = time.monotonic()
        self.short_since: float | None = None

    def check(self) -> str | None:
        """Return what is missing where that has lasted `cluster.patience_s`; asks Ray every few seconds only."""
        now = time.monotonic()
        if now - self.checked_at < SHORTAGE_EVERY_S:
            return None
        self.checked_at = now
        short = shortage(self.cluster, alive_nodes())
        self.short_since = None if short is None else self.short_since or now
        return short if self.short_since is not None and now - self.short_since > self.cluster.patience_s else None


class Takeover:
    """Notices that another driver has taken over the run: this one's workers would train in vain."""

    def __init__(self, job: Job) -> None:
        self.fence = job.fence
        self.checked_at = time.monotonic()

    def check(self) -> FencedError | None:
        """Return the error where that has happened; asks the store every few seconds only, and never waits for it."""
        if self.fence is None or time.monotonic() - self.checked_at < TAKEOVER_EVERY_S:
            return None
        self.checked_at = time.monotonic()
        try:
            self.fence.check(patience_s=0)
        except FencedError as error:
            return error
        except StorageError:
            return None  # the store is away: whoever writes to it will learn it
        return None


@contextmanager
def _stop_on_interrupt(monitor: Any, notice: Notice) -> Iterator[None]:
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
