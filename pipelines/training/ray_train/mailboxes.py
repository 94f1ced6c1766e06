"""The mailboxes between workers and driver: processes of their own, so their module imports next to nothing."""

from __future__ import annotations

import time
from typing import Any

from pipelines.training.goodput import Attempt
from pipelines.training.loop.progress import Progress


class Monitor:
    """A mailbox between rank 0 and the driver: progress one way, the wish to stop the other way.

    An actor with the name of the run, so that a cluster has one driver of a run at a time.
    """

    def __init__(self) -> None:
        self.attempts: dict[str, Attempt] = {}
        self.loss: float | None = None
        self.stop = False
        self.final: str | None = None

    def post(self, attempt: str, elapsed_s: float, progress: Progress) -> bool:
        """Newest progress of an attempt that began `elapsed_s` ago; answers whether to stop."""
        now = time.time()
        began = self.attempts[attempt].began if attempt in self.attempts else now - elapsed_s
        self.attempts[attempt] = Attempt(
            began=began,
            ended=began + elapsed_s,
            resumed_at=progress.resumed_at,
            images_seen=progress.images_seen,
            seconds=dict(progress.seconds),
            uploaded_bytes=progress.uploaded_bytes,
            upload_s=progress.upload_s,
        )
        self.loss = progress.loss
        return self.stop

    def give_up(self, reason: str) -> None:
        """A rank tells why the training cannot go on, however often it is started again; the first reason stays."""
        self.final = self.final or reason

    def why_final(self) -> str | None:
        """What a rank told."""
        return self.final

    def request_stop(self) -> None:
        """Ask rank 0 to stop at its next step."""
        self.stop = True

    def snapshot(self) -> tuple[list[Attempt], float | None]:
        """(attempts so far, last one last; newest loss)."""
        return list(self.attempts.values()), self.loss


class Orders:
    """What workers that stay are to train next: one run at a time, in order.

    An actor of the driver's, which ends with it.

    Args:
        idle_s: how long workers wait for another run before they end, and give back what others may need.

    Attributes:
        starts: of the group of workers.
    """

    WAIT, END = 0, -1

    def __init__(self, idle_s: float) -> None:
        self.idle_s = idle_s
        self.number, self.closed = 0, False
        self.order: Any = None  # under way
        self.since = time.monotonic()
        self.starts = 0

    def put(self, order: Any) -> int | None:
        """Hand over a run; its number, from 1 on. None: the workers end, or have ended."""
        if self.closed:
            return None
        self.number, self.order = self.number + 1, order
        return self.number

    def take(self, last: int) -> tuple[int, Any]:
        """(number, order) of the run for a worker that has trained those up to `last`; (WAIT or END, None) without."""
        if self.order is not None:
            return (self.number, self.order) if self.number > last else (self.WAIT, None)
        self.closed = self.closed or time.monotonic() - self.since > self.idle_s
        return (self.END if self.closed else self.WAIT), None

    def begin(self) -> None:
        """Rank 0 tells that the group of workers has started."""
        self.starts += 1

    def done(self, number: int) -> None:
        """Rank 0 tells that a run has ended or stopped as it should."""
        if number == self.number:
            self.order, self.since = None, time.monotonic()

    def close(self) -> None:
        """There are no more runs."""
        self.closed = True

    def state(self) -> tuple[int, bool, int]:
        """(number of the last run, whether it is under way, starts of the group)."""
        return self.number, self.order is not None, self.starts
