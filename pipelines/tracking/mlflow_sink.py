"""MLflow as a sink: metrics, pictures and texts go to the run of the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from pipelines.tracking.client import TrackingError, UnreachableError
from pipelines.tracking.run import Tracker
from pipelines.tracking.sink import Destination

LEFT_OUT = {400, 413, 422}
"""HTTP statuses that concern the point that was sent."""


@dataclass(frozen=True)
class MlflowSink:
    """Records in an MLflow run with a single try per call; the outbox in front of it waits and repeats.

    A point is dropped only if the server says that this very point is wrong or too large (`LEFT_OUT`). An expired
    token, a run in the trash or a server that does not know the run are no reasons to drop measurements.
    """

    tracker: Tracker

    @classmethod
    def of(cls, run: Destination) -> MlflowSink:
        """Return the sink of a run."""
        return cls(replace(run.tracker, patience_s=0))

    @property
    def uri(self) -> str:
        """Description of the destination, for messages."""
        return f"MLflow at {self.tracker.uri}"

    def last_steps(self) -> dict[str, int]:
        """Return the last recorded step of every curve by its name."""
        with self._waiting():
            return self.tracker.last_steps()

    def last_pictures(self) -> dict[str, int]:
        """Return the last recorded step of every picture by images/KEY."""
        with self._waiting():
            return self.tracker.last_pictures()

    def metrics(self, values: Mapping[str, float], step: int, at_ms: int) -> None:
        """Record points of curves."""
        with self._waiting():
            self.tracker.metrics(values, step, at_ms)

    def image(self, key: str, pixels: NDArray[Any], step: int) -> None:
        """Record a picture, uint8 [H, W, C]."""
        with self._waiting():
            self.tracker.image(key, pixels, step)

    def text(self, text: str, name: str) -> None:
        """Record a text file as an artifact."""
        with self._waiting():
            self.tracker.text(text, name)

    def holds(self, mark: str, name: str) -> bool:
        """Return whether an artifact of that name contains a mark."""
        with self._waiting():
            there = name in self.tracker.names(name.rpartition("/")[0] or None)
            return there and mark in self.tracker.read_text(name)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except UnreachableError:
            raise
        except TrackingError as error:
            if error.status not in LEFT_OUT:
                gone = error.status == 404
                hint = f"; the server does not know the run {self.tracker.run_id}: is it the right one?" if gone else ""
                raise UnreachableError(f"{error}{hint}", error.status) from error
            if error.status == 400 and self._in_trash():
                raise UnreachableError(
                    f"{error}; the run may be in MLflow's trash: `mlflow runs restore --run-id {self.tracker.run_id}` "
                    "brings it back, and then it gets what waits",
                    error.status,
                ) from error
            raise

    def _in_trash(self) -> bool:
        try:
            return self.tracker.is_deleted()
        except TrackingError:
            return True
