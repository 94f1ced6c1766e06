"""Output of the command line on stderr: stages, and progress as bars on a terminal or as plain lines elsewhere.

During training a terminal shows loss, goodput, last distance and a few of the newest samples below the progress bar.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from pipelines.environment.credentials import redact
from pipelines.presentation.progress import NOT_WORKING, Progress, Report, StageNotice, TimeBreakdown, TrainingStatus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line breaks
PLAIN_EVERY_S = 5.0
"""Seconds between two plain lines of progress."""


TILE = 16
"""Largest number of pixels of a sample's longer side on a terminal."""
SAMPLE_ROWS = 2


class LiveBars(Bars):
    """Progress bars with something else below them.

    Attributes:
        below: renderable that is drawn below the bars.
    """

    below: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bars, then what is below them."""
        yield from super().get_renderables()
        if self.below is not None:
            yield self.below


class Terminal:
    """The `Display` of the command line: it writes to stderr, because stdout is for results.

    Args:
        stderr: False if the lines are the result of the verb.

    Attributes:
        quiet: whether only errors and problems are shown.
    """

    def __init__(self, *, stderr: bool = True) -> None:
        self.console = Console(stderr=stderr, highlight=False, soft_wrap=True)
        self.bars: LiveBars | None = None
        self.quiet = False

    @contextmanager
    def live(self) -> Iterator[Terminal]:
        """Draw progress bars inside this block if stderr is a terminal."""
        if not self.console.is_terminal or self.quiet:
            yield self
            return
        columns: list[ProgressColumn] = [
            TextColumn("{task.description:>10}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(compact=True),
        ]
        with LiveBars(*columns, console=self.console, transient=False) as self.bars:
            yield self
        self.bars = None

    @contextmanager
    def services(self) -> Iterator[StageNotice]:
        """Yield a callback for the phases of services, which shows a line with a spinner per service."""
        if not self.console.is_terminal or self.quiet:
            yield self.stage
            return
        columns: list[ProgressColumn] = [
            TextColumn("[bold cyan]{task.description:>10}"),
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.fields[phase]}"),
            TimeElapsedColumn(),
        ]
        with Bars(*columns, console=self.console) as bars:
            tasks: dict[str, TaskID] = {}

            def report(service: str, phase: str) -> None:
                if service not in tasks:
                    tasks[service] = bars.add_task(service, total=1, phase=phase)
                done = phase in ("healthy", "already running")
                bars.update(tasks[service], phase=phase, completed=int(done))

            yield report

    def stage(self, name: str, text: str) -> None:
        """Print one line of a stage."""
        wrong = NOT_WORKING in text
        if wrong or not self.quiet:
            shown = (_visible(redact(text)), "yellow" if wrong else "")
            self.console.print(Text.assemble((f"{name:>10}", "bold cyan"), "  ", shown))

    def error(self, kind: str, error: Exception) -> None:
        """Print an error without user info in addresses; square brackets in its message are not markup."""
        self.console.print(Text.assemble((kind, "bold red"), "\n", _visible(redact(str(error)))))

    def checks(self, checks: Sequence[tuple[str, str, str, str | None]]) -> None:
        """Show findings, each as (status, name, finding, fix); aligned and wrapped on a terminal."""
        if not self.console.is_terminal:
            for status, name, found, fix in checks:
                line = f"{status:>8}  {name}: {found}" + (f"; fix: {fix}" if fix else "")
                self.console.print(Text(redact(line)))
            return
        styles = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
        rows = []
        for status, name, found, fix in checks:
            advice = [("\n" + redact(fix), "bold")] if fix else []
            rows.append((Text(status, styles[status]), Text(name, "cyan"), Text.assemble(redact(found), *advice)))
        print_grid(self.console, rows, whole=2)

    def table(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Show rows of (what, choice, reason): aligned and wrapped on a terminal, otherwise one line each."""
        if not self.console.is_terminal:
            for what, choice, reason in rows:
                self.stage("plan", f"{what}: {choice} ({reason})")
            return
        lines = [
            (Text(f"{what:>14}", "bold cyan"), Text(redact(choice), "bold"), Text(redact(reason), "dim"))
            for what, choice, reason in rows
        ]
        print_grid(self.console, lines, whole=1)

    def counter(self, description: str, unit: str) -> Progress:
        """Return a callback that shows progress over a known number of items, its rate and the remaining time."""
        show = self._meter(description)
        began: list[tuple[float, int]] = []

        def update(done: int, total: int) -> None:
            now = time.monotonic()
            if not began:
                began.append((now, done))
            elapsed, since = now - began[0][0], done - began[0][1]
            counted = f"{done:,} {unit.removesuffix('s') if done == 1 else unit}"
            if since and elapsed > 1 and done < total:
                rate = since / elapsed
                counted += f", {rate:,.{int(rate < 10)}f}/s"
                counted += "" if self.bars else f", {(total - done) / rate:,.0f} s left"
            show(done, total, counted)

        return update

    def training(self, images: int, resumes_at: int) -> Report:
        """Return a callback that shows progress, speed and quality of a training, with its newest samples on a
        terminal."""
        show = self._meter("train")
        began: list[tuple[float, int]] = []
        samples: list[RenderableType] = []

        def update(status: TrainingStatus) -> None:
            if not began:
                began.append((time.monotonic(), status.images_seen))
            elapsed, total = time.monotonic() - began[0][0], status.length or images
            seen = min(status.images_seen, total)
            rate = (status.images_seen - began[0][1]) / elapsed if elapsed > 1 else 0.0
            speed = [f"{seen:,} images", f"{rate:,.0f}/s"]
            if self.bars is None:
                left = [f"{(total - seen) / rate:,.0f} s left"] if rate else []
                show(seen, total, ", ".join([*speed, *_how_well(status), *left]))
                return
            show(seen, total, ", ".join(speed))
            if status.samples is not None and self.console.color_system in ("truecolor", "256"):
                samples[:] = [_small_picture(status.samples, self.console.width)]
            self.bars.below = Group(Text(f"{'':>12}{', '.join(_how_well(status))}"), *samples)

        return update

    def breakdown(self, breakdown: TimeBreakdown) -> None:
        """Show where the time of a stage went, as a table on a terminal or as lines elsewhere."""
        if not self.console.is_terminal or self.quiet:
            for line in breakdown.lines:
                self.stage(breakdown.name, line)
            return
        table = Table(title=breakdown.title, title_justify="left")
        for name, justify in (("time for", "left"), ("seconds", "right"), ("share", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for name, seconds in breakdown.seconds.items():
            table.add_row(name, f"{seconds:,.1f}", f"{seconds / max(breakdown.total_s, 1e-9):.1%}")
        table.add_section()
        table.add_row("all", f"{breakdown.total_s:,.1f}", "")
        self.console.print(table)
        self.stage(breakdown.name, breakdown.lines[-1])

    def _meter(self, description: str) -> Callable[[float, float, str], None]:
        """Return a callback for (done, total, detail): a bar inside `live` on a terminal, otherwise occasional
        lines."""
        if self.quiet:
            return lambda done, total, detail: None
        if self.bars is not None:
            bars = self.bars
            task = bars.add_task(description, total=None, detail="starting")
            return lambda done, total, detail: bars.update(task, completed=done, total=total, detail=detail)
        printed_at = -PLAIN_EVERY_S

        def line(done: float, total: float, detail: str) -> None:
            nonlocal printed_at
            now, complete = time.monotonic(), done >= total
            if now - printed_at >= PLAIN_EVERY_S or (complete and printed_at != math.inf):
                printed_at = math.inf if complete else now  # the last line is printed once
                self.stage(description, f"{done / total:4.0%}  {detail}")

        return line


def _how_well(status: TrainingStatus) -> list[str]:
    """Return loss, goodput and last distance of a training in words; unknown values are left out."""
    loss, goodput, distance = status.loss, status.goodput, status.distance
    return [
        *([] if loss is None else [f"loss {loss:.4f}"]),
        *([] if goodput is None else [f"goodput {goodput:.0%}"]),
        *([] if distance is None else [f"distance {distance:.2f} at {status.scored_at:,}"]),
    ]


def _small_picture(samples: NDArray[np.uint8], width: int) -> RenderableType:
    """Return samples [N, H, W, C] side by side for a terminal of `width` columns, one pixel per column."""
    from PIL import Image
    from rich_pixels import Pixels

    side = max(samples.shape[1:3])
    scale = min(1.0, TILE / side)
    high, wide = (max(1, round(scale * n)) for n in samples.shape[1:3])
    columns = max(1, min((width - 1) // (wide + 1), -(-len(samples) // SAMPLE_ROWS)))
    count = min(len(samples), columns * SAMPLE_ROWS)
    picture = Image.new("RGB", (columns * (wide + 1), -(-count // columns) * (high + 2)))
    for i, sample in enumerate(samples[:count]):
        image = Image.fromarray(sample.squeeze(-1) if sample.shape[-1] == 1 else sample).convert("RGB")
        at = (i % columns * (wide + 1), i // columns * (high + 2))
        picture.paste(image.resize((wide, high), Image.Resampling.BOX), at)
    return Pixels.from_image(picture)


def _visible(text: str) -> str:
    """Escape the control characters of a text: file names may contain terminal commands."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def print_grid(console: Console, rows: Sequence[Sequence[Text]], whole: int) -> None:
    """Print rows in columns, of which the first ones are not wrapped.

    Args:
        whole: number of columns that are not.
    """
    table = Table.grid(padding=(0, 2, 0, 0))
    for column in range(max(map(len, rows), default=0)):
        table.add_column(no_wrap=column < whole, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
