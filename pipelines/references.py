"""Models by MODEL reference: a run's, the registry's, or a folder's; and what a run's model says of itself."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm.generate import Sampling
from ddpm.model import Model, ModelSpec, load_classifier, load_model, read_spec, save_model
from ddpm.models.classifier import NoisyClassifier
from ddpm.settings import settings_of
from pipelines import tracking
from pipelines.checkpoints import ModelError, Published, best_published, list_published, reconstruct_average
from pipelines.config import Config, network_config, sampling
from pipelines.shards.index import Dataset
from pipelines.shards.quarantine import Quarantine, stream_digest
from pipelines.storage import Storage
from pipelines.tracking import ModelVersion, Tracker


def model_spec(
    config: Config, dataset: Dataset, lineage: Mapping[str, Any], quarantine: Quarantine | None = None
) -> ModelSpec:
    """What `model.json` says of a run's model."""
    data = {
        "dataset_digest": dataset.digest,
        "dataset_uri": dataset.uri,
        "stream_digest": stream_digest(dataset, quarantine),
        "quarantined": 0 if quarantine is None else len(quarantine.excluded),
    }
    return ModelSpec(
        network=network_config(config),
        schedule=config.schedule.model_dump(),
        prediction=config.objective.prediction,
        image_size=dataset.image_size,
        task=config.task,
        classes=dataset.classes if config.model.class_conditional or config.task == "classifier" else (),
        sampling=sampling(config),
        lineage={"run": config.name, **data, **lineage},
    )


def guided(model: Model, settings: Sampling, tracking_uri: str | None, storage: Storage) -> Model:
    """The model with the networks beside it that the settings' guidance names.

    Raises:
        ModelError: no such model, or one that does not go with this one; says in what.
    """
    for setting in settings_of(type(settings.guidance)):
        reference = getattr(settings.guidance, setting.name)
        if setting.reference and reference is not None:
            found: Any = {setting.name: _GUIDES[setting.name](model, reference, tracking_uri, storage)}
            model = replace(model, **found)
    return model


def classifier_for(model: Model, reference: str, tracking_uri: str | None, storage: Storage) -> NoisyClassifier:
    """The classifier of noisy images that a MODEL reference names, to guide a model.

    Raises:
        ModelError: no such classifier, or of other classes, images or noise than the model.
    """
    with _fetched(reference, tracking_uri, storage) as found:
        try:
            spec, classifier = load_classifier(found.folder)
        except ValueError as error:
            raise ModelError(f"guidance.classifier = {reference}: {error}") from error
    _same("guidance.classifier", reference, spec, model.spec)
    return classifier


def weaker_for(model: Model, reference: str, tracking_uri: str | None, storage: Storage) -> Model:
    """The weaker model that a MODEL reference names, to guide a model.

    Raises:
        ModelError: no such model, or of other classes, images or noise than the model.
    """
    weak = resolve(reference, tracking_uri=tracking_uri, storage=storage).model
    _same("guidance.weak", reference, weak.spec, model.spec)
    return weak


_GUIDES: dict[str, Callable[..., Any]] = {"classifier": classifier_for, "weak": weaker_for}
"""Setting of a guidance that names a network -> how that is found."""


def _same(field: str, reference: str, there: ModelSpec, here: ModelSpec) -> None:
    pairs = {name: (getattr(there, name), getattr(here, name)) for name in ("schedule", "classes", "shape")}
    differing = [f"{name}: {a} there, {b} in the model" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise ModelError(
            f"{field} = {reference} does not go with the model:\n  " + "\n  ".join(differing) + "\n"
            "Name one that was trained on the same data and noise schedule"
        )


def initial_weights(config: Config, tracking_uri: str | None, storage: Storage) -> dict[str, Tensor]:
    """The weights that `init_from` names, for the network that the configuration describes.

    A network that is to inpaint takes those of one that is not, and computes the same to begin with.

    Raises:
        ModelError: no such model, or one of another network; names every field that differs.
    """
    assert config.init_from is not None
    model = resolve(config.init_from, tracking_uri=tracking_uri, storage=storage).model
    weights: dict[str, Tensor] = dict(model.network.state_dict())
    wanted, there = network_config(config), model.spec.network
    if wanted.context_channels and not there.context_channels and type(wanted) is type(there):
        weights = wanted.extend_for_inpainting(weights)
        there = replace(there, context_channels=wanted.context_channels)
    ours, theirs = vars(wanted), vars(there)
    named = [name for name, value in theirs.items() if value != ours.get(name) and name != "dropout"]
    differing = [f"{name}: {theirs[name]} there, {ours.get(name)} here" for name in named]
    if differing:
        listed = "\n  ".join(differing)
        raise ModelError(
            f"init_from = {config.init_from} is another network than the configuration's:\n  {listed}\n"
            "Set model.* to what it has, or start without init_from"
        )
    return weights


@dataclass(frozen=True)
class Resolved:
    """What a MODEL reference names.

    Attributes:
        model: ready to sample.
        tracker: its run, where it has one.
        version: its registered version, where it is one.
        published: the checkpoint of its run, where it is one.
    """

    reference: str
    model: Model
    tracker: Tracker | None = None
    version: ModelVersion | None = None
    published: Published | None = None


def resolve(reference: str, *, tracking_uri: str | None, storage: Storage, device: str = "cpu") -> Resolved:
    """The model that a MODEL reference names, with the networks that its own settings have guide it.

    Args:
        reference: models:/NAME@alias, models:/NAME/VERSION, a folder, or a published checkpoint of a run: runs:/ID (the
            newest), runs:/ID/IMAGES, runs:/ID/best (of the lowest Frechet distance that was measured), each with
            /sigma_rel=WIDTH for the power-function average of that width instead of the one that the run sampled with.

    Raises:
        ModelError: it names nothing; says what exists.
    """
    with _fetched(reference, tracking_uri, storage) as found:
        try:
            model = load_model(found.folder, device)
        except ValueError as error:
            raise ModelError(f"{reference}: {error}") from error
    if found.version is not None and "sampling" in found.version.tags:
        # Found by a later search; the artifact itself never changes.
        drawn = Sampling.from_json(json.loads(found.version.tags["sampling"]))
        model = replace(model, spec=replace(model.spec, sampling=drawn))
    model = guided(model, model.spec.sampling, tracking_uri, storage).to(device)
    return Resolved(reference, model, found.tracker, found.version, found.published)


@dataclass(frozen=True)
class _Fetched:
    """A model folder, while it is there, and where it comes from."""

    folder: Path
    tracker: Tracker | None = None
    version: ModelVersion | None = None
    published: Published | None = None


@contextmanager
def _fetched(reference: str, tracking_uri: str | None, storage: Storage) -> Iterator[_Fetched]:
    """The model folder that a MODEL reference names."""
    with tempfile.TemporaryDirectory(prefix="ddpm-model-") as scratch:
        if reference.startswith("runs:/"):
            yield _from_run(reference, _needs(tracking_uri, reference), storage, Path(scratch))
        elif reference.startswith("models:/"):
            yield _from_registry(reference, _needs(tracking_uri, reference), Path(scratch))
        else:
            folder = Path(reference.removeprefix("file://"))
            if not folder.is_dir():
                raise ModelError(
                    f"{reference} names no model; MODEL is "
                    "runs:/ID[/IMAGES|/best][/sigma_rel=WIDTH], models:/NAME@alias, models:/NAME/VERSION or a folder"
                )
            yield _Fetched(folder)


def _from_run(reference: str, tracking_uri: str, storage: Storage, scratch: Path) -> _Fetched:
    match = re.fullmatch(r"runs:/([0-9a-f]+)(?:/(\d+|best))?(?:/sigma_rel=(0?\.\d+))?", reference)
    if match is None:
        raise ModelError(f"{reference}: write runs:/ID, runs:/ID/IMAGES or runs:/ID/best, and /sigma_rel=0.1 after it")
    run, which, width = match.groups()
    tracker = tracking.get_run(tracking_uri, run)
    if which == "best":
        chosen = best_published(tracker, "eval/frechet_distance", lowest=True)
    else:
        published = list_published(tracker)
        wanted = [p for p in published if which is None or p.images_seen == int(which)]
        if not wanted:
            seen = ", ".join(str(p.images_seen) for p in published) or "none"
            raise ModelError(f"{reference}: no such published checkpoint; the run has: {seen}")
        chosen = wanted[-1]
    for name in ("model.json", "model.safetensors"):
        storage.download(f"{chosen.uri}/{name}", scratch / name)
    if width is not None:
        averaged = reconstruct_average(tracker, storage, float(width), chosen.images_seen)
        spec = read_spec(scratch)
        save_model(scratch, replace(spec, lineage={**spec.lineage, "sigma_rel": float(width)}), averaged)
        return _Fetched(scratch, tracker)  # other weights than the checkpoint's, whose scores are not its own
    return _Fetched(scratch, tracker, published=chosen)


def _from_registry(reference: str, tracking_uri: str, scratch: Path) -> _Fetched:
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if match is None:
        raise ModelError(f"{reference}: write models:/NAME@alias or models:/NAME/VERSION")
    name, alias, number = match.groups()
    found = tracking.version(tracking_uri, name, alias=alias, number=number)
    if found is None:
        there = tracking.versions(tracking_uri, name)
        listed = ", ".join(v.version + "".join(f" @{a}" for a in v.aliases) for v in there) or "no version of that name"
        raise ModelError(f"{reference} is not in the registry at {tracking_uri}; it has: {listed}")
    folder = tracking.download_version(tracking_uri, found, scratch)
    return _Fetched(folder, Tracker(tracking_uri, found.run_id), found)


def _needs(tracking_uri: str | None, reference: str) -> str:
    if tracking_uri is None:
        raise ModelError(
            f"{reference} needs an MLflow server: set tracking.uri or MLFLOW_TRACKING_URI, or run `ddpm up`"
        )
    return tracking_uri
