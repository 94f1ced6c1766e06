"""Tables of a study's trials for the terminal, and lines for output that is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipelines.presentation.progress import StageNotice
from pipelines.search.observer import AXIS, Observer, OnChange, describe_params
from pipelines.search.study import TrialRecord, best
from pipelines.search.study_config import StudyConfig

SHOWN = 12
"""Rows of the live table: the running trials, then the newest."""

AXIS_WORDS = {AXIS["training"]: "images", AXIS["guidance"]: "samples"}
"""The axis of a trial's reports in words."""


@contextmanager
def shown(console: Console, notice: StageNotice) -> Iterator[OnChange]:
    """Yield a callback that shows a study: as a live table on a terminal, else as a line for each trial that ends."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            yield lambda observer: live.update(
                Group(
                    table(observer.study, list(observer.records.values()), SHOWN),
                    Text(progress(observer), style="bold cyan"),
                )
            )
        return
    printed: set[tuple[str, str]] = set()

    def print_ended(observer: Observer) -> None:
        for record in observer.records.values():
            if record.state != "running" and (record.trial, record.state) not in printed:
                printed.add((record.trial, record.state))
                ended = sum(r.state != "running" for r in observer.records.values())
                notice("trial", f"{ended}/{observer.study.trials}  {line(record)}")

    yield print_ended


def line(record: TrialRecord) -> str:
    """Return a trial in one line: name, state, distance and parameters."""
    distance = record.scores.get("frechet_distance")
    judged = "" if distance is None else f" at distance {distance:.3f}"
    # The distance of few samples is biased upwards: it stands beside their number.
    counts = (f" after {record.scores[axis]:,.0f} {word}" for axis, word in AXIS_WORDS.items() if axis in record.scores)
    after = next(counts, "") if record.state == "stopped" else ""
    why = f" ({record.error})" if record.error else ""
    return f"{record.trial} {record.state}{after}{judged}{why}: {describe_params(record.params)}"


def progress(observer: Observer) -> str:
    """Return in words how many trials have ended, the time used and left, and the best trial."""
    records = list(observer.records.values())
    ended = sum(r.state != "running" for r in records)
    ended_here = ended - observer.before
    elapsed = time.monotonic() - observer.began
    left = (observer.study.trials - ended) * elapsed / ended_here if ended_here else None
    first = best(records, observer.study.objectives[0])
    return ", ".join(
        part
        for part in (
            f"{ended} of {observer.study.trials} trials",
            f"{elapsed:,.0f} s",
            f"about {left:,.0f} s left" if left is not None else "",
            f"best {first.scores['frechet_distance']:.3f} ({first.trial})" if first else "",
        )
        if part
    )


def table(study: StudyConfig, records: Sequence[TrialRecord], limit: int | None = None) -> Table:
    """Return a table of trials, the running ones first, then the newest.

    Args:
        limit: number of rows; None for all trials. With a limit, parameters are cut to one line.
    """
    ordered = sorted(records, key=lambda r: (r.state != "running", -r.began))[:limit]
    first = best(records, study.objectives[0])
    columns = Table(box=None, pad_edge=False)
    for name in ("trial", "state", AXIS[study.kind], "distance", "bits/dim" if study.kind == "training" else "evals"):
        columns.add_column(name, justify="left" if name in ("trial", "state") else "right", no_wrap=True)
    columns.add_column("parameters")  # the only one that a narrow terminal may narrow
    second = "bits_per_dim" if study.kind == "training" else "evaluations"
    forms = {AXIS[study.kind]: ",.0f", "frechet_distance": ".3f", second: ".2f"}
    for record in ordered:
        style = "bold green" if first and record.trial == first.trial else "dim" if record.state == "stopped" else ""
        columns.add_row(
            record.trial,
            record.state,
            *(format(record.scores[name], form) if name in record.scores else "" for name, form in forms.items()),
            Text(record.error or describe_params(record.params), overflow="ellipsis", no_wrap=limit is not None),
            style="red" if record.state == "failed" else style,
        )
    return columns
