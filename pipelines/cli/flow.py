"""`ddpm flow`: every stage from images to a registered model."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.common import (
    SERVICES,
    Arguments,
    Json,
    Quiet,
    answer_json,
    check_there,
    compose,
    connect,
    find_running,
    new_folder,
    read_arguments,
    show_verdict,
    terminal,
)
from pipelines.cli.plan import BUDGET, read_budget, show_plan
from pipelines.environment.lineage import code_lineage
from pipelines.flow import GRAPH, Site, select
from pipelines.flow.stage import INGEST, REGISTER

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.flow.walk import FlowResult
    from pipelines.plan.keep import StoredPlan

_UNREGISTERED = tuple(spec.name for spec in select(GRAPH, REGISTER.name, None)[0])
"""Stages before the registration of the model."""


def flow(
    arguments: Arguments = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="A complete configuration, such as one from `ddpm plan --save`")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", callback=new_folder, help="Folder for sample images and a grid of the registered model"),
    ] = None,
    first: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Start with this stage; the results of earlier stages must exist"),
    ] = None,
    last: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and why; start nothing")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Ingest, train, evaluate, register; finished stages are skipped. Example: ddpm flow photos/ budget=30m

    With a SOURCE and no +experiment, image size, network and length are chosen for the images, machine and budget.
    STAGE is ingest, train, evaluator, evaluate, register or gate.
    """
    terminal.quiet = quiet
    began = time.monotonic()
    select(GRAPH, first, last)  # before anything starts
    if out is not None and (dry_run or last in _UNREGISTERED):
        raise typer.BadParameter(
            "--out draws from the registered model: omit --dry-run, and --until with a stage before register"
        )
    later = first not in (None, INGEST.name)
    config, made, overrides = _configured(arguments, config_file, began, dry_run=dry_run, begins_later=later)

    from pipelines.flow.graph import stages
    from pipelines.flow.walk import preview, walk
    from pipelines.storage import Storage

    site = Site(Storage.of(config), code_lineage(), terminal, _training_ends(made, began))
    if dry_run:
        found = preview(stages(config), site, first, last)
        for stage in found:
            what = "will run" if stage.runs else "will be skipped"
            if stage.beside:
                what += f" in parallel with {' and '.join(stage.beside)} if the cluster has room for both"
            terminal.stage(stage.name, f"{what}: {stage.reason}")
        answer_json(as_json, {"stages": [dataclasses.asdict(stage) for stage in found]})
        return
    with terminal.live():
        result = walk(stages(config), site, first, last)
    answer = result.to_dict()
    _show(result, config)
    if made is not None and last is None:
        trained = None if result.results.run is None else result.results.run.images_seen
        answer |= _what_it_took(made, overrides, time.monotonic() - began, trained)
    if out is not None:
        answer["grid"] = _drawn(result, config, out)
        terminal.stage("grid", answer["grid"])
    if "mlflow" in answer:
        terminal.stage("mlflow", answer["mlflow"])
    if result.results.version is not None:
        terminal.stage("report", f"`ddpm report {result.results.version.uri}` writes all of this into one HTML file")
    answer_json(as_json, answer)


def _show(result: FlowResult, config: Config) -> None:
    """Show the scores, the verdict and the version of a flow, as far as they exist."""
    found = result.results
    if found.evaluation is not None:
        for name, text in found.evaluation.lines():
            terminal.stage(name, text)
    if found.champion is not None and found.version is not None:
        show_verdict(found.champion, failed_only=True)
        terminal.stage("registry", f"{found.version.uri}, alias {config.registry.alias} {found.champion.outcome}")
    elif found.version is not None:
        terminal.stage("registry", found.version.uri)


def _drawn(result: FlowResult, config: Config, out: Path) -> str:
    """Draw images from the registered model into a folder, and return the path of their grid."""
    from pipelines.checkpoints import references
    from pipelines.inference.files import write_samples

    version, scores = result.results.version, result.results.evaluation
    assert version is not None
    assert scores is not None
    resolved = references.open_model(version.uri, config)
    return str(write_samples(resolved, out, 8, (scores.prompts or {}).get("examples")))


def _configured(
    arguments: list[str] | None, config_file: Path | None, began: float, *, dry_run: bool, begins_later: bool
) -> tuple[Config, StoredPlan | None, list[str]]:
    """Return the configuration of the arguments, its plan if it has one, and the overrides.

    Args:
        began: start of the command, by the monotonic clock.
        dry_run: whether services are only looked for and not started.
        begins_later: whether the flow starts after the ingest, so that the source may be gone.
    """
    source, budget, overrides = read_arguments(arguments)

    def connected(config: Config) -> Config:
        if not begins_later:
            check_there(config.data.source)
        return find_running(config, ["s3", "mlflow"], ["ray"]) if dry_run else connect(config, SERVICES)

    if config_file is not None:
        from pipelines.config import read_config

        if source is not None or budget is not None:
            raise typer.BadParameter("--config has its own source and length: omit SOURCE and budget")
        return connected(read_config(config_file, overrides)), None, overrides
    if source is None:
        if budget is not None:
            raise typer.BadParameter(f"budget={budget} is for a SOURCE, such as `ddpm flow photos budget={budget}`")
        return connected(compose(overrides)), None, overrides
    if any(text.lstrip("+").startswith("experiment=") for text in overrides):
        if budget is not None:
            raise typer.BadParameter("an experiment has its own length, images=…: omit budget")
        from pipelines.config import quoted_override

        return connected(compose([*overrides, quoted_override("data.source", source)])), None, overrides
    if dry_run:
        return _planned_before(source, budget or BUDGET, overrides), None, overrides
    return *_planned(source, budget or BUDGET, overrides, began), overrides


def _planned(source: str, budget: str, overrides: list[str], began: float) -> tuple[Config, StoredPlan]:
    """Make, show and return the plan for a source, with its connected configuration."""
    from pipelines.config import from_dict
    from pipelines.plan.services import services_config

    budget_s = read_budget(budget, overrides)
    check_there(source)
    services = connect(services_config(overrides), SERVICES)  # before ray is imported

    from pipelines.plan.make import find_or_make
    from pipelines.storage import Storage

    start_s = time.monotonic() - began
    storage = Storage.of(services)
    made = find_or_make(source, overrides, budget_s, services, storage, terminal.stage, start_s=start_s)
    show_plan(made)
    return _at_services(from_dict(made.config), services), made


def _planned_before(source: str, budget: str, overrides: list[str]) -> Config:
    """Return the connected configuration of the plan of an earlier, equal command; start nothing.

    Raises:
        ConfigError: there is no such plan, and making one would measure this machine.
    """
    from pipelines.config import ConfigError, from_dict
    from pipelines.plan.services import services_config

    budget_s = read_budget(budget, overrides)
    check_there(source)
    services = find_running(services_config(overrides), ["s3", "mlflow"], ["ray"])

    from pipelines.plan.make import find_plan
    from pipelines.storage import Storage

    made = find_plan(source, overrides, budget_s, services, Storage.of(services))
    if made is None:
        raise ConfigError(
            f"--dry-run: there is no plan for {source} and budget={budget} yet, and making one measures this machine: "
            f"`ddpm plan {source} budget={budget} --save plan.yaml`, then `ddpm flow --config plan.yaml --dry-run`"
        )
    show_plan(made)
    return _at_services(from_dict(made.config), services)


def _at_services(config: Config, services: Config) -> Config:
    found = {"storage": services.storage, "tracking": config.tracking.model_copy(update={"uri": services.tracking.uri})}
    found["cluster"] = config.cluster.model_copy(update={"address": services.cluster.address})
    return config.model_copy(update=found)


def _training_ends(made: StoredPlan | None, began: float) -> float | None:
    """Return the planned end of the training, by the monotonic clock; None if the plan does not set one."""
    if made is None or "training_s" not in made.plan.settings:
        return None
    from pipelines.plan.clock import training_ends_s

    return began + training_ends_s(made.plan)


def _what_it_took(made: StoredPlan, overrides: list[str], took_s: float, trained: int | None) -> dict[str, object]:
    """Show how long a planned flow took, and what a larger budget would give; return both for `--json`.

    Args:
        trained: images that the training has seen.
    """
    from pipelines.config import override_settings
    from pipelines.plan.advice import more_time
    from pipelines.plan.budget import format_duration

    took, budget, expected = map(format_duration, (took_s, made.plan.budget_s, made.plan.total_s))
    terminal.stage("time", f"{took} of {budget}, {expected} expected")
    more = more_time(made.plan, made.source, made.machine, override_settings(overrides), trained)
    if more:
        terminal.stage("more", more)
    return {"plan": made.plan.to_dict(), "took_s": took_s, "more": more}
