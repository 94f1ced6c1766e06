"""How far a rank is while it trains, and how its wall time is spent."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["startup", "step", "data", "checkpoint", "grid"]


def passes(before: int, seen: int, every: int | None) -> bool:
    """Return whether a multiple of `every` images lies in (before, seen]; False for None."""
    return every is not None and seen // every > before // every


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
    """

    images_seen: int
    resumed_at: int
    loss: float
    seconds: Mapping[str, float]
    uploaded_bytes: int = 0
    upload_s: float = 0.0
    length: int | None = None


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
