"""The progress of a rank while it trains: its steps, its wall time by kind, and the length of the run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["startup", "step", "data", "checkpoint", "grid"]
LOOKS = 8
"""Into how many parts the seconds are divided; after each but the last, the length is corrected."""
FIRST = 1 / 16
"""Share of the seconds before the speed is measured: first steps compile, fill caches, and draw a sample grid."""
SPAN = 2
"""Over how many of the parts before a correction the speed is measured: a shared machine does not keep it."""


def passes(before: int, seen: int, every: int | None) -> bool:
    """Return whether a multiple of `every` images lies in (before, seen]; False for None."""
    return every is not None and seen // every > before // every


@dataclass(frozen=True)
class StepResult:
    """The result of one step; the same on every rank.

    Attributes:
        loss: mean over the global batch, before a learned weight.
        grad_norm: norm of the whole gradient before clipping.
        updated: False where loss or gradient norm is not finite, and the weights stayed as they were.
        stop: whether any rank asks to stop.
        checkpoint: whether any rank asks for a checkpoint.
        unreadable: whether any rank could not read its batch; the state is unchanged then, `images_seen` included.
        rescaled: whether the gradient overflowed fp16 and the loss scale was lowered for it.
        by_source: of a mixture, the sum of the losses of each source in the global batch, then the number of samples
            of each.
    """

    loss: float
    grad_norm: float
    updated: bool
    stop: bool
    checkpoint: bool
    unreadable: bool = False
    rescaled: bool = False
    by_source: tuple[float, ...] = ()


@dataclass(frozen=True)
class Progress:
    """The progress of rank 0; everything but `images_seen` and `loss` counts from the start of this attempt.

    Attributes:
        images_seen: by the run, over all attempts.
        resumed_at: images seen where this attempt began.
        loss: of the last step, mean over the global batch.
        seconds: wall time by kind, which add up to the attempt's: "startup" until the first batch is asked for,
            "step", "data" (waiting for batches), "checkpoint" (the loop waits for one: its copy, or the upload before
            it), "grid" (drawing samples, evaluation).
        uploaded_bytes: of checkpoints, published copies included.
        upload_s: seconds of background uploads, during which training went on.
        length: images after which the run ends, as far as is known.
        slow_downs: answers of S3 to rank 0 that it reads too fast.
        throttled_s: seconds in which its reads were limited for that, see `RequestRate`.
        throttled_wait_s: of them, seconds in which the loop waited for batches.
    """

    images_seen: int
    resumed_at: int
    loss: float
    seconds: Mapping[str, float]
    uploaded_bytes: int = 0
    upload_s: float = 0.0
    length: int | None = None
    slow_downs: int = 0
    throttled_s: float = 0.0
    throttled_wait_s: float = 0.0


class Clock:
    """Measures the wall time of a loop by kind.

    Args:
        started: `time.monotonic()` when the attempt began; all time until the first `switch` or `during` is "startup".
    """

    def __init__(self, started: float) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(get_args(Kind), 0.0)
        self._kind: Kind = "startup"
        self._since = self._changed = started

    def switch(self, kind: Kind) -> Kind:
        """Count the time from now on as this kind, and return the kind before."""
        before = self._count()
        self._kind, self._changed = kind, self._since
        return before

    @contextmanager
    def during(self, kind: Kind) -> Iterator[None]:
        """Count the time inside as this kind, and afterwards as the kind before."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def phase(self) -> tuple[Kind, float]:
        """Return the present kind and the seconds since the last change; any thread may ask."""
        return self._kind, time.monotonic() - self._changed

    def seconds(self) -> dict[str, float]:
        """Return the seconds by kind until now."""
        self._count()
        return dict(self._seconds)

    def _count(self) -> Kind:
        """Add the time since the last count to the present kind, and return that."""
        now = time.monotonic()
        self._seconds[self._kind] += now - self._since
        self._since = now
        return self._kind


class Length:
    """The length in images of a run that is given seconds of training, corrected by its measured speed.

    The machine's speed is known only while it trains: a length that was fixed before is too short or too long wherever
    the machine is faster or slower than when it was measured. A rate that decays to the end does so to the new one.

    Args:
        seconds: of training, over all attempts of the run: steps, batches, checkpoints and grids, and no start-up.
            None where the length is what is configured.
        batch_size: of which the length is a multiple.
        clock: of this attempt.
        before_s: seconds that the run had trained when this attempt began.
    """

    def __init__(self, seconds: float | None, batch_size: int, clock: Clock, before_s: float) -> None:
        self.seconds, self.batch_size, self.clock = seconds, batch_size, clock
        self.before_s = before_s
        self._looks: deque[tuple[int, float]] = deque(maxlen=SPAN)  # images seen, and after how many seconds
        self._due_s = 0.0

    def trained_s(self) -> float:
        """Return the seconds that the run has trained."""
        spent = self.clock.seconds()
        return self.before_s + sum(spent.values()) - spent["startup"]

    def corrected(self, images_seen: int) -> int | None:
        """Return the length where a correction of it is due, else None; asked before every step on rank 0."""
        if self.seconds is None:
            return None
        now_s, part = self.trained_s(), self.seconds / LOOKS
        if now_s < max(self._due_s, self.before_s + FIRST * self.seconds) or now_s >= self.seconds - part / 2:
            return None
        before = self._looks[0] if self._looks else None
        self._looks.append((images_seen, now_s))
        self._due_s = (now_s // part + 1) * part
        if before is None:
            return None
        images, since_s = before
        left = (self.seconds - now_s) * (images_seen - images) / (now_s - since_s)
        return max(images_seen + self.batch_size, int(images_seen + left) // self.batch_size * self.batch_size)
