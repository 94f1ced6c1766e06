"""Score a model with given settings and register it as a new version, which serves these settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from ddpm.generate import Sampling
from pipelines import references, tracking
from pipelines.config import Config
from pipelines.display import Display
from pipelines.evaluation.scoring import score_and_record
from pipelines.references import Resolved
from pipelines.registry.package import RegistryError, digest_of, register
from pipelines.registry.sign import Signer, check_signing
from pipelines.storage import Storage
from pipelines.tracking import ModelVersion


def register_scored(
    resolved: Resolved,
    settings: Sampling,
    config: Config,
    storage: Storage,
    display: Display,
    connect: Callable[[], None],
    *,
    dataset_uri: str | None = None,
) -> ModelVersion:
    """Score a model with settings as `ddpm evaluate` does, and register it as a new version that serves them.

    No alias moves. Where a version has the same model with the same scores already, that one is returned.

    Args:
        settings: with which the samples are drawn, and which the version serves.
        config: `registry.model` names the registered model, `evaluation` says how it is scored.
        connect: connects this process to the Ray cluster; called only where something has to be computed.
        dataset_uri: of the data to compare with; by default, those that the model was trained on.

    Raises:
        RegistryError: the model has no run, to which a version belongs.
        ModelError: a network that guides it does not exist or does not fit.
        DatasetError, ConfigError: the data cannot be used to score the model, or what is signed would not be believed.
    """
    check_signing(config.registry)
    if resolved.tracker is None:
        raise RegistryError(
            f"{resolved.reference} has no MLflow run, to which a version belongs: register a model of a run "
            "(runs:/ID) or another version (models:/NAME/VERSION)"
        )
    uri, name = resolved.tracker.uri, config.registry.model
    resolved = replace(resolved, model=references.guided(resolved.model, settings, uri, storage))
    scores, _ = score_and_record(resolved, settings, config, storage, display, connect, dataset_uri)
    made = {"scores": json.dumps(scores.to_plain(), sort_keys=True), "model_digest": digest_of(resolved)}
    for found in tracking.versions(uri, name):
        if made.items() <= found.tags.items():
            display.stage("register", f"skipped: this model is {name} version {found.version} already")
            return found
    display.stage("register", f"as {name}")
    dataset = dataset_uri or resolved.model.spec.lineage.get("dataset_uri", config.data.uri)
    return register(resolved, name, scores, dataset, Signer.of(config.registry))
