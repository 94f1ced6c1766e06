"""The actors between driver and workers. Each is a process of its own, so this module imports next to nothing."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from typing import Any, NamedTuple

from pipelines.training.goodput import Attempt
from pipelines.training.loop.progress import Progress

HEARD_LINES = 1_000
"""Lines of workers that wait for the driver; of more the newest stay."""


class ProgressUpdate(NamedTuple):
    """Everything that the driver asks of its workers, in one answer: every answer takes time from a training step.

    Attributes:
        attempts: so far, the newest last.
        loss: the newest one.
        lines: that workers have said since the last answer, as (rank, text).
        samples: images that are newer than the last answer; None where there are none.
    """

    attempts: list[Attempt]
    loss: float | None
    lines: list[tuple[int, str]]
    samples: Any


class Monitor:
    """The mailbox between the ranks and the driver: progress and warnings in one direction, stop requests in the other.

    An actor that is named after the run, so that a run has one driver at a time in a cluster.
    """

    def __init__(self) -> None:
        self.attempts: dict[str, Attempt] = {}
        self.loss: float | None = None
        self.stop = False
        self.final: str | None = None
        self.lines: deque[tuple[int, str]] = deque(maxlen=HEARD_LINES)
        self.samples: Any = None

    def post(self, attempt: str, elapsed_s: float, progress: Progress) -> bool:
        """Record the newest progress of an attempt that began `elapsed_s` ago, and return whether to stop."""
        known = self.attempts.get(attempt)
        began = known.began if known else time.time() - elapsed_s
        self.attempts[attempt] = Attempt(
            began=began,
            ended=began + elapsed_s,
            resumed_at=progress.resumed_at,
            images_seen=progress.images_seen,
            seconds=dict(progress.seconds),
            uploaded_bytes=progress.uploaded_bytes,
            upload_s=progress.upload_s,
            length=progress.length,
            lost_to=known.lost_to if known else None,
            slow_downs=progress.slow_downs,
            throttled_s=progress.throttled_s,
            throttled_wait_s=progress.throttled_wait_s,
        )
        self.loss = progress.loss
        return self.stop

    def lost(self, cause: str) -> None:
        """Record what ended the workers of the newest attempt, one of `goodput.CAUSES`; what was said first stays."""
        if self.attempts:
            name, attempt = next(reversed(self.attempts.items()))
            self.attempts[name] = replace(attempt, lost_to=attempt.lost_to or cause)

    def set_final_error(self, message: str) -> None:
        """Record an error that a restart of the workers cannot mend; the first message stays."""
        self.final = self.final or message

    def final_error(self) -> str | None:
        """Return the message of that error, None where there was none."""
        return self.final

    def hear(self, lines: list[tuple[int, str]]) -> None:
        """Keep messages of workers, as (rank, text), until the driver takes them."""
        self.lines.extend(lines)

    def show(self, samples: Any) -> None:
        """Keep the newest samples, an array of images, until the driver takes them."""
        self.samples = samples

    def request_stop(self) -> None:
        """Ask rank 0 to stop at its next step."""
        self.stop = True

    def snapshot(self) -> tuple[list[Attempt], float | None]:
        """Return (the attempts so far, the newest last; the newest loss)."""
        return list(self.attempts.values()), self.loss

    def take(self) -> ProgressUpdate:
        """Return the state of the run, with the messages and samples since the last call."""
        lines, samples = list(self.lines), self.samples
        self.lines.clear()
        self.samples = None
        return ProgressUpdate(*self.snapshot(), lines, samples)


class JobQueue:
    """Hands the jobs of a driver to its reusable workers, one at a time and in order.

    An actor of the driver's, which ends with it.

    Args:
        idle_s: how long workers wait for another job before they end, and give back what others may need.

    Attributes:
        number: the number of the last job, counted from 1; 0 before the first.
        closed: whether workers that have no job end.
        job: the job that is being trained, None between jobs.
        idle_since: `time.monotonic()` when the last job ended.
        starts: how often the group of workers has started.
    """

    WAIT, END = 0, -1

    def __init__(self, idle_s: float) -> None:
        self.idle_s = idle_s
        self.number, self.closed = 0, False
        self.job: Any = None
        self.idle_since = time.monotonic()
        self.starts = 0

    def put(self, job: Any) -> int | None:
        """Hand over a job and return its number; None where the workers end, or have ended."""
        if self.closed:
            return None
        self.number, self.job = self.number + 1, job
        return self.number

    def take(self, last: int) -> tuple[int, Any]:
        """Return (number, job) for a worker that has trained jobs up to `last`, or (WAIT or END, None) without one."""
        if self.job is not None:
            return (self.number, self.job) if self.number > last else (self.WAIT, None)
        self.closed = self.closed or time.monotonic() - self.idle_since > self.idle_s
        return (self.END if self.closed else self.WAIT), None

    def group_started(self) -> None:
        """Count a start of the group; called by rank 0."""
        self.starts += 1

    def done(self, number: int) -> None:
        """Mark a job as finished, or stopped on request; called by rank 0."""
        if number == self.number:
            self.job, self.idle_since = None, time.monotonic()

    def close(self) -> None:
        """Accept no more jobs, and let the workers end."""
        self.closed = True

    def state(self) -> tuple[int, bool, int]:
        """Return (number of the last job, whether it is being trained, starts of the group)."""
        return self.number, self.job is not None, self.starts
