"""How long-running work reports to the person who waits for it: callbacks, the `Display` protocol, no drawing.

Functions that take long accept one of these callbacks and know nothing of terminals; `pipelines.cli.terminal` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Progress = Callable[[int, int], None]
"""Called with (done, total) in the unit of the work, such as images or MiB."""

Notice = Callable[[str], None]
"""Called with one line of text."""

StageNotice = Callable[[str, str], None]
"""Called with (name, text): the stage or service that reports, and one line of text."""

NOT_WORKING = "not working: "
"""How a line begins that says what does not work in a training; it is shown even where little else is."""


@dataclass(frozen=True)
class TrainingStatus:
    """How far a training is; None for what is not known yet.

    Attributes:
        images_seen: by the run, over all its drivers.
        loss: of the last step.
        goodput: share of the drivers' time spent on steps that were kept, 0..1.
        distance: Frechet distance of the newest checkpoint that has been scored.
        scored_at: images seen by that checkpoint.
        samples: drawn for the newest sample grid, uint8 [N, H, W, C]; None where these have been given before.
        length: images after which the run ends, as far as is known now.
    """

    images_seen: int
    loss: float | None = None
    goodput: float | None = None
    distance: float | None = None
    scored_at: int | None = None
    samples: NDArray[np.uint8] | None = None
    length: int | None = None


Report = Callable[[TrainingStatus], None]
"""Called with how far a training is."""


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""


def no_notice(text: str) -> None:
    """Ignore a line of text."""


def no_stage_notice(name: str, text: str) -> None:
    """Ignore a line of a stage."""


def no_report(status: TrainingStatus) -> None:
    """Ignore how far a training is."""


@dataclass(frozen=True)
class TimeBreakdown:
    """How a span of wall-clock time divides, ready to be shown.

    Attributes:
        name: the stage that its lines belong to.
        title: heading of the table.
        seconds: time by what it was spent on; adds up to `total_s`.
        total_s: the whole span, in seconds.
        lines: the same in words, for output that has no tables; the last line is shown below a table as well.
    """

    name: str
    title: str
    seconds: Mapping[str, float]
    total_s: float
    lines: Sequence[str]


class Display(Protocol):
    """Shows stages and progress to a person."""

    def stage(self, name: str, text: str) -> None:
        """Show one line of a stage: that it begins, ends or is skipped, or what it found."""

    def counter(self, description: str, unit: str) -> Progress:
        """Return a callback that shows progress over a known number of things, counted in `unit`."""

    def training(self, images: int, resumes_at: int) -> Report:
        """Return a callback that shows the progress of a training.

        Args:
            images: length of the training.
            resumes_at: images that were seen before it starts.
        """

    def breakdown(self, breakdown: TimeBreakdown) -> None:
        """Show where the time of a stage went."""


class Silent:
    """A `Display` that shows nothing."""

    def stage(self, name: str, text: str) -> None:
        """Show nothing."""

    def counter(self, description: str, unit: str) -> Progress:
        """Return a callback that shows nothing."""
        return no_progress

    def training(self, images: int, resumes_at: int) -> Report:
        """Return a callback that shows nothing."""
        return no_report

    def breakdown(self, breakdown: TimeBreakdown) -> None:
        """Show nothing."""
