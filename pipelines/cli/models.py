"""`ddpm evaluate`, `report`, `register`, `promote`, `verify` and `guard`: verbs for trained models."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.common import (
    MODEL,
    SERVICES,
    Json,
    Overrides,
    answer_json,
    check_file,
    compose,
    compose_connected,
    compose_running,
    connect_for_model,
    find_running,
    finite,
    show_verdict,
    terminal,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ddpm.generate import Sampling
    from pipelines.checkpoints.references import Resolved
    from pipelines.cli.terminal import Terminal
    from pipelines.config import Config


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Score samples of a model against real images. Example: ddpm evaluate models:/digits@champion guidance.scale=2

    Samples are drawn with the model's own settings and scored with those of its run, except for overrides given here.
    """
    asked, _ = _asked(model, overrides or [])

    from pipelines.evaluation.scoring import score_and_record

    with terminal.live():
        scores, _ = score_and_record(*asked)
    for name, text in scores.lines():
        terminal.stage(name, text)
    terminal.stage("samples", scores.samples)
    answer_json(as_json, scores.to_plain())


def register(
    model: Annotated[str, typer.Argument(help=MODEL)],
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the registered model; default: that of MODEL or of its run")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a model and register it as a version. Example: ddpm register models:/digits/1 sampler.steps=20

    Samples are drawn with the model's own settings and scored with those of its run, except for overrides given here.
    """
    from pipelines.config import quoted_override

    named = [] if name is None else [quoted_override("registry.model", name)]
    asked, alias = _asked(model, [*(overrides or []), *named])

    from pipelines import registry

    with terminal.live():
        version = registry.register_scored(*asked)
    terminal.stage("registry", f"{version.uri}; `ddpm promote {version.uri} --alias {alias}`")
    answer_json(as_json, {"model": version.uri, "scores": json.loads(version.tags["scores"])})


def _asked(
    model: str, overrides: list[str]
) -> tuple[tuple[Resolved, Sampling, Config, Terminal, Callable[[], None], str | None], str]:
    """Return the arguments with which a model is scored, and the alias that a version of it may get.

    Its own sampling settings have the overrides applied; the dataset is None unless it is overridden.
    """
    config = connect_for_model(model, overrides, more=SERVICES)

    from pipelines.checkpoints import lookup, references
    from pipelines.config import changed_sampling, override_settings
    from pipelines.training.resources import connect_ray

    config = lookup.judged_as_before(config, overrides, model)
    resolved = references.open_model(model, config)
    settings = changed_sampling(resolved.model.spec.sampling, overrides)
    other_data = bool({"data", "data.uri"} & override_settings(overrides).keys())
    dataset_uri = config.data.uri if other_data else None
    return (resolved, settings, config, terminal, partial(connect_ray, config), dataset_uri), config.registry.alias


def promote(
    model: Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@ALIAS; with --rollback its NAME")],
    alias: Annotated[str, typer.Option(help="The alias to move")],
    not_worse_than: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=finite,
            metavar="MARGIN",
            help="Accept a version that is at most this much worse in distance",
        ),
    ] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Give the alias back to the previous version")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Decide with other noise; record and change nothing")
    ] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Move an alias to a version if the gate allows it. Example: ddpm promote models:/digits/2 --alias champion"""
    from pipelines.checkpoints.lookup import check_form, check_name
    from pipelines.config import quoted_override

    name = model.removeprefix("models:/").split("/")[0].split("@")[0]
    if rollback:
        check_name(name)
    else:
        check_form(model)
    config = compose_connected([*(overrides or []), quoted_override("registry.alias", alias)])

    from pipelines import registry
    from pipelines.checkpoints import lookup
    from pipelines.training.resources import connect_ray

    if not rollback:
        config = lookup.judged_as_before(config, overrides or [], model)
    gate = registry.Gate(config, terminal, lambda: connect_ray(config), name, alias)
    with terminal.live():
        if rollback:
            verdict = gate.rollback(dry_run=dry_run)
        else:
            version = lookup.find_registered(model, config.tracking.uri)
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
    """Check that a version is the one that was scored, and who signed it. Example: ddpm verify
    models:/digits@champion"""
    from pipelines.checkpoints.lookup import check_form

    check_form(model)
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
            else ("failed", row.name, f"{row.figure} (required: {row.bound})", None)
            for row in found.rows
        ]
    )
    outcome = f"failed: {', '.join(found.failed)}" if found.failed else f"passed, {len(found.rows)} checks"
    terminal.stage("verify", f"{model} {outcome}")
    answer_json(as_json, found.to_plain())
    if not found.passed:
        raise typer.Exit(1)


def guard(
    overrides: Overrides = None,
    once: Annotated[bool, typer.Option("--once", help="Check once and exit")] = False,
    every: Annotated[float, typer.Option(min=0.1, callback=finite, help="Seconds between two checks")] = 2.0,
    as_json: Json = False,
) -> None:
    """Undo moves of aliases without the gate, until Ctrl-C. Example: ddpm guard --once"""
    config = compose_running(overrides, services=["s3", "mlflow"])

    from pipelines.registry import Guard, Logs, Trust, watch
    from pipelines.storage import Storage

    say, uri = partial(terminal.stage, "guard"), config.tracking.server
    logs = Logs(config.storage.root, Storage.of(config), Trust.of(config.registry), say)
    guarding = Guard(uri, logs, (config.registry.model, config.registry.alias), say)
    if once:
        guarding.settle()
    else:
        with suppress(KeyboardInterrupt):
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            say(f"aliases in MLflow at {uri}, by the verdicts at {logs.folder}; Ctrl-C stops it")
            watch(guarding, every)
    say(f"{len(guarding.corrections)} corrections; guarded: {', '.join(map('/'.join, sorted(guarding.guarded)))}")
    answer_json(
        as_json,
        {
            "guarded": ["/".join(alias) for alias in sorted(guarding.guarded)],
            "corrections": [asdict(done) for done in guarding.corrections],
        },
    )


def report(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="Name or MLflow ID of a run, models:/NAME/VERSION or models:/NAME@ALIAS"
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Output file; default: report-NAME.html")] = None,
    model: Annotated[
        bool, typer.Option("--model/--no-model", help="Draw a few pictures with the model and measure its error")
    ] = True,
    log: Annotated[
        bool, typer.Option("--log/--no-log", help="Also store the report as an artifact of the MLflow run")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write a report on a run or model into one HTML file. Example: ddpm report first --out first.html"""
    check_file("--out", out or Path("report-NAME.html"), "report.html")

    from pipelines.checkpoints.lookup import check_recorded

    check_recorded(reference)
    config = compose_running(overrides, services=["s3", "mlflow"])

    from pipelines import report as reports

    made = reports.make(reference, config, lambda text: terminal.stage("note", text), with_model=model)
    path = out or Path(made.file_name)
    path.write_text(made.html, encoding="utf-8")
    terminal.stage("report", f"{path}: {', '.join(made.sections)}")
    where = made.log() if log else None
    if where is not None:
        terminal.stage("mlflow", where)
    answer_json(as_json, {"path": str(path), "sections": list(made.sections), "mlflow": where})
