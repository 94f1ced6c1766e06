"""Checkpoint files: saving, loading, and whether a run may continue from one.

A checkpoint of a network that every worker has whole is a folder with `model.json` and `model.safetensors` (the
averaged weights used for sampling, so that it is a model folder), `power_ema.safetensors` (averages for post-hoc
reconstruction, if the run tracks them), `training.safetensors` (raw weights, optimizer state, timestep history) and
`state.json`, which has the sizes and digests of the other files and is written last, so that a folder with it is
complete. A network that is sharded over the workers has a sharded checkpoint: in place of the safetensors files there
is a part of each worker (`parts`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm.model import ModelSpec, save_model
from ddpm.tensor_files import files_of, read_weights
from pipelines.checkpoints.errors import ModelError
from pipelines.checkpoints.sharded import read_index, read_tensors
from pipelines.config import FORMER_DEFAULTS, Config, override_value
from pipelines.shards.forgotten import FORGOTTEN
from pipelines.shards.index import Dataset
from pipelines.shards.quarantine import Quarantine, stream_digest
from pipelines.storage import Storage, file_sha256, layout

CHECKPOINT_VERSION, SHARDED_VERSION = 2, 3
"""The versions of checkpoints in whole files, and in parts, which earlier releases cannot read."""
EMA, POWER = "ema.", "power."  # prefixes of the tensors that are stored in separate files


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
        precision: what the run computed in, such as "bf16"; None where an earlier release did not record it.
        length: images after which the run ends, as far as was known; None where an earlier release did not record it.
        trained_s: seconds that the run had trained.
    """

    images_seen: int
    identity: dict[str, Any]
    stream_digest: str
    optimizer_steps: int
    skipped: int
    files: dict[str, str]
    sizes: dict[str, int]
    precision: str | None = None
    length: int | None = None
    trained_s: float = 0.0

    def ends_at(self, config: Config) -> int:
        """Return after how many images the run ends: as recorded where it is given seconds, else as configured."""
        return config.images if config.training_s is None or self.length is None else self.length

    @property
    def sharded(self) -> bool:
        """Whether the tensors are in parts."""
        return layout.PARTS_INDEX in self.files

    def to_json(self) -> str:
        """Return the text of `state.json`."""
        version = SHARDED_VERSION if self.sharded else CHECKPOINT_VERSION
        return json.dumps({"checkpoint_version": version, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> CheckpointState:
        """Return the state in the text of a `state.json`.

        Raises:
            ModelError: the text is damaged or of another version.
        """
        try:
            plain = json.loads(text)
            version = plain.pop("checkpoint_version", None)
            if version in (CHECKPOINT_VERSION, SHARDED_VERSION):
                state = cls(**plain)
                _require_bare_names([*state.files, *state.sizes], where)
                return state
        except (ValueError, AttributeError, TypeError) as error:
            raise ModelError(f"{where}/state.json is damaged ({error}): the checkpoint cannot be used") from error
        raise ModelError(
            f"{where}: checkpoint version {version}, this release reads {CHECKPOINT_VERSION} and {SHARDED_VERSION}"
        )


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
    length: int | None = None
    trained_s: float = 0.0

    def state(self, files: dict[str, str], sizes: dict[str, int]) -> CheckpointState:
        """Return the content of `state.json` for files of these SHA-256 and sizes."""
        return CheckpointState(
            self.images_seen,
            self.identity,
            self.spec.lineage["stream_digest"],
            self.optimizer_steps,
            self.skipped,
            files,
            sizes,
            self.spec.lineage.get("precision"),
            self.length,
            self.trained_s,
        )


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> CheckpointState:
    """Write a checkpoint folder and return its state; `state.json` is written last, so a folder with it is complete."""
    averaged, power, rest = {}, {}, {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(EMA):
            averaged[name.removeprefix(EMA)] = tensor
        elif name.startswith(POWER):
            power[name] = tensor
        else:
            rest[name] = tensor
    save_model(folder, checkpoint.spec, averaged)
    save_file(rest, folder / layout.TRAINING_TENSORS)
    if power:
        save_file(power, folder / layout.POWER_EMA)
    paths = sorted(path for path in folder.iterdir() if path.name != layout.TRAINING_STATE)
    state = checkpoint.state(
        {path.name: file_sha256(path) for path in paths}, {path.name: path.stat().st_size for path in paths}
    )
    (folder / layout.TRAINING_STATE).write_text(state.to_json())
    return state


def with_file(state: CheckpointState, name: str, data: bytes) -> CheckpointState:
    """Return the state of a checkpoint that has one file more."""
    digest = hashlib.sha256(data).hexdigest()
    return replace(state, files={**state.files, name: digest}, sizes={**state.sizes, name: len(data)})


def load_checkpoint(folder: Path) -> tuple[CheckpointState, dict[str, Tensor]]:
    """Return (state, tensors by their names in `Checkpoint`) of a checkpoint folder.

    Raises:
        ModelError: the checkpoint is incomplete, damaged or of another version.
    """
    state = verify_checkpoint(folder)
    return state, load_tensors(folder, state)


def load_tensors(folder: Path, state: CheckpointState) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint folder that has been verified, whole, by their names in `Checkpoint`.

    Those of a checkpoint in whole files are read when they are used, so that one of them at a time is in memory.
    """
    if state.sharded:
        address = f"file://{folder.resolve()}"
        return read_tensors(Storage(), address, read_index(Storage(), address, state.files))
    tensors = load_file(folder / layout.TRAINING_TENSORS)
    tensors |= {EMA + name: tensor for name, tensor in read_weights(folder, layout.WEIGHTS).items()}
    if files_of(layout.POWER_EMA, state.files):
        tensors |= read_weights(folder, layout.POWER_EMA)
    return tensors


def verify_checkpoint(folder: Path) -> CheckpointState:
    """Return the state of a checkpoint folder after checking the digests of its files.

    Raises:
        ModelError: the checkpoint is incomplete, damaged or of another version.
    """
    try:
        state = CheckpointState.from_json((folder / layout.TRAINING_STATE).read_bytes(), str(folder))
    except FileNotFoundError as error:
        raise ModelError(f"{folder} is not a complete checkpoint: state.json is missing") from error
    for name, digest in state.files.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise ModelError(f"{folder / name} is missing or damaged: its SHA-256 is not the recorded one")
    return state


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
    differing = [f"{f}: {state.identity.get(f)} before, {now.get(f)} now{_former(f, state.identity)}" for f in named]
    digest = stream_digest(dataset, quarantine)
    if state.stream_digest != digest and not config.data.allow_changed:
        differing.append(
            f"dataset digest: {state.stream_digest[:12]} before, {digest[:12]} now (data or quarantine have changed; "
            "data.allow_changed=true goes on with them, and from there on which sample is which is another matter)"
        )
        gone = [problem for problem in (quarantine.excluded if quarantine else ()) if problem.kind == FORGOTTEN]
        if gone:
            differing.append(
                f"{len(gone)} of its samples must stay out, the newest as it {gone[-1].reason} (`ddpm forget`): the "
                "checkpoints of this run may have been given them. `ddpm forget` says from which checkpoint a clean "
                "training can go on; start it under another name with init_from=, or from the beginning"
            )
    if differing:
        listed = "\n  ".join(differing)
        known = [f for f in named if f in state.identity and f != "data.sources"]  # which need addresses, too
        as_before = " ".join(f"{f}={override_value(state.identity[f])}" for f in known)
        remedy = f"add {as_before}" if as_before else "use the same settings"
        if as_before and "data.sources" in named:
            remedy += ", and give data.sources the names and weights that they had"
        raise ModelError(
            f"the run '{config.name}' was trained with other settings:\n  {listed}\n"
            f"To resume it, {remedy}; another name=… starts a new run"
            + (" (optim.decay=constant lets a run go on past its length)" if "images" in named else "")
        )


def _former(name: str, stored: Mapping[str, Any]) -> str:
    """Say that the default of a field was another one when a run was started; "" for other values."""
    if name not in FORMER_DEFAULTS or stored.get(name) != FORMER_DEFAULTS[name]:
        return ""
    return " (the default has changed since)"


def _require_bare_names(names: Iterable[str], where: str) -> None:
    """Refuse file names that would lead out of the checkpoint's folder.

    Raises:
        ModelError: names the first one.
    """
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\\" in name or name == layout.TRAINING_STATE:
            raise ModelError(
                f"{where}/{layout.TRAINING_STATE} lists {name!r}, which is no file of a checkpoint: it cannot be used"
            )
