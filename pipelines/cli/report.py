"""`ddpm report`: one HTML file of what a run or a registered model is, how good it is, and what it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.common import Json, Overrides, answer_json, check_file, compose_running, terminal


def report(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="Name or MLflow ID of a run, models:/NAME/VERSION or models:/NAME@ALIAS"
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="The file; default: report-NAME.html")] = None,
    model: Annotated[
        bool, typer.Option("--model/--no-model", help="Draw a few pictures with the model, and measure its error")
    ] = True,
    log: Annotated[bool, typer.Option("--log/--no-log", help="Keep it among the artifacts of the MLflow run")] = True,
    as_json: Json = False,
) -> None:
    """Write all that is known of a run or model into one HTML file. Example: ddpm report first --out first.html"""
    check_file("--out", out or Path("report-NAME.html"), "report.html")

    from pipelines.checkpoints.references import check_recorded

    check_recorded(reference)
    config = compose_running(overrides, services=["s3", "mlflow"])

    from pipelines import report as reports
    from pipelines.storage import Storage

    storage = Storage.of(config)
    made = reports.make(reference, config, storage, lambda text: terminal.stage("note", text), with_model=model)
    path = out or Path(made.file_name)
    path.write_text(made.html, encoding="utf-8")
    terminal.stage("report", f"{path}: {', '.join(made.sections)}")
    where = made.log() if log else None
    if where is not None:
        terminal.stage("mlflow", where)
    answer_json(as_json, {"path": str(path), "sections": list(made.sections), "mlflow": where})
