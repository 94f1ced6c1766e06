"""What a rank tells about itself while it trains: how far it is, and where its seconds went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["startup", "step", "data", "checkpoint", "grid"]


@dataclass(frozen=True)
class Progress:
    """How far rank 0 is; everything but `images_seen` and `loss` is of this attempt, from its start on.

    Attributes:
        images_seen: by the run, over all attempts.
        resumed_at: images seen where this attempt began.
        loss: of the last step, mean over the global batch.
        seconds: wall time by kind, which add up to the attempt's: "startup" until the first batch is asked for,
            "step", "data" (waiting for batches), "checkpoint" (the loop is held by one: its snapshot, the upload before
            it), "grid" (drawing samples).
        uploaded_bytes: of checkpoints, published copies included.
        upload_s: seconds of background uploads, during which training went on.
    """

    images_seen: int
    resumed_at: int
    loss: float
    seconds: Mapping[str, float]
    uploaded_bytes: int = 0
    upload_s: float = 0.0


class Clock:
    """Wall time of a loop by kind: what is not said to be something else is a step.

    Args:
        started: `time.monotonic()` when the attempt began; all until the first `during` or `lap` is "startup".
    """

    def __init__(self, started: float) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(get_args(Kind), 0.0)
        self._kind: Kind = "startup"
        self._since = started

    def switch(self, kind: Kind) -> Kind:
        """From here on time is of this kind; the kind before."""
        now = time.monotonic()
        self._seconds[self._kind] += now - self._since
        self._since, before, self._kind = now, self._kind, kind
        return before

    @contextmanager
    def during(self, kind: Kind) -> Iterator[None]:
        """Time inside is of this kind, afterwards of the one before."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> dict[str, float]:
        """Seconds by kind until now."""
        self.switch(self._kind)
        return dict(self._seconds)
