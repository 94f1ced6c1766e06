"""Score a model with given settings and register it as a new version, which serves these settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from ddpm.generate import Sampling
from pipelines import tracking
from pipelines.checkpoints import references
from pipelines.checkpoints.references import Resolved
from pipelines.config import CANDIDATE, Config
from pipelines.evaluation.scores import Scores
from pipelines.evaluation.scoring import digest_of, score_and_record
from pipelines.presentation.progress import Display
from pipelines.registry.package import register, run_of
from pipelines.signing import Signer, check_signing
from pipelines.storage import Storage
from pipelines.tracking import ModelVersion, links


def register_scored(
    resolved: Resolved,
    settings: Sampling,
    config: Config,
    display: Display,
    connect: Callable[[], None],
    *,
    dataset_uri: str | None = None,
) -> ModelVersion:
    """Score a model with settings as `ddpm evaluate` does, and register it as a new version that serves them.

    No guarded alias moves. Where a version has the same model with the same scores already, that one is returned.

    Args:
        settings: with which the samples are drawn, and which the version serves.
        config: `registry.model` names the registered model, `evaluation` says how it is scored.
        connect: connects this process to the Ray cluster; called only where something has to be computed.
        dataset_uri: of the data to compare with; by default, those that the model was trained on.

    Raises:
        RegistryError: no version can be made of the model.
        ModelError: a network that guides it does not exist or does not fit.
        DatasetError, ConfigError: the data cannot be used to score the model, or what is signed would not be believed.
    """
    check_signing(config.registry)
    run_of(resolved)  # before anything is drawn
    scores, _ = score_and_record(resolved, settings, config, display, connect, dataset_uri)
    dataset = dataset_uri or resolved.model.spec.lineage.get("dataset_uri", config.data.uri)
    return register_once(resolved, scores, config, display, dataset)


def find_version(uri: str, name: str, scores: Scores, model_digest: str) -> ModelVersion | None:
    """Return the newest version of a registered model that has these weights with these scores; None without one.

    Args:
        uri: address of the MLflow server.
        name: of the registered model.
        model_digest: under which the weights are known; see `digest_of`.
    """
    made = {"scores": json.dumps(scores.to_plain(), sort_keys=True), "model_digest": model_digest}
    return next((found for found in tracking.versions(uri, name) if made.items() <= found.tags.items()), None)


def is_candidate(uri: str, version: ModelVersion) -> bool:
    """Whether a version, or a newer one, has the alias `candidate`, which is the last step of registering it."""
    candidate = tracking.version(uri, version.name, alias=CANDIDATE)
    return candidate is not None and int(candidate.version) >= int(version.version)


def register_once(
    resolved: Resolved, scores: Scores, config: Config, display: Display, dataset_uri: str
) -> ModelVersion:
    """Return the version of a scored model, on the page of its run and with the alias `candidate`.

    It is made unless there is one of the same scores; what an interrupted call has left undone is done.

    Args:
        scores: of the model; the version serves the settings in them.
        dataset_uri: of the data that it was scored on.
    """
    storage = Storage.of(config)
    tracker, name = run_of(resolved), config.registry.model
    version = find_version(tracker.uri, name, scores, digest_of(resolved))
    if version is not None and is_candidate(tracker.uri, version):
        display.stage("register", f"skipped: this model is {name} version {version.version} already")
        return version
    display.stage("register", f"as {name}")
    if version is None:
        model = references.guided(resolved.model, Sampling.from_json(scores.sampling), config.tracking.uri, storage)
        version = register(replace(resolved, model=model), name, scores, dataset_uri, Signer.of(config.registry))
    page = links.version_page(name, version.version)
    where = f"as [{name} version {version.version}]({page}), which has its evidence and the gate's verdict."
    tracking.describe(tracker, {"Registered": where})
    tracking.set_alias(tracker.uri, name, CANDIDATE, version.version)
    return version
