"""What a person sees: stages, bars where stderr is a terminal, plain lines where it is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pipelines.training.goodput import Goodput

PLAIN_EVERY_S = 5.0


class Terminal:
    """`Display` on stderr; stdout is left to results."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.progress: Progress | None = None

    @contextmanager
    def live(self) -> Iterator[Terminal]:
        """Bars are drawn inside this block."""
        if not self.console.is_terminal:
            yield self
            return
        columns: list[ProgressColumn] = [
            TextColumn("{task.description:>10}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(compact=True),
        ]
        with Progress(*columns, console=self.console, transient=False) as self.progress:
            yield self
        self.progress = None

    @contextmanager
    def services(self) -> Iterator[Callable[[str, str], None]]:
        """A bar per service of the local stack; call it with (service, phase)."""
        if not self.console.is_terminal:
            yield self.stage
            return
        columns: list[ProgressColumn] = [
            TextColumn("[bold cyan]{task.description:>10}"),
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.fields[phase]}"),
            TimeElapsedColumn(),
        ]
        with Progress(*columns, console=self.console) as progress:
            tasks: dict[str, TaskID] = {}

            def report(service: str, phase: str) -> None:
                if service not in tasks:
                    tasks[service] = progress.add_task(service, total=1, phase=phase)
                done = phase in ("healthy", "already running")
                progress.update(tasks[service], phase=phase, completed=int(done))

            yield report

    def stage(self, name: str, text: str) -> None:
        """A line of a stage."""
        self.console.print(Text.assemble((f"{name:>10}", "bold cyan"), "  ", text))

    def error(self, kind: str, error: Exception) -> None:
        """What went wrong, as it is: square brackets in it are not markup."""
        self.console.print(Text.assemble((kind, "bold red"), "\n", str(error)))

    def counter(self, description: str, unit: str) -> Callable[[int, int], None]:
        """A bar over a known number of things; call it with (done, total)."""
        show = self._meter(description)

        def update(done: int, total: int) -> None:
            show(done, total, f"{done:,} {unit}")

        return update

    def training(self, images: int, resumes_at: int) -> Callable[[dict[str, float]], None]:
        """The bar of a training; call it with what rank 0 reports."""
        show = self._meter("train")
        began: list[tuple[float, float]] = []

        def update(values: dict[str, float]) -> None:
            seen, loss = values.get("images_seen", resumes_at), values.get("loss")
            if not began:
                began.append((time.monotonic(), seen))
            elapsed = time.monotonic() - began[0][0]
            rate = (seen - began[0][1]) / elapsed if elapsed > 1 else 0.0
            left = f", {(images - seen) / rate:,.0f} s left" if rate and not self.progress else ""
            detail = f"{min(seen, images):,.0f} images, {rate:,.0f}/s" + (
                f", loss {loss:.4f}" if loss is not None else ""
            )
            show(min(seen, images), images, detail + left)

        return update

    def goodput(self, goodput: Goodput) -> None:
        """Where the time of a training went: a table on a terminal, lines elsewhere."""
        if not self.console.is_terminal:
            for line in goodput.lines():
                self.stage("goodput", line)
            return
        table = Table(title=f"{goodput.fraction:.1%} of the time was training that lasts", title_justify="left")
        for name, justify in (("time for", "left"), ("seconds", "right"), ("share", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for name, seconds in goodput.parts().items():
            table.add_row(name, f"{seconds:,.1f}", f"{seconds / max(goodput.wall_s, 1e-9):.1%}")
        table.add_section()
        table.add_row("all", f"{goodput.wall_s:,.1f}", "")
        self.console.print(table)
        self.stage("goodput", goodput.lines()[-1])

    def _meter(self, description: str) -> Callable[[float, float, str], None]:
        if self.progress is not None:
            progress = self.progress
            task = progress.add_task(description, total=None, detail="starting")
            return lambda done, total, detail: progress.update(task, completed=done, total=total, detail=detail)
        said = [-PLAIN_EVERY_S]

        def line(done: float, total: float, detail: str) -> None:
            if time.monotonic() - said[0] >= PLAIN_EVERY_S or (done >= total and said[0] != float("inf")):
                said[0] = float("inf") if done >= total else time.monotonic()
                self.stage(description, f"{done / total:4.0%}  {detail}")

        return line
