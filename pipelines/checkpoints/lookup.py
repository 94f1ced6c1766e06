"""Resolve a MODEL reference by its form and by what is recorded of it, without loading a model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm.model import (
    read_spec,
)
from pipelines import tracking
from pipelines.checkpoints import (
    ModelError,
)
from pipelines.config import (
    MODEL_NAME,
    MODEL_NAME_RULE,
    NAME,
    Config,
    from_dict,
    parse_overrides,
)
from pipelines.storage import layout
from pipelines.tracking import ModelVersion, Tracker, TrackingError


class ReferenceFormError(ModelError):
    """A malformed MODEL reference."""

    exit_code = 2


RUN = re.compile(r"runs:/([0-9a-f]+)(?:/(\d+|best))?(?:/sigma_rel=(0?\.\d+))?")
VERSION = re.compile(rf"models:/({MODEL_NAME})(?:@([^/@]+)|/(\d{{1,10}}))")
FORMS = {
    "runs:/": (RUN, "runs:/ID, runs:/ID/IMAGES or runs:/ID/best, and /sigma_rel=0.1 after it"),
    "models:/": (
        VERSION,
        f"models:/NAME@alias or models:/NAME/VERSION, with a number of up to ten digits; {MODEL_NAME_RULE}",
    ),
}


def check_form(reference: str) -> None:
    """Check the form of a reference to a run or a version.

    Raises:
        ReferenceFormError: it is not.
    """
    for start, (form, words) in FORMS.items():
        if reference.startswith(start.rstrip("/")) and form.fullmatch(reference) is None:
            raise ReferenceFormError(f"{reference}: write {words}")


def check_name(name: str) -> None:
    """Check the name of a registered model before the registry is asked for it.

    Raises:
        ReferenceFormError: it cannot.
    """
    if not re.fullmatch(MODEL_NAME, name):
        raise ReferenceFormError(f"{name!r}: {MODEL_NAME_RULE}")


def check_recorded(reference: str) -> None:
    """Check that a reference may be one of a run or of a version, before MLflow is asked for it.

    Raises:
        ReferenceFormError: it cannot be one.
    """
    if reference.startswith("models:"):
        check_form(reference)
    elif not re.fullmatch(NAME, reference.removeprefix("runs:/")):
        raise ReferenceFormError(
            f"{reference} names no run: write its name, as `ddpm runs` shows it, its MLflow ID, models:/NAME/VERSION "
            "or models:/NAME@ALIAS"
        )


def find_registered(reference: str, tracking_uri: str | None) -> ModelVersion:
    """Return the version that models:/NAME@alias or models:/NAME/VERSION names.

    Raises:
        ModelError: there is none; the message lists those of that name.
    """
    uri = needs_server(tracking_uri, reference)
    match = VERSION.fullmatch(reference)
    if match is None:
        raise ReferenceFormError(f"{reference}: write {FORMS['models:/'][1]}")
    name, alias, number = match.groups()
    found = tracking.version(uri, name, alias=alias, number=number)
    if found is None:
        there = tracking.versions(uri, name)
        listed = ", ".join(v.version + "".join(f" @{a}" for a in v.aliases) for v in there) or "no version of that name"
        raise ModelError(f"{reference} is not in the registry at {uri}; it has: {listed}")
    return found


COMPARING = (
    *("n", "seed", "seeds", "evaluator", "evaluator_passes", "weights"),
    *("encoder_size", "encoder_mean", "encoder_std"),
)
"""Settings of an evaluation without which its distances do not compare with those of another one."""
JUDGING = {"evaluation": (*COMPARING, "batch_size", "likelihood_images"), "registry": ("model", "n")}
"""Settings of a run, by section, that decide how its model is scored, what it is registered as, and how many samples
the gate compares."""


def judged_as_before(config: Config, overrides: Sequence[str], reference: str) -> Config:
    """Return the configuration with the settings by which a model was scored and registered.

    So a version that is made of it has scores that can be compared with those that are there. These settings are those
    of its run; a version that was registered later with others has its own. What overrides set is left alone, and so is
    everything for a model in a folder.

    Args:
        config: of the overrides, with the address of the MLflow server.
        reference: the model; a version is registered under its own name again.

    Raises:
        ModelError: there is no such version or run.
    """
    if not reference.startswith(("models:/", "runs:/")):
        return config
    uri = needs_server(config.tracking.uri, reference)
    recorded: dict[str, Any]
    if reference.startswith("models:/"):
        version = find_registered(reference, uri)
        recorded = _recorded(Tracker(uri, version.run_id)) | _scored(version) | {"registry.model": version.name}
    else:
        recorded = _recorded(tracking.get_run(uri, reference.removeprefix("runs:/").partition("/")[0]))
    given = {str(override.key_or_group) for override in parse_overrides(overrides)}
    plain = config.model_dump(mode="json")
    for key, value in recorded.items():
        section, _, field = key.partition(".")
        if not {section, key} & given:
            plain[section][field] = value
    return from_dict(plain)


def scored_alike(config: Config, tracker: Tracker) -> bool:
    """Return whether a configuration scores models as a run does, so that their distances are comparable."""
    ours = config.evaluation.model_dump(mode="json")
    recorded = {key.removeprefix("evaluation."): value for key, value in _recorded(tracker).items()}
    return all(ours[name] == recorded[name] for name in COMPARING if name in recorded)


def _recorded(tracker: Tracker) -> dict[str, Any]:
    """Return the `JUDGING` settings of a run, flat; of an earlier release those that it had."""
    try:
        stored = tracking.recorded_config(tracker) if layout.CONFIG in tracker.names() else {}
    except TrackingError as error:
        if error.status not in (400, 404):
            raise
        stored = {}  # the run is deleted, and its version is not
    return {
        f"{section}.{name}": stored[section][name]
        for section, names in JUDGING.items()
        for name in names
        if name in stored.get(section, {})
    }


def _scored(version: ModelVersion) -> dict[str, Any]:
    """Return how many samples of which noise a version was scored by, and by which of the dataset's own evaluators."""
    scores = json.loads(version.tags.get("scores", "{}"))
    if not scores:
        return {}
    found = {
        "evaluation.n": scores["n"],
        "evaluation.seed": scores["seeds"][0],
        "evaluation.seeds": len(scores["seeds"]),
    }
    own = scores["evaluator"] in ("classifier", "contrastive")  # others are named together with their weights
    return found | ({"evaluation.evaluator": scores["evaluator"]} if own else {})


def check_exists(reference: str, tracking_uri: str | None) -> None:
    """Check that a MODEL exists, without reading its weights.

    Args:
        tracking_uri: address of the MLflow server; None where only folders can be checked.

    Raises:
        ModelError: it does not; the message lists what exists.
    """
    if reference.startswith("models:/"):
        if tracking_uri is not None:
            find_registered(reference, tracking_uri)
    elif reference.startswith("runs:/"):
        if tracking_uri is not None:
            tracking.get_run(tracking_uri, reference.removeprefix("runs:/").partition("/")[0])
    else:
        try:
            read_spec(model_folder(reference))
        except ValueError as error:
            raise ModelError(f"{reference}: {error}") from error


def needs_server(tracking_uri: str | None, reference: str) -> str:
    """Return the address of the MLflow server that a reference is looked up in.

    Raises:
        ModelError: there is none.
    """
    if tracking_uri is None:
        raise ModelError(
            f"{reference} needs an MLflow server: set tracking.uri or MLFLOW_TRACKING_URI, or run `ddpm up`"
        )
    return tracking_uri


def model_folder(reference: str) -> Path:
    """Return the folder that a reference names.

    Raises:
        ModelError: it names none, nor anything else that a model can be named by.
    """
    folder = Path(reference.removeprefix("file://"))
    if not folder.is_dir():
        raise ModelError(
            f"{reference} names no model; MODEL is "
            "runs:/ID[/IMAGES|/best][/sigma_rel=WIDTH], models:/NAME@alias, models:/NAME/VERSION or a folder"
        )
    return folder
