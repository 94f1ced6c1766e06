"""Published checkpoints: copies that are kept, recorded in MLflow with their scores."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed
from torch import Tensor

from ddpm.ema import PowerSnapshot, reconstruct
from ddpm.model import ModelSpec
from ddpm.tensor_files import LARGEST_FILE, files_of, index_name, index_text, read_weights, split_files
from pipelines import tracking
from pipelines.checkpoints.errors import ModelError
from pipelines.checkpoints.files import EMA, POWER, CheckpointState
from pipelines.checkpoints.sharded import Assembled, read_index
from pipelines.environment.scratch import temporary_folder
from pipelines.storage import Storage, file_sha256, join, layout
from pipelines.tracking import Tracker

BEST = "eval/frechet_distance"
"""The score by which the best checkpoint of a run is chosen; lower is better."""


@dataclass(frozen=True)
class Published:
    """A published checkpoint, as recorded in MLflow.

    Attributes:
        digest: SHA-256 over those of its files.
        scores: name -> value of evaluation scores, recorded after publishing.
        deleted: whether its files were deleted again, by `checkpoint.keep_best`.
    """

    uri: str
    images_seen: int
    digest: str
    scores: dict[str, float] = field(default_factory=dict)
    deleted: bool = False

    @classmethod
    def read(cls, tracker: Tracker, name: str) -> Published:
        """Read the record in an artifact of a run, again where it is cut short: scores are being added to it.

        Raises:
            ValueError: it is damaged.
        """
        cut_short = retry_if_exception_type(json.JSONDecodeError)
        again = Retrying(retry=cut_short, stop=stop_after_attempt(10), wait=wait_fixed(0.2), reraise=True)
        return cls(**again(lambda: json.loads(tracker.read_text(name))))

    @property
    def name(self) -> str:
        """Name of the artifact that records it in the MLflow run; names order by images seen."""
        return f"{layout.CHECKPOINTS_RECORDED}/{layout.numbered(self.images_seen)}"

    @property
    def mark(self) -> str:
        """The address of the files, which no other writer uses: every record of them contains it."""
        return f'"uri": {tracking.to_json(self.uri)}'

    def record(self) -> tuple[str, str]:
        """Return (text, name) of the artifact that records it in the MLflow run."""
        return tracking.to_json(asdict(self)), self.name


def publish(storage: Storage, uri: str, target_uri: str, state: CheckpointState) -> Published:
    """Copy a checkpoint's files to an address where they are kept, `state.json` last, and return their record.

    Of a sharded one, the averaged weights are assembled as they are in the files of any other, a stream that nobody
    holds whole, and the rest of the training's state is left out.

    Raises:
        ModelError: a part is damaged, gone or cut short.
    """
    if state.sharded:
        state = _assemble(storage, uri, target_uri, state)
    else:
        for name in state.files:
            storage.copy(join(uri, name), join(target_uri, name))
    storage.write(join(target_uri, layout.TRAINING_STATE), state.to_json().encode())
    return Published(target_uri, state.images_seen, _digest_of(state))


def _assemble(storage: Storage, uri: str, target_uri: str, state: CheckpointState) -> CheckpointState:
    """Store the averaged weights of a sharded checkpoint as whole tensors, and return the state that names the files.

    Above `LARGEST_FILE` they are in several files with an index.
    """
    index = read_index(storage, uri, state.files)
    storage.copy(join(uri, layout.MODEL), join(target_uri, layout.MODEL))
    files, sizes = {layout.MODEL: state.files[layout.MODEL]}, {layout.MODEL: state.sizes[layout.MODEL]}
    averaged = {name.removeprefix(EMA): name for name in index.tensors if name.startswith(EMA)}
    power = {name: name for name in index.tensors if name.startswith(POWER)}
    for name, stored in ((layout.WEIGHTS, averaged), (layout.POWER_EMA, power)):
        bytes_of = {tensor: index.tensors[there].nbytes for tensor, there in stored.items()}
        groups = split_files(name, bytes_of, LARGEST_FILE) if stored else {}
        for file, inside in groups.items():
            assembled = Assembled(storage, uri, index, {stored[tensor]: tensor for tensor in inside})
            files[file], sizes[file] = assembled.upload(join(target_uri, file))
        if len(groups) > 1:
            text, file = index_text(groups, bytes_of).encode(), index_name(name)
            storage.write(join(target_uri, file), text)
            files[file], sizes[file] = hashlib.sha256(text).hexdigest(), len(text)
    return replace(state, files=files, sizes=sizes)


def _digest_of(state: CheckpointState) -> str:
    return hashlib.sha256(json.dumps(state.files, sort_keys=True).encode()).hexdigest()


def fetch_published(published: Published, storage: Storage, folder: Path, *names: str) -> CheckpointState:
    """Download files of a published checkpoint, each of which has to be what was published; return its state.

    Args:
        names: of files; tensors in several files go by the name of the one that would hold them all.

    Raises:
        ModelError: a file or `state.json` is not the one whose digest was recorded, or is not there.
    """
    state = published_state(published, storage)
    for name in (file for wanted in names for file in files_of(wanted, state.files) or [wanted]):
        storage.download(join(published.uri, name), folder / name)
        found = file_sha256(folder / name)
        if found != state.files.get(name):
            raise ModelError(
                f"{join(published.uri, name)} is not the file that was published: its SHA-256 is {found[:12]}, that in "
                f"{layout.TRAINING_STATE} {state.files.get(name, 'none')[:12]}; it was changed or damaged: "
                "use another checkpoint"
            )
    return state


def published_state(published: Published, storage: Storage) -> CheckpointState:
    """Return the state of a published checkpoint, which names its files' digests.

    Raises:
        ModelError: it is damaged, of another version, or of other files than those recorded in MLflow.
    """
    state = CheckpointState.from_json(storage.read(join(published.uri, layout.TRAINING_STATE)), published.uri)
    if _digest_of(state) != published.digest:
        raise ModelError(
            f"{join(published.uri, layout.TRAINING_STATE)} names other files than the record in MLflow "
            f"({_digest_of(state)[:12]} instead of {published.digest[:12]}): the checkpoint was "
            "changed or damaged; use another one"
        )
    return state


def published_spec(published: Published, storage: Storage) -> ModelSpec:
    """Return the description of the model of a published checkpoint, without its weights.

    Raises:
        ModelError: it is damaged, changed or of another version.
    """
    with temporary_folder("spec") as scratch:
        fetch_published(published, storage, scratch, layout.MODEL)
        text = (scratch / layout.MODEL).read_text()
    try:
        return ModelSpec.from_json(text)
    except ValueError as error:
        raise ModelError(f"{published.uri}: {error}") from error


def record_published(tracker: Tracker, published: Published) -> None:
    """Record a published checkpoint in the MLflow run, or update its record."""
    tracker.text(*published.record())


def list_published(tracker: Tracker, *, deleted: bool = False) -> list[Published]:
    """Return a run's published checkpoints, oldest first.

    Args:
        deleted: whether those are among them whose files were deleted again; their scores stay.
    """
    records = [Published.read(tracker, name) for name in sorted(tracker.names(layout.CHECKPOINTS_RECORDED))]
    return [published for published in records if deleted or not published.deleted]


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
    with temporary_folder("power") as scratch:
        for published in list_published(tracker):
            state = published_state(published, storage)
            if not files_of(layout.POWER_EMA, state.files):
                continue
            (folder := scratch / str(published.images_seen)).mkdir()
            fetch_published(published, storage, folder, layout.POWER_EMA)
            by_width: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for full, tensor in read_weights(folder, layout.POWER_EMA).items():
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
