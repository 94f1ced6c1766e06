"""`ddpm evaluate`, `register`, `sample`, `promote` and `verify`: models that were trained before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    quoted_override,
    show_verdict,
    terminal,
)

if TYPE_CHECKING:
    from ddpm.generate import Sampling
    from pipelines.config import Config
    from pipelines.references import Resolved


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
    settings, dataset_uri = _asked(resolved, config, overrides)
    with terminal.live():
        scores, _ = score_and_record(
            resolved,
            settings,
            config,
            storage,
            terminal,
            lambda: connect_ray(config, storage),
            dataset_uri,
        )
    for name, text in scores.lines():
        terminal.stage(name, text)
    terminal.stage("samples", scores.samples)
    answer_json(as_json, scores.to_plain())


def register(
    model: Annotated[str, typer.Argument(help=MODEL)],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Registered model; default: registry.model")] = None,
    as_json: Json = False,
) -> None:
    """Score a model and register it as a version. Example: ddpm register models:/digits/1 sampler.steps=20"""
    named = [] if name is None else [quoted_override("registry.model", name)]
    config = compose_connected([*(overrides or []), *named])

    from pipelines import references, registry
    from pipelines.storage import Storage
    from pipelines.training.ray_train.resources import connect_ray

    storage = Storage.of(config)
    resolved = references.resolve(model, tracking_uri=config.tracking.uri, storage=storage)
    settings, dataset_uri = _asked(resolved, config, overrides)
    with terminal.live():
        version = registry.register_scored(
            resolved,
            settings,
            config,
            storage,
            terminal,
            lambda: connect_ray(config, storage),
            dataset_uri=dataset_uri,
        )
    terminal.stage("registry", f"{version.uri}; `ddpm promote {version.uri} --alias {config.registry.alias}`")
    answer_json(as_json, {"model": version.uri, "scores": json.loads(version.tags["scores"])})


def _asked(resolved: Resolved, config: Config, overrides: list[str] | None) -> tuple[Sampling, str | None]:
    """Return the sampling settings that overrides ask for, else the model's own, and the address of other data."""
    from pipelines.config import sampling

    lines = [line.lstrip("+") for line in overrides or []]
    overridden = any(line.startswith(("guidance", "sampler")) for line in lines)
    other_data = any(line.startswith(("data=", "data.uri=")) for line in lines)
    settings = sampling(config) if overridden else resolved.model.spec.sampling
    return settings, config.data.uri if other_data else None


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
            else ("failed", row.name, f"{row.figure} (has to be: {row.bound})", None)
            for row in found.rows
        ]
    )
    outcome = f"failed: {', '.join(found.failed)}" if found.failed else f"passed, {len(found.rows)} checks"
    terminal.stage("verify", f"{model} {outcome}")
    answer_json(as_json, found.to_plain())
    if not found.passed:
        raise typer.Exit(1)
