"""`ddpm flow`: every stage from images to a registered model."""

from __future__ import annotations

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
    compose_connected,
    connect,
    quoted_override,
    read_arguments,
    show_verdict,
    terminal,
)
from pipelines.cli.plan import BUDGET, show_plan
from pipelines.lineage import code_lineage

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.plan.keep import StoredPlan


def flow(
    arguments: Arguments = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="A whole configuration, such as `ddpm plan --save` writes")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for images and a grid of the registered model")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Ingest, train, evaluate, register; finished stages are skipped. Example: ddpm flow photos/ budget=30m

    With a SOURCE and no +experiment, size, network and length are chosen for the images, this machine and the budget.
    """
    terminal.quiet = quiet
    began = time.monotonic()
    source, budget, overrides = read_arguments(arguments)
    made: StoredPlan | None = None
    if config_file is not None:
        from pipelines.config import read_config

        if source is not None or budget is not None:
            raise typer.BadParameter("--config has a source and a length of its own: leave SOURCE and budget out")
        config = connect(read_config(config_file, overrides), SERVICES)
    elif source is None:
        if budget is not None:
            raise typer.BadParameter(f"budget={budget} is for a SOURCE, such as `ddpm flow photos budget={budget}`")
        config = compose_connected(overrides)
    elif any(text.lstrip("+").startswith("experiment=") for text in overrides):
        if budget is not None:
            raise typer.BadParameter("an experiment has a length of its own, images=…: leave budget out")
        config = compose_connected([*overrides, quoted_override("data.source", source)])
    else:
        config, made = _planned(source, budget or BUDGET, overrides, began)

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
    if made is not None:
        answer |= _what_it_took(made, overrides, time.monotonic() - began)
    if out is not None:
        resolved = references.resolve(result.version.uri, tracking_uri=config.tracking.uri, storage=Storage.of(config))
        answer["grid"] = str(write_samples(resolved, out, 8, (result.scores.prompts or {}).get("examples")))
        terminal.stage("grid", answer["grid"])
    terminal.stage("mlflow", result.tracker.url)
    answer_json(as_json, answer)


def _planned(source: str, budget: str, overrides: list[str], began: float) -> tuple[Config, StoredPlan]:
    """Return the connected configuration of the plan for a source, and the plan, which is shown."""
    from pipelines.config import from_dict
    from pipelines.plan.budget import parse_budget
    from pipelines.plan.services import services_config

    budget_s = parse_budget(budget)
    services = connect(services_config(overrides), SERVICES)  # before ray is imported

    from pipelines.plan.make import find_or_make
    from pipelines.storage import Storage

    start_s = time.monotonic() - began
    storage = Storage.of(services)
    made = find_or_make(source, overrides, budget_s, services, storage, terminal.stage, start_s=start_s)
    show_plan(made)
    config = from_dict(made.config)
    found = {"storage": services.storage, "tracking": config.tracking.model_copy(update={"uri": services.tracking.uri})}
    found["cluster"] = config.cluster.model_copy(update={"address": services.cluster.address})
    return config.model_copy(update=found), made


def _what_it_took(made: StoredPlan, overrides: list[str], took_s: float) -> dict[str, object]:
    """Show how long a planned flow took, and what more time would buy; return both for `--json`."""
    from pipelines.config import override_settings
    from pipelines.plan.advice import more_time
    from pipelines.plan.budget import spoken

    terminal.stage("time", f"{spoken(took_s)} of {spoken(made.plan.budget_s)}, {spoken(made.plan.total_s)} expected")
    more = more_time(made.plan, made.source, made.machine, override_settings(overrides))
    if more:
        terminal.stage("more", more)
    return {"plan": made.plan.to_dict(), "took_s": took_s, "more": more}
