"""How long-running work reports to the person who waits for it: callbacks, the `Display` protocol, no drawing.

Functions that take long accept one of these callbacks and know nothing of terminals; `pipelines.cli.terminal` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Progress = Callable[[int, int], None]
"""Called with (done, total) in the unit of the work, such as images or MiB."""

Notice = Callable[[str], None]
"""Called with one line of text."""

StageNotice = Callable[[str, str], None]
"""Called with (name, text): the stage or service that reports, and one line of text."""

Report = Callable[[dict[str, float]], None]
"""Called with the latest values of a training by name: `images_seen`, and `loss` once there is one."""


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""


def no_notice(text: str) -> None:
    """Ignore a line of text."""


def no_stage_notice(name: str, text: str) -> None:
    """Ignore a line of a stage."""


def no_report(values: dict[str, float]) -> None:
    """Ignore the values of a training."""


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
