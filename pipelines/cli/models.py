"""`ddpm evaluate`, `sample`, `promote` and `verify`: models that were trained before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.common import (
    MODEL,
    Json,
    Overrides,
    answer_json,
    compose,
    compose_connected,
    connect,
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


def sample(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the PNGs and grid.png")],
    labels: Annotated[
        str | None, typer.Option(help="Class names or indices, comma-separated; default: all classes")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images per label, or in total for a model without classes")] = 1,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale; default: the model's own")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the model's own")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images to draw at a time; the images do not depend on it")
    ] = 64,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Draw images. Example: ddpm sample models:/digits@champion --labels 0,1,2 --guidance 2 --steps 50 --out samples"""
    needed = {"runs": ["s3", "mlflow"], "mode": ["mlflow"]}.get(model[:4], [])
    config = connect(compose(overrides), needed)

    from pipelines import references
    from pipelines.sampling import write_samples
    from pipelines.storage import Storage

    resolved = references.resolve(model, tracking_uri=config.tracking.uri, storage=Storage.of(config))
    files = write_samples(
        resolved.model,
        out,
        labels=labels,
        count=count,
        guidance=guidance,
        steps=steps,
        seed=seed,
        batch_size=batch_size,
    )
    terminal.stage("sample", f"{len(files) - 1} images and {files[-1]}")
    answer_json(as_json, {"files": [str(f) for f in files]})


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
            else ("failed", row.name, f"{row.figure} (asked for: {row.bound})", None)
            for row in found.rows
        ]
    )
    outcome = f"failed: {', '.join(found.failed)}" if found.failed else f"passed, {len(found.rows)} checks"
    terminal.stage("verify", f"{model} {outcome}")
    answer_json(as_json, found.to_plain())
    if not found.passed:
        raise typer.Exit(1)
