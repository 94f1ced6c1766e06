"""The Typer application: every verb by name, and the entry point.

Modules that import torch, Ray or MLflow are imported by the verbs that need them, so that `ddpm --help` is quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from pipelines.cli import (
    config,
    data,
    exchange,
    flow,
    launch,
    models,
    pictures,
    plan,
    provenance,
    runs,
    search,
    serving,
    stack,
)
from pipelines.cli.common import terminal
from pipelines.environment.credentials import clean_arguments
from pipelines.presentation.errors import ConfigError, PipelineError


def _show_version(asked: bool) -> None:
    """Print the versions of the package and its dependencies if requested, and exit."""
    if not asked:
        return
    from pipelines.environment.lineage import installed_versions

    for name, version in installed_versions().items():
        typer.echo(f"{name} {version or ('not in a git checkout' if name == 'commit' else 'not installed')}")
    raise typer.Exit


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
for verb in (
    *(stack.up, stack.down, stack.status, stack.doctor),
    *(plan.init, config.config),
    *(data.ingest, data.index, data.check),
    *(runs.train, runs.runs, runs.logs, runs.rm, runs.gc),
    *(models.evaluate, models.register, models.promote, models.verify, models.report, models.guard),
    *(pictures.sample, pictures.inpaint, pictures.edit, pictures.likelihood),
    *(provenance.seen, provenance.forget),
    serving.serve,
    exchange.export,
    plan.plan,
    flow.flow,
):
    app.command()(verb)
app.command("import")(exchange.import_model)
app.command(context_settings=launch.CONTEXT)(launch.launch)
app.add_typer(search.app, name="search")


@app.callback()
def ddpm(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the installed versions and exit."),
    ] = False,
) -> None:
    """Train denoising diffusion models on a Ray cluster, from images to a registered model."""


def hide_secrets() -> None:
    """Restart this command if its arguments contain secrets, which are moved into its environment.

    The process list shows arguments to every user of the machine, and Ray's dashboard shows those of its drivers.
    """
    cleaned, variables = clean_arguments(sys.argv[1:])
    if variables and sys.orig_argv[-len(cleaned) :] == sys.argv[1:]:
        os.execve(sys.executable, [*sys.orig_argv[: -len(cleaned)], *cleaned], {**os.environ, **variables})


def main() -> None:
    """Run the command line and exit with 0 (done), 1 (failed) or 2 (bad usage or configuration)."""
    try:
        hide_secrets()
        app(standalone_mode=True)
    except PipelineError as error:
        terminal.error("configuration error" if isinstance(error, ConfigError) else "error", error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        terminal.console.print("aborted")
        sys.exit(130)
