"""Checkpoint files: saving, loading, listing, publishing and recording scores.

A checkpoint is a folder with `model.json` and `model.safetensors` (the averaged weights used for sampling, so that it
is a model folder), `power_ema.safetensors` (averages for post-hoc reconstruction, if the run tracks them),
`training.safetensors` (raw weights, optimizer state, timestep history) and `state.json`, which has the sizes and
digests of the other files and is written last, so that a folder with it is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm.ema import PowerSnapshot, reconstruct
from ddpm.model import ModelSpec, save_model
from pipelines import tracking
from pipelines.config import Config
from pipelines.errors import PipelineError
from pipelines.scratch import scratch_folder
from pipelines.shards.index import Dataset
from pipelines.shards.quarantine import Quarantine, stream_digest
from pipelines.storage import Storage, join
from pipelines.tracking import Tracker

logger = logging.getLogger(__name__)

CHECKPOINT_VERSION = 2
PUBLISHED = "checkpoints"
_EMA, _POWER = "ema.", "power."  # prefixes of the tensors that are stored in separate files


class ModelError(PipelineError):
    """The error for a MODEL reference that does not exist, or a checkpoint that is damaged or of another run."""


@dataclass(frozen=True)
class CheckpointState:
    """The content of `state.json`.

    Attributes:
        images_seen: position in the data stream, the ordinal of the next batch's first sample.
        identity: `Config.identity()` of the run.
        stream_digest: digest of the training data, including which samples are quarantined.
        optimizer_steps: number of updates so far.
        skipped: number of updates skipped so far because a loss or gradient was not finite.
        files: file name -> SHA-256, for the other files.
        sizes: file name -> size in bytes.
    """

    images_seen: int
    identity: dict[str, Any]
    stream_digest: str
    optimizer_steps: int
    skipped: int
    files: dict[str, str]
    sizes: dict[str, int]

    def to_json(self) -> str:
        """Return the text of `state.json`."""
        return json.dumps({"checkpoint_version": CHECKPOINT_VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> CheckpointState:
        """Return the state in the text of a `state.json`.

        Raises:
            ModelError: the text is damaged or of another version.
        """
        try:
            plain = json.loads(text)
            version = plain.pop("checkpoint_version", None)
            if version == CHECKPOINT_VERSION:
                return cls(**plain)
        except (ValueError, AttributeError, TypeError) as error:
            raise ModelError(f"{where}/state.json is damaged ({error}): the checkpoint cannot be used") from error
        raise ModelError(f"{where}: checkpoint version {version}, this release reads {CHECKPOINT_VERSION}")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint before it is written.

    Attributes:
        spec: description of the model with the averaged weights.
        tensors: by name: "ema.NAME" for the averaged weights used for sampling, "power.I.NAME" for the averages for
            post-hoc reconstruction; all others are needed only for training.
    """

    spec: ModelSpec
    tensors: Mapping[str, Tensor]
    images_seen: int
    identity: dict[str, Any]
    optimizer_steps: int
    skipped: int = 0


@dataclass(frozen=True)
class Published:
    """A checkpoint that is kept permanently, as recorded in MLflow.

    Attributes:
        scores: name -> value of evaluation scores, recorded after publishing.
    """

    uri: str
    images_seen: int
    digest: str
    scores: dict[str, float] = field(default_factory=dict)

    def record(self) -> tuple[str, str]:
        """Return (text, name) of the artifact that records it in the MLflow run."""
        return tracking.to_json(asdict(self)), f"{PUBLISHED}/{self.images_seen:012d}.json"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> CheckpointState:
    """Write a checkpoint folder and return its state; `state.json` is written last, so a folder with it is complete."""
    averaged, power, rest = {}, {}, {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(_EMA):
            averaged[name.removeprefix(_EMA)] = tensor
        elif name.startswith(_POWER):
            power[name] = tensor
        else:
            rest[name] = tensor
    save_model(folder, checkpoint.spec, averaged)
    save_file(rest, folder / "training.safetensors")
    if power:
        save_file(power, folder / "power_ema.safetensors")
    paths = sorted(path for path in folder.iterdir() if path.name != "state.json")
    state = CheckpointState(
        checkpoint.images_seen,
        checkpoint.identity,
        checkpoint.spec.lineage["stream_digest"],
        checkpoint.optimizer_steps,
        checkpoint.skipped,
        {path.name: _sha256(path) for path in paths},
        {path.name: path.stat().st_size for path in paths},
    )
    (folder / "state.json").write_text(state.to_json())
    return state


def load_checkpoint(folder: Path) -> tuple[CheckpointState, dict[str, Tensor]]:
    """Return (state, tensors by their names in `Checkpoint`) of a checkpoint folder.

    Raises:
        ModelError: the checkpoint is incomplete, damaged or of another version.
    """
    state = verify_checkpoint(folder)
    tensors = load_file(folder / "training.safetensors")
    tensors |= {_EMA + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    if "power_ema.safetensors" in state.files:
        tensors |= load_file(folder / "power_ema.safetensors")
    return state, tensors


def verify_checkpoint(folder: Path) -> CheckpointState:
    """Return the state of a checkpoint folder after checking the digests of its files.

    Raises:
        ModelError: the checkpoint is incomplete, damaged or of another version.
    """
    try:
        state = CheckpointState.from_json((folder / "state.json").read_bytes(), str(folder))
    except FileNotFoundError as error:
        raise ModelError(f"{folder} is not a complete checkpoint: state.json is missing") from error
    for name, digest in state.files.items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise ModelError(f"{folder / name} is missing or damaged: its SHA-256 is not the recorded one")
    return state


def complete_checkpoints(storage: Storage, uri: str) -> list[tuple[str, CheckpointState]]:
    """Return (address, state) of every complete checkpoint folder directly below an address, newest first.

    A folder is complete if it has a `state.json` of a readable version and all files listed there, with the right
    sizes; folders of interrupted writes are skipped. `load_checkpoint`, which reads every byte, checks the digests.
    """
    sizes = {entry.uri: entry.size for entry in storage.list(uri)}
    found = []
    for state_uri in [u for u in sizes if u.endswith("/state.json")]:
        folder = state_uri.removesuffix("/state.json")
        if "/" in folder[len(uri.rstrip("/")) + 1 :]:
            continue
        try:
            state = CheckpointState.from_json(storage.read(state_uri), folder)
        except ModelError as error:
            logger.warning("%s", error)
            continue
        if all(sizes.get(join(folder, name)) == size for name, size in state.sizes.items()):
            found.append((folder, state))
    return sorted(found, key=lambda pair: (-pair[1].images_seen, pair[0]))


def fetch_first(storage: Storage, addresses: Sequence[str], folder: Path) -> CheckpointState | None:
    """Download the first undamaged checkpoint of a list and return its state; return None for an empty list.

    Raises:
        ModelError: all of them are damaged.
    """
    damaged = []
    for address in addresses:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        storage.download_folder(address, folder)
        try:
            return verify_checkpoint(folder)
        except ModelError as error:
            damaged.append(f"{address}: {str(error).removeprefix(f'{folder}/')}")
            logger.warning("%s; looking for an older checkpoint", damaged[-1])
    if damaged:
        raise ModelError("no checkpoint of the run is whole:\n  " + "\n  ".join(damaged))
    return None


def check_resumable(
    state: CheckpointState, config: Config, dataset: Dataset, quarantine: Quarantine | None = None
) -> None:
    """Raise if a run would continue with other settings, or with other data unless `data.allow_changed` is set.

    Raises:
        ModelError: settings or data differ; the message names every field that differs.
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


def publish(storage: Storage, uri: str, target_uri: str, state: CheckpointState) -> Published:
    """Copy a stored checkpoint to an address where it is never deleted, `state.json` last, and return its record."""
    for name in [*state.files, "state.json"]:
        storage.copy(join(uri, name), join(target_uri, name))
    digest = hashlib.sha256(json.dumps(state.files, sort_keys=True).encode()).hexdigest()
    return Published(target_uri, state.images_seen, digest)


def record_published(tracker: Tracker, published: Published) -> None:
    """Record a published checkpoint in the MLflow run, or update its record."""
    tracker.text(*published.record())


def list_published(tracker: Tracker) -> list[Published]:
    """Return a run's published checkpoints, oldest first."""
    return [Published(**json.loads(tracker.read_text(name))) for name in sorted(tracker.names(PUBLISHED))]


def record_scores(tracker: Tracker, images_seen: int, scores: Mapping[str, float]) -> None:
    """Add an evaluation's scores to a published checkpoint's record.

    Raises:
        ModelError: the run has no published checkpoint at that number of images.
    """
    for published in list_published(tracker):
        if published.images_seen == images_seen:
            record_published(tracker, replace(published, scores={**published.scores, **scores}))
            return
    raise ModelError(f"run {tracker.run_id} has no published checkpoint at {images_seen} images to add scores to")


def best_published(tracker: Tracker, score: str, *, lowest: bool) -> Published:
    """Return the published checkpoint with the best value of a score; the older one in case of a tie.

    Raises:
        ModelError: no checkpoint has that score; the message lists the recorded scores.
    """
    published = list_published(tracker)
    scored = [p for p in published if score in p.scores]
    if not scored:
        there = ", ".join(sorted({name for p in published for name in p.scores})) or "none"
        raise ModelError(f"no published checkpoint of run {tracker.run_id} has the score '{score}'; there are: {there}")
    return min(scored, key=lambda p: p.scores[score] if lowest else -p.scores[score])


def reconstruct_average(
    tracker: Tracker, storage: Storage, sigma_rel: float, images_seen: int | None = None
) -> dict[str, Tensor]:
    """Return the weights of an average with a width chosen after training, from a run's published checkpoints.

    Args:
        sigma_rel: relative width of the average.
        images_seen: number of images of the average; default is that of the newest published checkpoint.

    Raises:
        ModelError: the run kept no power-function averages, or the width or number of images is out of range.
    """
    snapshots = []
    with tempfile.TemporaryDirectory(prefix="power-", dir=scratch_folder()) as scratch:
        for published in list_published(tracker):
            state = CheckpointState.from_json(storage.read(join(published.uri, "state.json")), published.uri)
            if "power_ema.safetensors" not in state.files:
                continue
            path = Path(scratch) / f"{published.images_seen}.safetensors"
            storage.download(join(published.uri, "power_ema.safetensors"), path)
            by_width: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for full, tensor in load_file(path).items():
                _, number, name = full.split(".", 2)
                by_width[int(number)][name] = tensor
            widths = state.identity["optim.power_ema"]
            snapshots += [PowerSnapshot(w, state.images_seen, widths[i]) for i, w in sorted(by_width.items())]
    if not snapshots:
        raise ModelError(
            f"run {tracker.run_id} has published no power-function averages: train with optim.power_ema=[0.05,0.1]"
        )
    try:
        at = max(s.images_seen for s in snapshots) if images_seen is None else images_seen
        return reconstruct(snapshots, at, sigma_rel)
    except ValueError as error:
        raise ModelError(f"run {tracker.run_id}: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
