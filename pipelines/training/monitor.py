"""The mailbox between a run's workers and its driver: a process of its own, so its module imports next to nothing."""

from __future__ import annotations

import time

from pipelines.training.goodput import Attempt
from pipelines.training.progress import Progress


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
