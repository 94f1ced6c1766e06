"""Versions of registered models: finding them, and moving an alias through the gate."""

from __future__ import annotations

import json

from pipelines import tracking
from pipelines.evaluation.scores import Scores
from pipelines.registry.gate import gate
from pipelines.registry.package import RegistryError
from pipelines.registry.verdict import Verdict
from pipelines.tracking import ModelVersion


def find_version(uri: str, reference: str) -> ModelVersion:
    """Return the registered version that `models:/NAME/VERSION` names.

    Args:
        uri: address of the MLflow server.

    Raises:
        RegistryError: the reference is of another form, or there is no such version.
    """
    name, _, number = reference.removeprefix("models:/").partition("/")
    found = tracking.version(uri, name, number=number) if number.isdigit() else None
    if found is None:
        raise RegistryError(f"{reference} is not a registered version; write models:/NAME/VERSION")
    return found


def promote(uri: str, candidate: ModelVersion, alias: str) -> Verdict:
    """Move an alias to a version if the gate allows it, and record the verdict in the version's tags.

    Args:
        uri: address of the MLflow server.
    """
    current = tracking.version(uri, candidate.name, alias=alias)
    if current is not None and current.version == candidate.version:
        return Verdict(True, f"the alias {alias} is there already")
    scores = scores_of(candidate)
    if scores is None:
        verdict = Verdict(False, "the version carries no scores: evaluate and register it first")
    elif current is not None and scores_of(current) is None:
        verdict = Verdict(False, f"{current.uri} at the alias has no scores to compare with: move the alias by hand")
    else:
        verdict = gate(scores, None if current is None else scores_of(current))
    if verdict.passed:
        tracking.set_alias(uri, candidate.name, alias, candidate.version)
    tags = {f"gate.{alias}": str(verdict)}
    tracking.set_version_tags(uri, candidate.name, candidate.version, tags)
    return verdict


def scores_of(version: ModelVersion) -> Scores | None:
    """Return the scores in a version's tags, or None where it has none."""
    text = version.tags.get("scores")
    if text is None:
        return None
    plain = json.loads(text)
    return Scores.from_plain(plain)
