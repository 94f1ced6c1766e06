"""`ddpm logs`: what the workers of a run said."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.common import Json, Overrides, answer_json, compose_running, terminal

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.storage import Storage
    from pipelines.training.log_lines import Line

FOLLOW_EVERY_S = 2.0
Run = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run, as in name=…")]


def logs(
    run: Run,
    overrides: Overrides = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Only what this rank said")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show new lines until the run ends")] = False,
    as_json: Json = False,
) -> None:
    """Show the warnings and errors of a run's workers, from storage. Example: ddpm logs first --follow"""
    config = compose_running(overrides, name=run, services=["s3"], optional=["mlflow"])

    from pipelines.storage import Storage, join
    from pipelines.training.log_lines import LogReader, last_write

    storage, folder = Storage.of(config), join(config.storage.root, "runs", run)
    last_write(storage, folder)  # raises where there is no such run
    reader, lines = LogReader(storage, folder, rank), []

    def show() -> None:
        for line in reader.new_lines():
            lines.append(line)
            _print(line, to_stderr=as_json)

    show()
    if follow:
        _until_the_end(show, config, storage, folder)
    if not lines:
        whose = "the workers" if rank is None else f"rank {rank}"
        terminal.stage("logs", f"{whose} of run '{run}' logged no warning and no error")
    answer_json(as_json, {"run": run, "lines": [asdict(line) for line in lines]})


def _print(line: Line, *, to_stderr: bool) -> None:
    """Print a line: on stdout, which is for results, unless that is for JSON."""
    typer.echo(str(line), err=to_stderr)


def _until_the_end(show: Callable[[], None], config: Config, storage: Storage, folder: str) -> None:
    """Show new lines until the run has ended, as MLflow says or because nothing is written any more, or Ctrl-C.

    Storage or MLflow may be away for a while: the next look is in a moment.
    """
    from pipelines import tracking
    from pipelines.errors import PipelineError
    from pipelines.training.log_lines import has_ended, last_write

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
        terminal.stage("logs", f"no longer following run '{config.name}', which goes on")
