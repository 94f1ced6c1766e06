"""`ddpm init` and `ddpm plan`: a starter project, and a configuration for given images and a time budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.common import (
    SERVICES,
    Arguments,
    Json,
    answer_json,
    check_file,
    check_there,
    read_arguments,
    terminal,
)

if TYPE_CHECKING:
    from pipelines.plan.keep import StoredPlan

BUDGET = "30m"
STACK_S = 30.0
"""Seconds in which the local stack starts."""


def plan(
    arguments: Arguments = None,
    save: Annotated[
        Path | None, typer.Option("--save", help="File for the complete configuration, for use with --config")
    ] = None,
    as_json: Json = False,
) -> None:
    """Propose a configuration for images and a time budget. Example: ddpm plan photos/ budget=1h --save photos.yaml"""
    source, budget, overrides = read_arguments(arguments)
    if source is None:
        raise typer.BadParameter("name a folder of images, such as `ddpm plan photos budget=30m`")
    if save is not None:
        check_file("--save", save, "plan.yaml")

    from pipelines.config import from_dict
    from pipelines.plan.keep import to_yaml
    from pipelines.plan.services import services_config
    from pipelines.stack.connect import connect_running

    budget_s = read_budget(budget or BUDGET, overrides)
    check_there(source)
    services, missing = connect_running(services_config(overrides), os.environ, SERVICES)
    running = bool(services.storage.endpoint_url or services.tracking.uri)
    start_s = STACK_S if missing and not running else 2.0
    from pipelines.plan.make import make_plan

    made = make_plan(source, overrides, budget_s, services, terminal.stage, start_s=start_s)
    show_plan(made)
    from pipelines.doctor.estimates import check_estimates, numbers, require_fit

    config = from_dict(made.config)
    checks = check_estimates(config, here=not (config.cluster.address or os.environ.get("RAY_ADDRESS")))
    terminal.checks([(check.status, check.name, check.found, check.fix) for check in checks])
    require_fit(checks)
    if save is not None:
        save.write_text(to_yaml(made.plan, config))
        terminal.stage("saved", f"{save}: run it with `ddpm flow --config {save}`")
    answer_json(
        as_json, {**made.plan.to_dict(), "memory": numbers(checks), "saved": None if save is None else str(save)}
    )


def read_budget(budget: str, overrides: Sequence[str]) -> float:
    """Return a budget in seconds.

    Raises:
        ConfigError: it is not a time, or too short to train anything, unless overrides set the length.
    """
    from pipelines.config import override_settings
    from pipelines.plan.budget import parse_budget
    from pipelines.plan.clock import check_budget

    budget_s = parse_budget(budget)
    if not override_settings(overrides).get("training_s"):
        check_budget(budget_s)
    return budget_s


def show_plan(made: StoredPlan) -> None:
    """Show a plan: its choices with reasons, the division of time, and warnings."""
    from pipelines.plan.make import summary

    terminal.table([(line.title, line.value, line.reason) for line in made.plan.lines])
    terminal.stage("time", summary(made.plan))
    for text in made.plan.warnings:
        terminal.stage("note", text)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create; it must be empty or not exist")],
    as_json: Json = False,
) -> None:
    """Write a starter project for your own pictures. Example: ddpm init pets"""
    from pipelines.config.starter import write_starter

    written = write_starter(folder)
    for path in written:
        terminal.stage("written", str(path))
    terminal.stage("next", f"put pictures into {folder / 'photos'}, then: cd {folder} && make plan")
    answer_json(as_json, {"folder": str(folder), "files": [str(path) for path in written]})
