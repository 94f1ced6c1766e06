"""`ddpm evaluate`, `promote` and `verify`: models that were trained before."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.common import (
    MODEL,
    Json,
    Overrides,
    answer_json,
    compose,
    compose_connected,
    find_running,
    show_verdict,
    terminal,
)


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
    model: Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@ALIAS; with --rollback its NAME")],
    alias: Annotated[str, typer.Option(help="The alias to move")],
    not_worse_than: Annotated[
        float | None, typer.Option(min=0, metavar="MARGIN", help="Pass a version that is not worse by this distance")
    ] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Give the alias back to the version before")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide; record and move nothing")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Move an alias to a version if the gate allows it. Example: ddpm promote models:/digits/2 --alias champion"""
    config = compose_connected(overrides)

    from pipelines import references, registry
    from pipelines.storage import Storage
    from pipelines.training.ray_train.resources import connect_ray

    storage = Storage.of(config)
    name = model.removeprefix("models:/").split("/")[0].split("@")[0]
    gate = registry.Gate(config, storage, terminal, lambda: connect_ray(config, storage), name, alias)
    with terminal.live():
        if rollback:
            verdict = gate.rollback(dry_run=dry_run)
        else:
            version = references.find_registered(model, config.tracking.uri)
            verdict = gate.promote(version, margin=not_worse_than, dry_run=dry_run)
    show_verdict(verdict)
    answer_json(as_json, verdict.to_plain())
    if not verdict.passed:
        raise typer.Exit(1)


def verify(
    model: Annotated[str, typer.Argument(help="models:/NAME@alias, models:/NAME/VERSION or a downloaded version")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Check whether a version is what was scored, and by whom. Example: ddpm verify models:/digits@champion"""
    services = ["mlflow"] if model.startswith("models:/") else []
    config = find_running(compose(overrides), services, optional=["s3"])

    from pipelines import registry
    from pipelines.storage import Storage

    found = registry.verify(
        model,
        tracking_uri=config.tracking.uri,
        storage=Storage.of(config),
        trust=registry.Trust.of(config.registry),
        notice=lambda text: terminal.stage("verify", text),
    )
    terminal.checks(
        [
            ("ok", row.name, row.figure, None)
            if row.passed
            else ("failed", row.name, f"{row.figure} (has to be: {row.bound})", None)
            for row in found.rows
        ]
    )
    outcome = f"failed: {', '.join(found.failed)}" if found.failed else f"passed, {len(found.rows)} checks"
    terminal.stage("verify", f"{model} {outcome}")
    answer_json(as_json, found.to_plain())
    if not found.passed:
        raise typer.Exit(1)
