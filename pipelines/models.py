"""Checkpoint files, and MODEL references to models: runs, the registry, or a folder.

A checkpoint is a folder: `model.json`, `model.safetensors` (the average that samples, which makes it a model folder),
`training.safetensors` (raw weights and optimizer) and `state.json`, written last, which names the others' digests.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm.generate import SamplingSettings
from ddpm.interop import Model, ModelSpec, load_model, save_model
from pipelines import tracking
from pipelines.config import Config, unet_config
from pipelines.shards.index import Dataset, Quarantine, stream_digest
from pipelines.storage import Storage
from pipelines.tracking import ModelVersion, Tracker

CHECKPOINT_VERSION = 1
PUBLISHED = "checkpoints"


class ModelError(ValueError):
    """A MODEL reference that names nothing, or a checkpoint that is damaged or of another run."""


@dataclass(frozen=True)
class CheckpointState:
    """`state.json`.

    Attributes:
        images_seen: the cursor of the stream.
        identity: `Config.identity()` of the run.
        stream_digest: of the data it was trained on, what was left out of it included.
        optimizer_steps: updates made so far.
        files: SHA-256 of the other files.
    """

    images_seen: int
    identity: dict[str, Any]
    stream_digest: str
    optimizer_steps: int
    files: dict[str, str]


@dataclass(frozen=True)
class Published:
    """A checkpoint that stays, as MLflow records it."""

    uri: str
    images_seen: int
    digest: str


def sampling_settings(config: Config) -> SamplingSettings:
    """Sampler and guidance of a configuration."""
    return SamplingSettings(**config.guidance.model_dump(), **config.sampler.model_dump())


def settings_from_json(text: str) -> SamplingSettings:
    """What `json.dumps(asdict(settings))` wrote."""
    plain = json.loads(text)
    return SamplingSettings(**{**plain, "interval": tuple(plain["interval"])})


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
        network=unet_config(config),
        schedule=config.schedule.model_dump(),
        prediction=config.objective.prediction,
        image_size=dataset.image_size,
        classes=dataset.classes if config.model.class_conditional else (),
        sampling=sampling_settings(config),
        lineage={"run": config.name, **data, **lineage},
    )


def save_checkpoint(
    folder: Path,
    spec: ModelSpec,
    averaged: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    *,
    images_seen: int,
    identity: dict[str, Any],
    optimizer_steps: int,
) -> CheckpointState:
    """Write a checkpoint folder; `state.json` last, so that a folder with it is complete."""
    save_model(folder, spec, averaged)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in training.items()},
        folder / "training.safetensors",
    )
    files = {name: _sha256(folder / name) for name in ("model.json", "model.safetensors", "training.safetensors")}
    state = CheckpointState(images_seen, identity, spec.lineage["stream_digest"], optimizer_steps, files)
    (folder / "state.json").write_text(
        json.dumps({"checkpoint_version": CHECKPOINT_VERSION, **asdict(state)}, indent=1)
    )
    return state


def load_checkpoint(folder: Path) -> tuple[CheckpointState, dict[str, Tensor], dict[str, Tensor]]:
    """(state, averaged weights, training tensors) of a checkpoint folder.

    Raises:
        ModelError: incomplete, damaged or of another version.
    """
    try:
        plain = json.loads((folder / "state.json").read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{folder} is not a complete checkpoint: state.json is missing") from error
    version = plain.pop("checkpoint_version", None)
    if version != CHECKPOINT_VERSION:
        raise ModelError(f"{folder}: checkpoint version {version}, this release reads {CHECKPOINT_VERSION}")
    state = CheckpointState(**plain)
    for name, digest in state.files.items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise ModelError(f"{folder / name} is missing or damaged: its SHA-256 is not the recorded one")
    return state, load_file(folder / "model.safetensors"), load_file(folder / "training.safetensors")


def check_resumable(
    state: CheckpointState, config: Config, dataset: Dataset, quarantine: Quarantine | None = None
) -> None:
    """Refuse to continue a run on other settings, or on other data unless `data.allow_changed` says so.

    Raises:
        ModelError: names every field that differs.
    """
    now = json.loads(json.dumps(config.identity()))
    fields = sorted(state.identity.keys() | now.keys())
    named = [f for f in fields if state.identity.get(f) != now.get(f)]
    differing = [f"{f}: {state.identity.get(f)} before, {now.get(f)} now" for f in named]
    digest = stream_digest(dataset, quarantine)
    if state.stream_digest != digest and not config.data.allow_changed:
        differing.append(
            f"dataset digest: {state.stream_digest[:12]} before, {digest[:12]} now (data or quarantine have changed; "
            "data.allow_changed=true goes on with them, and from there on which sample is which is another matter)"
        )
    if differing:
        listed = "\n  ".join(differing)
        raise ModelError(
            f"the run '{config.name}' was trained with other settings:\n  {listed}\n"
            "Use the same settings to resume it, or another name=… to start a new run"
            + (" (optim.decay=constant lets a run go on past its length)" if "images" in named else "")
        )


def publish(tracker: Tracker, storage: Storage, folder: Path, target_uri: str, state: CheckpointState) -> Published:
    """Store a checkpoint folder where nothing deletes it and record it in the run; `state.json` last."""
    for name in [*state.files, "state.json"]:
        storage.upload(folder / name, f"{target_uri}/{name}")
    digest = hashlib.sha256(json.dumps(state.files, sort_keys=True).encode()).hexdigest()
    published = Published(target_uri, state.images_seen, digest)
    tracker.text(tracking.to_json(asdict(published)), f"{PUBLISHED}/{state.images_seen:012d}.json")
    return published


def list_published(tracker: Tracker) -> list[Published]:
    """A run's published checkpoints, oldest first."""
    return [Published(**json.loads(tracker.read_text(name))) for name in sorted(tracker.names(PUBLISHED))]


@dataclass(frozen=True)
class Resolved:
    """What a MODEL reference names.

    Attributes:
        model: ready to sample.
        tracker: its run, where it has one.
        version: its registered version, where it is one.
    """

    reference: str
    model: Model
    tracker: Tracker | None = None
    version: ModelVersion | None = None


def resolve(reference: str, *, tracking_uri: str | None, storage: Storage, device: str = "cpu") -> Resolved:
    """The model that a MODEL reference names.

    Args:
        reference: runs:/ID, runs:/ID/IMAGES, models:/NAME@alias, models:/NAME/VERSION, or a folder.

    Raises:
        ModelError: it names nothing; says what exists.
    """
    if reference.startswith("runs:/"):
        return _from_run(reference, _needs(tracking_uri, reference), storage, device)
    if reference.startswith("models:/"):
        return _from_registry(reference, _needs(tracking_uri, reference), device)
    folder = Path(reference.removeprefix("file://"))
    if not folder.is_dir():
        raise ModelError(
            f"{reference} names no model; MODEL is "
            "runs:/ID[/IMAGES], models:/NAME@alias, models:/NAME/VERSION or a folder"
        )
    try:
        return Resolved(reference, load_model(folder, device))
    except ValueError as error:
        raise ModelError(str(error)) from error


def _from_run(reference: str, tracking_uri: str, storage: Storage, device: str) -> Resolved:
    match = re.fullmatch(r"runs:/([0-9a-f]+)(?:/(\d+))?", reference)
    if match is None:
        raise ModelError(f"{reference}: write runs:/ID or runs:/ID/IMAGES")
    tracker = tracking.get_run(tracking_uri, match[1])
    published = list_published(tracker)
    wanted = [p for p in published if match[2] is None or p.images_seen == int(match[2])]
    if not wanted:
        seen = ", ".join(str(p.images_seen) for p in published) or "none"
        raise ModelError(f"{reference}: no such published checkpoint; the run has: {seen}")
    with tempfile.TemporaryDirectory(prefix="ddpm-model-") as scratch:
        for name in ("model.json", "model.safetensors"):
            storage.download(f"{wanted[-1].uri}/{name}", Path(scratch) / name)
        return Resolved(reference, load_model(Path(scratch), device), tracker)


def _from_registry(reference: str, tracking_uri: str, device: str) -> Resolved:
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if match is None:
        raise ModelError(f"{reference}: write models:/NAME@alias or models:/NAME/VERSION")
    name, alias, number = match.groups()
    found = tracking.version(tracking_uri, name, alias=alias, number=number)
    if found is None:
        there = tracking.versions(tracking_uri, name)
        listed = ", ".join(v.version + "".join(f" @{a}" for a in v.aliases) for v in there) or "no version of that name"
        raise ModelError(f"{reference} is not in the registry at {tracking_uri}; it has: {listed}")
    with tempfile.TemporaryDirectory(prefix="ddpm-model-") as scratch:
        model = load_model(tracking.download_version(tracking_uri, found, Path(scratch)), device)
    if "sampling" in found.tags:  # found by a later search; the artifact itself never changes
        model = replace(model, spec=replace(model.spec, sampling=settings_from_json(found.tags["sampling"])))
    return Resolved(reference, model, Tracker(tracking_uri, found.run_id), found)


def _needs(tracking_uri: str | None, reference: str) -> str:
    if tracking_uri is None:
        raise ModelError(
            f"{reference} needs an MLflow server: set tracking.uri or MLFLOW_TRACKING_URI, or run `ddpm up`"
        )
    return tracking_uri


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """An optimizer's state as named tensors, for safetensors; `names` in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{key}.{names[i]}": torch.as_tensor(value)
        for i, entries in state.items()
        for key, value in entries.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        if full.startswith("optimizer."):
            _, key, name = full.split(".", 2)
            state.setdefault(index[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
