"""Making of a plan: examine the source, measure the machine, propose, and compose the configuration."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from pipelines import tracking
from pipelines.config import Config, ConfigError, compose, override_settings
from pipelines.plan.budget import format_duration
from pipelines.plan.facts import MachineFacts, Plan, SourceFacts, UserOverrides
from pipelines.plan.keep import PlanBook, StoredPlan, command_key
from pipelines.plan.lines import NAME, name_line, source_name
from pipelines.plan.look import look
from pipelines.plan.measure import LongerMeasurement, Measurement, measure, measure_longer
from pipelines.plan.propose import propose
from pipelines.presentation.progress import StageNotice
from pipelines.remote.tasks import alive_nodes, finished
from pipelines.shards.ingest.sources import absolute, source_digest
from pipelines.storage import Storage
from pipelines.training.resources import connect_ray, is_free

STALLED_S = 900.0
"""Seconds after which a measurement on the Ray cluster, which takes a few, is given up."""


def make_plan(
    source: str,
    overrides: Sequence[str],
    budget_s: float,
    services: Config,
    notice: StageNotice,
    *,
    start_s: float = 0.0,
    compared: bool = False,
) -> StoredPlan:
    """Make the plan for a source; it has no key, because it is not stored.

    Args:
        source: source of images, as for `ingest`.
        overrides: overrides of the user, which the plan keeps.
        budget_s: seconds for everything.
        services: configuration with the Ray cluster that trains; without one, this machine does.
        notice: called with a stage and a line.
        start_s: seconds until the services answer.
        compared: as for `propose`.

    Raises:
        ConfigError, DatasetError: something is wrong or missing; raised before anything starts.
    """
    settings, began = override_settings(overrides), time.monotonic()
    notice("look", f"{source}: sizes, colours, labels, mirror images")
    facts = look(
        absolute(source),
        Storage.of(services),
        test_fraction=float(settings.get("data.test_fraction", 0.1)),
        encoder=settings.get("data.text_encoder", "auto"),
    )
    looked_s = time.monotonic() - began
    notice("measure", "training steps of several networks, for a few seconds")
    machine = _measured(facts, settings, budget_s, services, notice, start_s, compared=compared)
    machine = replace(machine, looking_s=looked_s + machine.looking_s)
    return compose_plan(facts, machine, budget_s, overrides, compared=compared)


def compose_plan(
    source: SourceFacts,
    machine: MachineFacts,
    budget_s: float,
    overrides: Sequence[str],
    *,
    key: str = "",
    compared: bool = True,
) -> StoredPlan:
    """Return the plan of these facts with its configuration. The arguments are those of `propose`.

    Raises:
        ConfigError: the plan and the user's settings are incompatible; the message says which.
    """
    settings = override_settings(overrides)
    plan = propose(source, machine, budget_s, settings, compared=compared)
    config = compose([*plan.overrides(), *overrides])
    return StoredPlan(key, plan, source, machine, config.model_dump(mode="json"))


def find_or_make(
    source: str,
    overrides: Sequence[str],
    budget_s: float,
    services: Config,
    storage: Storage,
    notice: StageNotice,
    *,
    start_s: float = 0.0,
) -> StoredPlan:
    """Return the stored plan of an equal, earlier command, which is resumed, or else make and store a new one.

    Arguments and errors are those of `make_plan`.
    """
    settings, began = override_settings(overrides), time.monotonic()
    book = PlanBook(storage, services.storage.root)
    where = absolute(source)
    key = command_key(source_digest(where, storage), budget_s, settings)
    found = book.find(str(settings.get("name", source_name(where))), key)
    if found is not None:
        notice("plan", f"resuming run {found.config['name']} with its saved plan")
        return found
    user, model = UserOverrides(settings), str(settings.get("registry.model", source_name(where)))
    own_model = model if user.sets("registry.model") else book.model_of(where, model)
    compared = _has_version(services, own_model, settings)
    start_s += time.monotonic() - began
    made = make_plan(source, overrides, budget_s, services, notice, start_s=start_s, compared=compared)
    made, run = replace(made, key=key), str(made.config["name"])
    own_run = run if user.sets("name") else book.free_name(run)
    if own_run != run:
        notice("plan", f"the run is named {own_run}, because another command has a run {run}")
    if own_model != model:
        notice(
            "plan",
            f"the model is named {own_model}, because {model} is of another source: registry.model={model} registers "
            "this run as a version of that model anyway, and registry.model=NAME chooses another name",
        )
    made = _renamed(made, own_run, own_model, overrides)
    book.add(made)
    return made


def find_plan(
    source: str, overrides: Sequence[str], budget_s: float, services: Config, storage: Storage
) -> StoredPlan | None:
    """Return the stored plan of an equal, earlier command, or None. The arguments are those of `make_plan`."""
    settings = override_settings(overrides)
    where = absolute(source)
    key = command_key(source_digest(where, storage), budget_s, settings)
    book = PlanBook(storage, services.storage.root)
    return book.find(str(settings.get("name", source_name(where))), key)


def _has_version(services: Config, model: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a version of a model has the alias; False if no MLflow server is configured."""
    if services.tracking.uri is None:
        return False
    alias = str(settings.get("registry.alias", services.registry.alias))
    return tracking.version(services.tracking.uri, model, alias=alias) is not None


def _renamed(made: StoredPlan, run: str, model: str, overrides: Sequence[str]) -> StoredPlan:
    """Return a plan with these names of its run and model, unless the user has set them."""
    named = name_line(run, model, UserOverrides(override_settings(overrides)))
    plan = replace(made.plan, lines=tuple(named if line.title == NAME else line for line in made.plan.lines))
    config = compose([*plan.overrides(), *overrides])
    return replace(made, plan=plan, config=config.model_dump(mode="json"))


def _measured(
    facts: SourceFacts,
    settings: dict[str, Any],
    budget_s: float,
    services: Config,
    notice: StageNotice,
    start_s: float,
    *,
    compared: bool,
) -> MachineFacts:
    """Measure the configured Ray cluster, or else this machine: all candidates, then the chosen one for longer."""
    address = settings.get("cluster.address") or os.environ.get("RAY_ADDRESS")
    if not address:  # the local stack's Ray has this machine
        machine = measure(facts, settings, budget_s, start_s=start_s)
        return measure_longer(facts, settings, budget_s, machine, compared=compared)
    connect_ray(services)
    nodes = alive_nodes()
    if not nodes:
        raise ConfigError(f"the Ray cluster at {address} has no nodes")
    where = f"the Ray cluster at {address}"
    run = partial(on_ray, notice=notice)
    machine = measure(facts, settings, budget_s, nodes=nodes, run=run, where=where, start_s=start_s)
    return measure_longer(facts, settings, budget_s, machine, compared=compared, run=run)


def on_ray(measurement: Measurement | LongerMeasurement, gpus: int, *, notice: StageNotice) -> Any:
    """Run a measurement in a Ray task, with a notice if it has to wait."""
    if not is_free({"CPU": 1.0, "GPU": float(gpus)}):
        notice("measure", "waiting for free CPUs: all of the Ray cluster are in use")
    call: Any = ray.remote(num_cpus=1, num_gpus=gpus)(_call)
    needs, what = {"CPU": 1.0, "GPU": float(gpus)}, "measure what a step takes"
    say = partial(notice, "measure")
    ((_, measured),) = finished([call.remote(measurement)], needs, what, stalled_s=STALLED_S, notice=say)
    return measured


def _call(measurement: Measurement | LongerMeasurement) -> Any:
    return measurement()


def summary(plan: Plan) -> str:
    """Return the division of a plan's budget in one line."""
    parts = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in plan.seconds.items())
    return f"{format_duration(plan.total_s)} of {format_duration(plan.budget_s)}: {parts}"
