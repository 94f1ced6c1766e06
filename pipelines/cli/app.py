"""The Typer application: every verb by name, and the entry point.

Modules that import torch, Ray or MLflow are imported by the verbs that need them, so that `ddpm --help` is quick.
"""

from __future__ import annotations

import sys

import typer

from pipelines.cli import data, flow, models, runs, search, stack, training
from pipelines.cli.common import terminal
from pipelines.errors import ConfigError, PipelineError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for verb in (
    *(stack.up, stack.down, stack.status),
    *(data.ingest, data.index, data.check),
    training.train,
    *(runs.runs, runs.logs, runs.rm, runs.gc),
    *(models.evaluate, models.sample, models.promote),
    flow.flow,
):
    app.command()(verb)
app.add_typer(search.app, name="search")


def main() -> None:
    """Run the command line and exit with 0 (done), 1 (failed) or 2 (bad usage or configuration)."""
    try:
        app(standalone_mode=True)
    except PipelineError as error:
        terminal.error("configuration error" if isinstance(error, ConfigError) else "error", error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        terminal.console.print("aborted")
        sys.exit(130)
