"""The length of a run that is given seconds: corrected by the run's own speed while it trains."""

from __future__ import annotations

from collections import deque

from pipelines.training.loop.progress import Clock
from pipelines.training.loop.state import TrainingState

LOOKS = 8
"""Into how many parts the seconds are divided; after each but the last, the length is corrected."""
FIRST = 1 / 16
"""Share of the seconds before the speed is measured: first steps compile, fill caches, and draw a sample grid."""
SPAN = 2
"""Over how many of the parts before a correction the speed is measured: a shared machine does not keep it."""


class Length:
    """Says after how many images a run ends that is to train for some seconds.

    The machine's speed is known only while it trains: a length that was fixed before is too short or too long wherever
    the machine is faster or slower than when it was measured. A rate that decays to the end does so to the new one.

    Args:
        seconds: of training, over all attempts of the run: steps, batches, checkpoints and grids, and no start-up.
            None where the length is what is configured.
        batch_size: of which the length is a multiple.
        clock: of this attempt.
        state: as restored.
    """

    def __init__(self, seconds: float | None, batch_size: int, clock: Clock, state: TrainingState) -> None:
        self.seconds, self.batch_size, self.clock = seconds, batch_size, clock
        self.before_s = state.trained_s
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
