"""Loading of models by MODEL reference (of a run, the registry or a folder), and the model description of a run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm.generate import Sampling
from ddpm.model import (
    TEXT_ENCODER,
    Model,
    ModelSpec,
    load_classifier,
    load_model,
    read_spec,
    save_model,
    stored_weights,
)
from ddpm.models.classifier import NoisyClassifier
from ddpm.prediction import Parameterization
from ddpm.tensor_files import tensors_digest
from pipelines import tracking
from pipelines.checkpoints import (
    BEST,
    ModelError,
    Published,
    best_published,
    fetch_published,
    list_published,
    reconstruct_average,
)
from pipelines.checkpoints.lookup import FORMS, RUN, ReferenceFormError, find_registered, model_folder, needs_server
from pipelines.config import (
    Config,
    network_config,
    sampling,
)
from pipelines.environment.scratch import scratch_folder, temporary_folder
from pipelines.shards.index import Dataset
from pipelines.shards.quarantine import Quarantine, stream_digest
from pipelines.storage import Storage, layout
from pipelines.tracking import ModelVersion, Tracker


def model_spec(
    config: Config, dataset: Dataset, lineage: Mapping[str, Any], quarantine: Quarantine | None = None
) -> ModelSpec:
    """Return the model description of a run, which is stored as `model.json`."""
    data = {
        "dataset_digest": dataset.digest,
        "dataset_uri": dataset.uri,
        "stream_digest": stream_digest(dataset, quarantine),
        "quarantined": 0 if quarantine is None else len(quarantine.excluded),
        **mixture_lineage(dataset),
    }
    return ModelSpec(
        network=network_config(config),
        schedule=config.schedule.model_dump(),
        prediction=config.objective.prediction,
        image_size=dataset.image_size,
        task=config.task,
        classes=dataset.classes if _has_classes(config) else (),
        sampling=sampling(config),
        lineage={"run": config.name, **data, **lineage},
    )


def mixture_lineage(dataset: Dataset) -> dict[str, Any]:
    """Return what a model's description says of a mixture; nothing for a dataset alone.

    Returns:
        `sources`, each with its name, address, digest of its stream and weights by first sample; and
        `reference_digest`, of the stream at `dataset_uri`, by whose images samples are judged.
    """
    if not dataset.sources:
        return {}
    sources = [
        {
            "name": source.name,
            "uri": source.uri,
            "stream_digest": source.digest,
            "weights": {str(n): weight for n, weight in source.weights.items()},
        }
        for source in dataset.sources
    ]
    return {"sources": sources, "reference_digest": dataset.reference_digest}


def _has_classes(config: Config) -> bool:
    """Return whether the model of a run knows classes; a classifier learns either these or captions."""
    if config.task == "classifier":
        return config.model.text_dim == 0
    return bool(config.model.class_conditional)


def guided(model: Model, settings: Sampling, tracking_uri: str | None, storage: Storage) -> Model:
    """Return the model with the guiding networks that the settings name.

    Those that came in the model's own folder stay where the settings name what its stored ones do.

    Raises:
        ModelError: a guiding network does not exist or does not fit the model; the message says what differs.
    """
    for name, reference in settings.guides.items():
        if getattr(model, name) is None or model.spec.sampling.guides.get(name) != reference:
            found: Any = {name: GUIDES[name](model, reference, tracking_uri, storage)}
            model = replace(model, **found)
    return model


def classifier_for(model: Model, reference: str, tracking_uri: str | None, storage: Storage) -> NoisyClassifier:
    """Return the classifier of noisy images that a MODEL reference names, for classifier guidance of a model.

    Raises:
        ModelError: the classifier does not exist, or its classes or texts, image shape or noise schedule differ from
            the model's.
    """
    with _fetched(reference, tracking_uri, storage) as found:
        try:
            spec, classifier = load_classifier(found.folder)
        except ValueError as error:
            raise ModelError(f"guidance.classifier = {reference}: {error}") from error
    if classifier.text:
        _same("guidance.classifier", reference, _of_texts(spec), _of_texts(model.spec))
    else:
        _same("guidance.classifier", reference, _of_classes(spec), _of_classes(model.spec))
    return classifier


def weaker_for(model: Model, reference: str, tracking_uri: str | None, storage: Storage) -> Model:
    """Return the weaker model that a MODEL reference names, for autoguidance of a model.

    Raises:
        ModelError: the weaker model does not exist, or its classes, image shape or noise schedule differ.
    """
    weak = resolve(reference, tracking_uri=tracking_uri, storage=storage).model
    _same("guidance.weak", reference, _of_classes(weak.spec), _of_classes(model.spec))
    return weak


GUIDES: dict[str, Callable[..., Any]] = {"classifier": classifier_for, "weak": weaker_for}
"""Guidance setting that names a network -> function that loads it."""


def _of_classes(spec: ModelSpec) -> dict[str, Any]:
    """Return the properties that a class guide or a weaker model has to share with the guided model."""
    return {name: getattr(spec, name) for name in ("schedule", "classes", "shape")}


def _of_texts(spec: ModelSpec) -> dict[str, Any]:
    """Return the properties that a text guide has to share with the guided model; the encoder where both record it."""
    return {
        "schedule": spec.schedule,
        "shape": spec.shape,
        "text_dim": spec.network.text_dim,
        "text_encoder_digest": spec.lineage.get("text_encoder_digest"),
    }


def _same(field: str, reference: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    pairs = {name: (there, ours[name]) for name, there in theirs.items()}
    differing = [
        f"{name}: {a} there, {b} in the model" for name, (a, b) in pairs.items() if a != b and None not in (a, b)
    ]
    if differing:
        raise ModelError(
            f"{field} = {reference} does not go with the model:\n  " + "\n  ".join(differing) + "\n"
            "Name one that was trained on the same data and noise schedule"
        )


@dataclass(frozen=True)
class InitialModel:
    """The model that `init_from` names, for the network of the configuration.

    Attributes:
        weights: by the names of that network, read when they are used.
        prediction: parameterization that they were trained for.
        digest: SHA-256 of the model's own weights.
        origins: the checkpoint that it is, as runs:/ID/IMAGES, whatever an alias that named it says later, and those
            that its own training began from, the last one first; none for a model that does not say so.
    """

    weights: dict[str, Tensor]
    prediction: Parameterization
    digest: str
    origins: tuple[str, ...]


def initial_model(config: Config, tracking_uri: str | None) -> InitialModel:
    """Return the model that `init_from` names, for the network of the configuration.

    Its weights are read when they are used, so that one tensor at a time is in memory.

    An inpainting network can start from a network without inpainting; its initial outputs are the same.

    Raises:
        ModelError: the model does not exist, or has another network or parameterization; the message names every field
            that differs.
    """
    assert config.init_from is not None
    with _fetched(config.init_from, tracking_uri, Storage.of(config)) as found:
        try:
            spec, weights = stored_weights(found.folder)
        except ValueError as error:
            raise ModelError(f"{config.init_from}: {error}") from error
    _require_finite(weights, config.init_from)
    digest = tensors_digest(weights)
    wanted, there = network_config(config), spec.network
    if wanted.context_channels and not there.context_channels and type(wanted) is type(there):
        weights = wanted.extend_for_inpainting(weights)
        there = replace(there, context_channels=wanted.context_channels)
    ours, theirs = vars(wanted), vars(there)
    named = [name for name, value in theirs.items() if value != ours.get(name) and name != "dropout"]
    differing = [f"{name}: {theirs[name]} there, {ours.get(name)} here" for name in named]
    skipping = (spec.prediction, config.objective.prediction) == ("x0", "x0_skip")  # alike where noise prevails
    if spec.prediction != config.objective.prediction and not skipping:
        raise ModelError(
            f"init_from = {config.init_from} predicts {spec.prediction}, and objective.prediction = "
            f"{config.objective.prediction}: its weights are of no use for that; set "
            f"objective.prediction={spec.prediction}, or start without init_from"
        )
    if differing:
        listed = "\n  ".join(differing)
        raise ModelError(
            f"init_from = {config.init_from} is another network than the configuration's:\n  {listed}\n"
            "Set model.* to what it has, or start without init_from"
        )
    run_id, images = spec.lineage.get("run_id"), spec.lineage.get("images_seen")
    itself = () if run_id is None or images is None else (f"runs:/{run_id}/{images}",)
    return InitialModel(weights, spec.prediction, digest, (*itself, *spec.lineage.get("init_from_origins", "").split()))


@dataclass(frozen=True)
class Resolved:
    """The model that a MODEL reference names, with its origin.

    Attributes:
        model: the loaded model, ready to sample.
        tracker: tracker of its MLflow run, or None.
        version: its registered model version, or None.
        published: its published checkpoint, or None.
        text_encoder: hub name or folder of the encoder that embedded its training data; a version's own, where it
            carries one. None where the model says nothing of it.
    """

    reference: str
    model: Model
    tracker: Tracker | None = None
    version: ModelVersion | None = None
    published: Published | None = None
    text_encoder: str | None = None


def resolve(reference: str, *, tracking_uri: str | None, storage: Storage, device: str = "cpu") -> Resolved:
    """Load the model that a MODEL reference names, with the guiding networks of its stored settings.

    Args:
        reference: models:/NAME@alias, models:/NAME/VERSION, a folder, or a published checkpoint of a run: runs:/ID (the
            newest), runs:/ID/IMAGES, runs:/ID/best (with the lowest recorded Frechet distance). Append
            /sigma_rel=WIDTH to a run reference for the power-function average of that width.

    Raises:
        ModelError: the model does not exist, where the message lists what exists, or its weights are no numbers.
    """
    with _fetched(reference, tracking_uri, storage) as found:
        try:
            model = load_model(found.folder, device)
        except ValueError as error:
            raise ModelError(f"{reference}: {error}") from error
        _require_finite(model.network.state_dict(), reference)
        encoder = _kept_encoder(found) or model.spec.lineage.get("text_encoder")
    model = guided(model, model.spec.sampling, tracking_uri, storage).to(device)
    return Resolved(reference, model, found.tracker, found.version, found.published, encoder)


def open_model(reference: str, config: Config, device: str = "cpu") -> Resolved:
    """Return what `resolve` does at the services of a configuration."""
    return resolve(reference, tracking_uri=config.tracking.uri, storage=Storage.of(config), device=device)


def _require_finite(weights: Mapping[str, Tensor], reference: str) -> None:
    """Refuse weights that are not finite: samples of them would be blank, without any error.

    Raises:
        ModelError: a weight is not a finite number.
    """
    wrong = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if wrong is not None:
        raise ModelError(
            f"{reference}: weights in {wrong} are not finite numbers, so its training has diverged: name an earlier "
            "checkpoint, runs:/ID/IMAGES"
        )


def _kept_encoder(found: _Fetched) -> str | None:
    """Return the folder of the text encoder that a model carries, which stays until this process ends."""
    own = found.folder / TEXT_ENCODER
    if not own.is_dir():
        return None
    if found.version is None:  # a folder that the user has named
        return str(own.resolve())
    return shutil.move(own, tempfile.mkdtemp(prefix="encoder-", dir=scratch_folder()))


@dataclass(frozen=True)
class _Fetched:
    """A model folder, valid inside the context of `_fetched`, and its origin."""

    folder: Path
    tracker: Tracker | None = None
    version: ModelVersion | None = None
    published: Published | None = None


@contextmanager
def _fetched(reference: str, tracking_uri: str | None, storage: Storage) -> Iterator[_Fetched]:
    """Yield the model folder that a MODEL reference names, downloaded if necessary."""
    with temporary_folder("model") as scratch:
        if reference.startswith("runs:/"):
            yield _from_run(reference, needs_server(tracking_uri, reference), storage, scratch)
        elif reference.startswith("models:/"):
            yield _from_registry(reference, needs_server(tracking_uri, reference), scratch)
        else:
            yield _Fetched(model_folder(reference))


def _from_run(reference: str, tracking_uri: str, storage: Storage, scratch: Path) -> _Fetched:
    match = RUN.fullmatch(reference)
    if match is None:
        raise ReferenceFormError(f"{reference}: write {FORMS['runs:/'][1]}")
    run, which, width = match.groups()
    tracker = tracking.get_run(tracking_uri, run)
    if which == "best":
        chosen = best_published(tracker, BEST, lowest=True)
    else:
        published = list_published(tracker)
        wanted = [p for p in published if which is None or p.images_seen == int(which)]
        if not wanted:
            seen = ", ".join(str(p.images_seen) for p in published) or "none"
            raise ModelError(f"{reference}: no such published checkpoint; the run has: {seen}")
        chosen = wanted[-1]
    fetch_published(chosen, storage, scratch, layout.MODEL, layout.WEIGHTS)
    if width is not None:
        averaged = reconstruct_average(tracker, storage, float(width), chosen.images_seen)
        spec = read_spec(scratch)
        save_model(scratch, replace(spec, lineage={**spec.lineage, "sigma_rel": float(width)}), averaged)
        return _Fetched(scratch, tracker)  # not the checkpoint's weights, so its scores do not apply
    return _Fetched(scratch, tracker, published=chosen)


def _from_registry(reference: str, tracking_uri: str, scratch: Path) -> _Fetched:
    found = find_registered(reference, tracking_uri)
    folder = tracking.download_version(tracking_uri, found, scratch) / "artifacts" / "model"
    return _Fetched(folder, Tracker(tracking_uri, found.run_id), found)
