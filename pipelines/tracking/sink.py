"""What receives the curves of a run: the protocol that MLflow and every further sink implement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from pipelines.storage import Fence, Storage
from pipelines.tracking.run import Tracker


class Sink(Protocol):
    """One place where a run's curves, pictures and texts are recorded.

    An `Outbox` calls it from one thread, in order of steps, and waits where it is away: every method makes a single
    try. It raises `pipelines.storage.retry.TransientError` where another try may help, and another `PipelineError` for
    what is refused for good, which is then left out. When a method has returned, what it was given is durable. A sink
    that has no place for pictures or texts ignores them.
    """

    @property
    def uri(self) -> str:
        """Where it records, for messages."""

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
        """Return whether a text file of that name is recorded and has this in it."""


@dataclass(frozen=True)
class Destination:
    """What a sink is made from.

    Attributes:
        tracker: the MLflow run.
        folder: address of all that the run stores.
        fence: of the driver whose process records; None where there is only one.
    """

    tracker: Tracker
    storage: Storage
    folder: str
    fence: Fence | None = None
