"""`ddpm flow`: every stage from images to a registered model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.common import Json, Overrides, answer_json, compose_connected, show_verdict, terminal
from pipelines.lineage import code_lineage


def flow(
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for images and a grid of the registered model")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ingest, train, evaluate, register; finished stages are skipped. Example: ddpm flow +experiment=digits"""
    config = compose_connected(overrides)

    from pipelines import flow as stages
    from pipelines import references
    from pipelines.inference import write_samples
    from pipelines.storage import Storage

    with terminal.live():
        result = stages.run(config, code_lineage(), terminal)
    for name, text in result.scores.lines():
        terminal.stage(name, text)
    show_verdict(result.verdict, failed_only=True)
    terminal.stage("registry", f"{result.version.uri}, alias {config.registry.alias} {result.verdict.outcome}")
    answer = result.to_dict()
    if out is not None:
        resolved = references.resolve(result.version.uri, tracking_uri=config.tracking.uri, storage=Storage.of(config))
        answer["grid"] = str(write_samples(resolved, out, 8, (result.scores.prompts or {}).get("examples")))
        terminal.stage("grid", answer["grid"])
    terminal.stage("mlflow", result.tracker.url)
    answer_json(as_json, answer)
