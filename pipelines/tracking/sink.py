"""The protocol of a metrics sink, which MLflow and all other sinks implement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from pipelines.storage import Fence, Storage
from pipelines.tracking.run import Tracker


class Sink(Protocol):
    """A place where a run's metrics, pictures and texts are recorded.

    An `Outbox` calls it from one thread, in order of steps, and waits while it is unavailable: every method makes a
    single try. It raises `pipelines.storage.retry.TransientError` if another try may help, and another
    `PipelineError` if a record is refused for good and is then dropped. When a method has returned, its record is
    durable. A sink may ignore pictures or texts.
    """

    @property
    def uri(self) -> str:
        """Description of the destination, for messages."""

    def last_steps(self) -> dict[str, int]:
        """Return the last recorded step of every curve by its name."""

    def last_pictures(self) -> dict[str, int]:
        """Return the last recorded step of every picture by images/KEY."""

    def metrics(self, values: Mapping[str, float], step: int, at_ms: int) -> None:
        """Record points of curves at `step` images seen, made `at_ms` milliseconds after the epoch."""

    def image(self, key: str, pixels: NDArray[Any], step: int) -> None:
        """Record a picture, uint8 [H, W, C]."""

    def text(self, text: str, name: str) -> None:
        """Record a text file; written again under the same name it replaces itself."""

    def holds(self, mark: str, name: str) -> bool:
        """Return whether a text file of that name is recorded and contains a mark."""


@dataclass(frozen=True)
class Destination:
    """The destination of a run's records, from which sinks are made.

    Attributes:
        tracker: the MLflow run.
        folder: address of the folder of the run.
        fence: fence of the driver of this process; None if there is only one driver.
    """

    tracker: Tracker
    storage: Storage
    folder: str
    fence: Fence | None = None
