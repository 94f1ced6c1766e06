"""`ddpm train`, `runs`, `logs`, `rm` and `gc`: train a run, list runs, show worker logs, delete runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, JustifyMethod
from rich.filesize import decimal
from rich.table import Table

from pipelines.cli.common import (
    SERVICES,
    Json,
    Overrides,
    Quiet,
    answer_json,
    compose_connected,
    compose_running,
    connect,
    finite,
    terminal,
)
from pipelines.environment.lineage import code_lineage

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.training.log_lines import LogLine

FOLLOW_EVERY_S = 2.0
WIDE = 400
Run = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run, as in name=…")]


def logs(
    run: Run,
    overrides: Overrides = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Only lines of this rank")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show new lines until the run ends")] = False,
    as_json: Json = False,
) -> None:
    """Show the warnings and errors of a run's workers, from storage. Example: ddpm logs first --follow"""
    config = compose_running(overrides, name=run, services=["s3"], optional=["mlflow"])

    from pipelines.storage import Storage, layout
    from pipelines.training.log_lines import LogReader, last_write

    storage, folder = Storage.of(config), layout.run_folder(config.storage.root, run)
    last_write(storage, folder)  # raises where there is no such run
    reader, lines = LogReader(storage, folder, rank), []

    def show() -> None:
        for line in reader.new_lines():
            lines.append(line)
            _print(line, to_stderr=as_json)

    show()
    if follow:
        _until_the_end(show, config, folder)
    if not lines:
        whose = "the workers" if rank is None else f"rank {rank}"
        terminal.stage("logs", f"{whose} of run '{run}' logged no warning and no error")
    answer_json(as_json, {"run": run, "lines": [asdict(line) for line in lines]})


def runs(overrides: Overrides = None, as_json: Json = False) -> None:
    """List the runs, with their state, last score and size on storage. Example: ddpm runs"""
    config = compose_running(overrides, services=["s3", "mlflow"])

    from pipelines import housekeeping
    from pipelines.storage import layout

    found = housekeeping.list_runs(config)
    table = _table("run", "state", "images>", "last score", "size>", "when")
    for row in found:
        score = f"{row.score[0]} {row.score[1]:.4g}" if row.score else ""
        when = "" if row.when is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(row.when))
        table.add_row(row.name, row.state, f"{row.images_seen:,}", score, decimal(row.size), when)
    if found:
        _show(table, as_json)
    else:
        where = f"{config.storage.root}/{layout.RUNS}"
        terminal.stage("runs", f"none in experiment '{config.tracking.experiment}' and at {where}")
    answer_json(as_json, {"runs": [asdict(row) for row in found]})


def rm(
    run: Run,
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also if registered versions were made from it; those are kept")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete a run's folder and its MLflow run, after confirmation. Example: ddpm rm first"""
    config = compose_running(overrides, name=run, services=["s3", "mlflow"], optional=["ray"])

    from pipelines import housekeeping

    removal = housekeeping.find_removal(config, force=force)
    with housekeeping.kept_from_training(config, lambda text: terminal.stage("rm", text)):
        for text in removal.lines():
            terminal.stage("rm", text)
        _ask(yes, f"Delete everything of run '{run}'?")
        removal = housekeeping.find_removal(config, force=force)  # the question may have been open for long
        housekeeping.remove(removal, config)
    terminal.stage("rm", f"deleted run '{run}', {decimal(removal.folder.size)}")
    answer_json(as_json, {"run": run, "size": removal.folder.size, "run_ids": [r.run_id for r in removal.records]})


def gc(
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted, and why")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    older_than: Annotated[
        float,
        typer.Option(
            min=0, callback=finite, help="Hours since the last write; the record of newer data may not be written yet"
        ),
    ] = 24,
    as_json: Json = False,
) -> None:
    """Delete checkpoints, studies, evaluators, samples and features that nothing refers to. Example: ddpm gc
    --dry-run"""
    config = compose_running(overrides, services=["s3", "mlflow"])

    from pipelines import housekeeping
    from pipelines.storage import Storage

    storage, grace_s = Storage.of(config), older_than * 3600
    found = housekeeping.find_garbage(config, grace_s)
    table = _table("address", "size>", "why")
    for verdict in found:
        table.add_row(verdict.folder.address, decimal(verdict.folder.size), verdict.why)
    deleted = []
    if found:
        _show(table, as_json)
    else:
        terminal.stage(
            "gc", f"nothing to collect: all at {config.storage.root} is in use, or younger than {older_than:g} hours"
        )
    if found and not dry_run:
        _ask(yes, f"Delete these, {decimal(sum(v.folder.size for v in found))} in total?")
        shown = {verdict.folder.address for verdict in found}
        for verdict in housekeeping.find_garbage(config, grace_s):  # the question may have been open for long
            if verdict.folder.address in shown:
                housekeeping.collect(verdict, storage)
                deleted.append(verdict)
        terminal.stage("gc", f"deleted {len(deleted)}, {decimal(sum(v.folder.size for v in deleted))}")
    plain = [{"address": v.folder.address, "size": v.folder.size, "why": v.why} for v in found]
    answer_json(as_json, {"garbage": plain, "deleted": [v.folder.address for v in deleted]})


def _table(*columns: str) -> Table:
    """Return a table without borders; columns whose name ends in ">" are right-aligned."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        justify: JustifyMethod = "right" if column.endswith(">") else "left"
        table.add_column(column.rstrip(">"), justify=justify, overflow="fold", no_wrap=column.endswith(">"))
    return table


def _show(table: Table, as_json: bool) -> None:
    """Print a table on stdout, or on stderr if stdout is for JSON."""
    console = Console(stderr=as_json, highlight=False)
    if not console.is_terminal:
        console.width = WIDE  # a file or another program wants a row in one line
    console.print(table)


def _ask(yes: bool, question: str) -> None:
    """Ask for confirmation; without a terminal nothing happens without `--yes`."""
    if not yes:
        typer.confirm(question, abort=True, err=True)


def _print(line: LogLine, *, to_stderr: bool) -> None:
    """Print a line on stdout, or on stderr if stdout is for JSON."""
    typer.echo(str(line), err=to_stderr)


def _until_the_end(show: Callable[[], None], config: Config, folder: str) -> None:
    """Show new lines until MLflow says that the run has ended, nothing more is written, or Ctrl-C.

    Storage or MLflow may be unavailable for a while: the next check comes soon.
    """
    from pipelines import tracking
    from pipelines.presentation.errors import PipelineError
    from pipelines.storage import Storage
    from pipelines.training.log_lines import has_ended, last_write

    storage = Storage.of(config)
    try:
        while True:
            status = None
            with suppress(PipelineError):
                runs = tracking.list_runs(config.tracking.uri, config.name) if config.tracking.uri else []
                status = next((r.status for r in runs if r.of(config.tracking.experiment)), None)
            ended = has_ended(status, last_write(storage, folder), time.time())
            show()
            if ended:
                terminal.stage("logs", f"run '{config.name}' is not being trained{f' ({status})' if status else ''}")
                return
            time.sleep(FOLLOW_EVERY_S)
    except KeyboardInterrupt:
        terminal.stage("logs", f"no longer following run '{config.name}', which keeps running")


def train(
    overrides: Overrides = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="A complete configuration, such as a run's config.json")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a run, or resume the run with this name. Example: ddpm train +experiment=digits name=first"""
    terminal.quiet = quiet
    if config_file is None:
        config = compose_connected(overrides)
    else:
        from pipelines.config import read_config

        config = connect(read_config(config_file, overrides or []), SERVICES)

    from pipelines.flow.train import begin, show_end
    from pipelines.training import driver

    with terminal.live():
        result = driver.train(*begin(config, code_lineage(), terminal))
        show_end(result, terminal)
    terminal.stage("train", f"{result.status} at {result.images_seen:,} images; runs:/{result.tracker.run_id}")
    published = asdict(result.published) if result.published else None
    answer_json(
        as_json,
        {
            "status": result.status,
            "run_id": result.tracker.run_id,
            "images_seen": result.images_seen,
            "published": published,
            "goodput": result.goodput.to_dict() if result.goodput else None,
            "mlflow": result.tracker.url,
        },
    )
