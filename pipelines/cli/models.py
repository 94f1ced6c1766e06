"""`ddpm evaluate` and `promote`: models that were trained before."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from pipelines.cli.common import MODEL, Json, Overrides, answer_json, compose, compose_connected, connect, terminal


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Score samples of a model against real images. Example: ddpm evaluate models:/digits@champion guidance.scale=2"""
    config = compose_connected(overrides)

    from pipelines import references
    from pipelines.evaluation.scoring import score_and_record
    from pipelines.storage import Storage
    from pipelines.training.ray_train.resources import connect_ray

    storage = Storage.of(config)
    resolved = references.resolve(model, tracking_uri=config.tracking.uri, storage=storage)
    from pipelines.config import sampling

    overridden = any(line.lstrip("+").startswith(("guidance", "sampler")) for line in overrides or [])
    settings = sampling(config) if overridden else resolved.model.spec.sampling
    other_data = any(line.lstrip("+").startswith(("data=", "data.uri=")) for line in overrides or [])
    with terminal.live():
        scores, _ = score_and_record(
            resolved,
            settings,
            config,
            storage,
            terminal,
            lambda: connect_ray(config, storage),
            config.data.uri if other_data else None,
        )
    for name, text in scores.lines():
        terminal.stage(name, text)
    terminal.stage("samples", scores.samples)
    answer_json(as_json, scores.to_plain())


def promote(
    model: Annotated[str, typer.Argument(help="models:/NAME/VERSION")],
    alias: Annotated[str, typer.Option(help="The alias to move")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Move an alias to a version if the gate allows it. Example: ddpm promote models:/digits/2 --alias champion"""
    config = connect(compose(overrides), ["mlflow"])

    from pipelines import registry

    assert config.tracking.uri is not None
    version = registry.find_version(config.tracking.uri, model)
    verdict = registry.promote(config.tracking.uri, version, alias)
    terminal.stage("gate", str(verdict))
    answer_json(as_json, dataclasses.asdict(verdict))
    if not verdict.passed:
        raise typer.Exit(1)
