"""`ddpm train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.common import SERVICES, Json, Overrides, Quiet, answer_json, compose_connected, connect, terminal
from pipelines.environment.lineage import code_lineage


def train(
    overrides: Overrides = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="A complete configuration, such as a run's config.json")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a run, or resume the run of this name. Example: ddpm train +experiment=digits name=first"""
    terminal.quiet = quiet
    if config_file is None:
        config = compose_connected(overrides)
    else:
        from pipelines.config import read_config

        config = connect(read_config(config_file, overrides or []), SERVICES)

    from pipelines.flow.train import train as run_training
    from pipelines.storage import Storage

    with terminal.live():
        result = run_training(config, Storage.of(config), code_lineage(), terminal)
    terminal.stage("train", f"{result.status} at {result.images_seen:,} images; runs:/{result.tracker.run_id}")
    published = dataclasses.asdict(result.published) if result.published else None
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
