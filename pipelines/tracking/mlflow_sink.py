"""MLflow as a sink: curves, pictures and texts go to the run of the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from pipelines.tracking.run import Tracker
from pipelines.tracking.sink import Destination


@dataclass(frozen=True)
class MlflowSink:
    """Records in an MLflow run, in single tries: the outbox before it waits."""

    tracker: Tracker

    @classmethod
    def of(cls, run: Destination) -> MlflowSink:
        """Return the sink of a run."""
        return cls(run.tracker)

    @property
    def uri(self) -> str:
        """Where it records, for messages."""
        return f"MLflow at {self.tracker.uri}"

    def last_steps(self) -> dict[str, int]:
        """Return the last recorded step of every curve by its name, and of every picture by images/KEY."""
        return self.tracker.last_steps(patience_s=0)

    def metrics(self, values: Mapping[str, float], step: int, at_ms: int) -> None:
        """Record points of curves."""
        self.tracker.metrics(values, step, at_ms, patience_s=0)

    def image(self, key: str, pixels: NDArray[Any], step: int) -> None:
        """Record a picture, uint8 [H, W, C]."""
        self.tracker.image(key, pixels, step, patience_s=0)

    def text(self, text: str, name: str) -> None:
        """Record a text file as an artifact."""
        self.tracker.text(text, name, patience_s=0)
