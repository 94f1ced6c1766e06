"""Make a model version: the model, its evidence and the code that it needs, signed, in the run that it came from.

A version is registered with the scores of the settings that it serves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.generate import Sampling
from ddpm.inference import COLUMNS, parameters
from ddpm.model import TEXT_ENCODER, Model, save_guides, save_model
from pipelines import tracking
from pipelines.checkpoints import references
from pipelines.checkpoints.references import Resolved
from pipelines.config import CANDIDATE, Config
from pipelines.environment.scratch import temporary_folder
from pipelines.evaluation.scores import Scores
from pipelines.evaluation.scoring import digest_of, score_and_record
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Display
from pipelines.registry.evidence import (
    COMPILED,
    MODEL,
    PACKAGE,
    SERVED_HERE,
    SIGNATURE,
    Evidence,
    code_files,
    file_digests,
    packages,
    requirements,
)
from pipelines.registry.probe import draw_probe
from pipelines.remote.spread import OverRay, obstacle_to_tasks
from pipelines.shards.audit.contents import plain_contents, trained_contents
from pipelines.shards.audit.recorded import InThreads, TarReading
from pipelines.shards.index import DatasetError
from pipelines.shards.text import is_path, local_encoder
from pipelines.signing import Signer, check_signing
from pipelines.storage import Storage, StorageError, layout
from pipelines.tracking import ModelVersion, Pyfunc, Tracker, links


class RegistryError(PipelineError):
    """There is no such model version in the registry, or none can be made."""


def register(
    resolved: Resolved,
    name: str,
    scores: Scores,
    dataset_uri: str,
    signer: Signer,
    training_data: Sequence[dict[str, Any]] = (),
) -> ModelVersion:
    """Make a version of a model with the settings that it was scored with.

    Args:
        resolved: the model, of a run or of another version, with the networks that guide it.
        name: of the registered model.
        scores: of the model.
        dataset_uri: of the data that it was scored on.
        training_data: what the data hold that it was trained on.

    Raises:
        RegistryError: the model has no run that the version could belong to, or not the networks that guide it.
        ProbeError: the model draws something that is not a number.
    """
    tracker = run_of(resolved)
    with temporary_folder("package") as scratch:
        encoder = bundled_encoder(resolved.text_encoder) if resolved.model.spec.network.text_dim else None
        evidence = write_version(
            scratch, resolved.model, scores, digest_of(resolved), dataset_uri, signer, encoder, training_data
        )
        images_seen = int(evidence.lineage.get("images_seen", 0))
        pyfunc = pyfunc_of(scratch, resolved.model.spec.shape, evidence.packages)
        model_id = tracking.log_pyfunc(tracker, pyfunc, images_seen)
    return tracking.register(tracker, name, model_id, evidence.tags())


def run_of(resolved: Resolved) -> Tracker:
    """Return the run of a model, to which a version of it belongs.

    Raises:
        RegistryError: it has none.
    """
    if resolved.tracker is None:
        raise RegistryError(
            f"{resolved.reference} has no MLflow run, to which a version belongs: register a model of a run "
            "(runs:/ID) or another version (models:/NAME/VERSION)"
        )
    return resolved.tracker


def bundled_encoder(name: str | None) -> Path | None:
    """Return the folder of the text encoder that a version of a model on text carries; None where a hub has it.

    A folder is no address that a server could read, so the version carries what lies there.

    Args:
        name: of the encoder that embedded the model's training data; None where that is not known.

    Raises:
        RegistryError: the folder is not here.
        EvidenceError: what reads encoders is not installed.
    """
    packages(text=True)
    folder = None if name is None else local_encoder(name)
    if name is not None and folder is None and is_path(name):
        raise RegistryError(
            f"the training data's captions were embedded by the text encoder {name}, which a version carries, and "
            "there is no such folder here: name the place where it is (data.text_encoder), or its name on a hub"
        )
    return folder


def write_version(
    folder: Path,
    model: Model,
    scores: Scores,
    model_digest: str,
    dataset_uri: str,
    signer: Signer,
    text_encoder: Path | None = None,
    training_data: Sequence[dict[str, Any]] = (),
) -> Evidence:
    """Write what a version is made of: the signed folder `MODEL`, and beside it `SIGNATURE`; return its evidence.

    The signed folder holds the model with the settings that it was scored with, the networks that guide it, its text
    encoder where that is no hub's, pictures that it draws, and the evidence.

    Args:
        folder: an empty folder.
        model: with the networks that guide it.
        scores: of the model.
        model_digest: under which its weights are known; see `digest_of`.
        dataset_uri: of the data that it was scored on.
        text_encoder: folder of its text encoder, to be carried.
        training_data: what the data hold that it was trained on.

    Raises:
        RegistryError: the model has not the networks that guide it.
        ProbeError: the model draws something that is not a number.
    """
    model = replace(model, spec=replace(model.spec, sampling=Sampling.from_json(scores.sampling)))
    _check_guides(model)
    inside = folder / MODEL
    save_model(inside, model.spec, model.network.state_dict())
    save_guides(inside, model)
    if text_encoder is not None:
        shutil.copytree(text_encoder, inside / TEXT_ENCODER, ignore=shutil.ignore_patterns(".*", COMPILED))
    probe = draw_probe(model, inside)
    evidence = Evidence(
        scores=scores,
        lineage=dict(model.spec.lineage),
        model_digest=model_digest,
        files=file_digests(inside),
        dataset_uri=dataset_uri,
        code=code_files(),
        packages=packages(text=model.spec.network.text_dim > 0),
        probe=probe,
        training_data=list(training_data),
    )
    (inside / layout.EVIDENCE).write_text(evidence.to_json())
    signer.sign_folder(inside, folder / SIGNATURE)
    return evidence


def pyfunc_of(folder: Path, shape: tuple[int, int, int], releases: Mapping[str, str]) -> Pyfunc:
    """Return the pyfunc that is made of what `write_version` wrote to a folder, and of our code.

    Args:
        shape: (C, H, W) of an image.
        releases: of the packages, as the evidence has them.
    """
    channels, height, width = shape
    return Pyfunc(
        artifacts={"model": folder / MODEL, "signature": folder / SIGNATURE},
        code=SERVED_HERE,
        packages=(PACKAGE,),
        requirements=requirements(releases),
        columns=COLUMNS,
        output=np.zeros((2, height, width, channels), dtype=np.uint8),
        params=parameters(),
    )


def _check_guides(model: Model) -> None:
    """Check that a model has the networks that its settings name.

    Raises:
        RegistryError: it has not.
    """
    for name, reference in model.spec.sampling.guides.items():
        if getattr(model, name) is None:
            raise RegistryError(
                f"the settings that were scored name guidance.{name} = {reference}, and the model was loaded without "
                "it: a version carries the networks that guide it"
            )


def register_scored(
    resolved: Resolved,
    settings: Sampling,
    config: Config,
    display: Display,
    connect: Callable[[], None],
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
    tracker, name = run_of(resolved), config.registry.model
    version = find_version(tracker.uri, name, scores, digest_of(resolved))
    if version is not None and is_candidate(tracker.uri, version):
        display.stage("register", f"skipped: this model is {name} version {version.version} already")
        return version
    display.stage("register", f"as {name}")
    if version is None:
        model = references.guided(
            resolved.model, Sampling.from_json(scores.sampling), config.tracking.uri, Storage.of(config)
        )
        contents = contents_of(model.spec.lineage, Storage.of(config), display)
        resolved, signer = replace(resolved, model=model), Signer.of(config.registry)
        version = register(resolved, name, scores, dataset_uri, signer, contents)
    page = links.version_page(name, version.version)
    where = f"as [{name} version {version.version}]({page}), which has its evidence and the gate's verdict."
    tracking.describe(tracker, {"Registered": where})
    tracking.set_alias(tracker.uri, name, CANDIDATE, version.version)
    return version


def contents_of(lineage: Mapping[str, Any], storage: Storage, display: Display) -> list[dict[str, Any]]:
    """Return what the data hold that a model was trained on, as JSON types, by its lineage.

    Where that cannot be read any more, it is said, and nothing is returned.
    """
    if "stream_digest" not in lineage:
        return []
    uris = [source["uri"] for source in lineage.get("sources", ())] or [lineage["dataset_uri"]]
    obstacle = obstacle_to_tasks(uris)
    runner = InThreads(because=obstacle) if obstacle is not None else OverRay("read tars")
    reading = TarReading(runner, display.counter("register", "MiB"))
    try:
        return plain_contents(trained_contents(lineage, storage, reading))
    except (DatasetError, StorageError) as error:
        display.stage("register", f"without a summary of the training data: {error}")
        return []
