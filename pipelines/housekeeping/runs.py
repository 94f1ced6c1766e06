"""The runs that storage and MLflow have: their list, and the removal of one.

What is read is decided about by functions that read nothing. Everything is read again for every decision; where MLflow
does not answer, nothing is decided and nothing is deleted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from rich.filesize import decimal

from pipelines import tracking
from pipelines.checkpoints import epoch_of, names_checkpoint
from pipelines.config import Config
from pipelines.housekeeping.folders import Folder, folders, folders_at
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Notice
from pipelines.storage import Storage, join, layout
from pipelines.tracking import ENDED, ModelVersion, RunRecord
from pipelines.training.log_lines import LIVE_S
from pipelines.training.run_id import read_run_id

State = Literal["running", "stopped", "finished", "failed", "unrecorded"]
_STATES: Mapping[str, State] = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}


class RemovalError(PipelineError):
    """A run is not removed; says why and what to do."""


def list_runs(config: Config) -> list[RunSummary]:
    """Return the runs of the configuration's experiment and storage, the newest first.

    Raises:
        TrackingError, StorageError: a service does not answer.
    """
    records = tracking.list_runs(config.tracking.server)
    stored = folders_at(Storage.of(config), join(config.storage.root, layout.RUNS))
    return summaries(records, stored, config.tracking.experiment, time.time())


@dataclass(frozen=True)
class RunSummary:
    """A run in one row.

    Attributes:
        state: "running" only where something was written lately; "unrecorded" where MLflow has no run of the name.
        images_seen: the last step of its training curves.
        score: (name, value) of the newest score, if any.
        size: in bytes on storage.
        when: of its end, or of the last write, in seconds since the epoch.
    """

    name: str
    state: State
    images_seen: int
    score: tuple[str, float] | None
    size: int
    when: float | None
    run_id: str | None


def summaries(records: Sequence[RunRecord], stored: Sequence[Folder], experiment: str, now: float) -> list[RunSummary]:
    """Return the runs of an experiment and those that storage alone has, the newest first.

    Studies and their trials are left out where they have no folder of their own, as they have a table elsewhere.
    """
    by_name = {folder.name: folder for folder in stored}
    rows: dict[str, RunSummary] = {}
    for record in records:
        folder = by_name.get(record.name)
        if record.of(experiment) and record.name not in rows and (folder or record.study is None):
            rows[record.name] = _summary(record, folder, now)
    anywhere = {record.name for record in records if not record.deleted}
    for folder in stored:
        if folder.name not in anywhere:
            rows[folder.name] = RunSummary(folder.name, "unrecorded", 0, None, folder.size, folder.modified, None)
    return sorted(rows.values(), key=lambda row: -(row.when or 0))


def _summary(record: RunRecord, folder: Folder | None, now: float) -> RunSummary:
    written = folder.modified if folder else None
    # A driver that was killed could not tell MLflow.
    state = _STATES.get(record.status) or ("running" if folder and folder.within(LIVE_S, now) else "stopped")
    seen = max((step for key, (_, step) in record.metrics.items() if key.startswith(("train/", "goodput/"))), default=0)
    when = record.ended if record.status in ENDED else written or record.began
    size = folder.size if folder else 0
    return RunSummary(record.name, state, seen, _score(record.metrics), size, when, record.run_id)


def _score(metrics: Mapping[str, tuple[float, int]]) -> tuple[str, float] | None:
    """Return (name, value) of the newest score of an evaluation: the Frechet distance where there is one."""
    scores = {key: found for key, found in metrics.items() if key.startswith("eval/")}
    if not scores:
        return None
    last = max(scores, key=lambda key: (scores[key][1], key == "eval/frechet_distance"))
    return last.removeprefix("eval/"), scores[last][0]


@dataclass(frozen=True)
class Removal:
    """All that belongs to a run, which may be removed.

    Attributes:
        records: its MLflow runs that are not in the trash.
        versions: registered versions that were made from it or name it; they stay.
    """

    folder: Folder
    records: tuple[RunRecord, ...]
    versions: tuple[ModelVersion, ...]

    def lines(self) -> list[str]:
        """Return what goes and what stays, in words."""
        published = folders(self.folder.entries, join(self.folder.address, layout.PUBLISHED))
        size, objects = decimal(self.folder.size), len(self.folder.entries)
        lines = [f"{self.folder.address}: {size} in {objects:,} objects"]
        if published:
            lines.append(f"published checkpoints in it: {', '.join(folder.name for folder in published)}")
        for record in self.records:
            run = f"MLflow run {record.run_id} ({record.status.lower()}, experiment '{record.experiment}')"
            lines.append(f"{run} stays without its name" if self.versions else f"{run}, into MLflow's trash")
        if self.versions:
            lines.append(f"stay, and lose what the run had stored: {_listed(self.versions)}")
        return lines


def plan_removal(
    folder: Folder,
    records: Sequence[RunRecord],
    versions: Sequence[ModelVersion],
    *,
    own_id: str | None,
    experiment: str,
    now: float,
    force: bool,
) -> Removal:
    """Decide whether a run may be removed, and return all that belongs to it.

    Args:
        folder: of the run; without entries where storage has nothing of it.
        records: MLflow's runs of its name; those with another id than the folder's are of another folder.
        versions: of all registered models.
        own_id: the id in the folder; None where it has none.
        force: whether it may go although versions were made from it.

    Raises:
        RemovalError: there is no such run, or it may not go; says why and what to do.
    """
    records = [record for record in records if own_id is None or record.id in (None, own_id)]
    own = tuple(record for record in records if record.of(experiment))
    if not folder.entries and not own:
        raise RemovalError(
            f"no run '{folder.name}': nothing is stored at {folder.address}, and MLflow has none in experiment "
            f"'{experiment}'. `ddpm runs` lists those that there are"
        )
    # A run of this name in another experiment has the same folder.
    ended = bool(own) and all(record.status in ENDED for record in records if not record.deleted)
    if folder.entries and not ended and folder.within(LIVE_S, now):
        raise RemovalError(
            f"run '{folder.name}' may be being trained: something was written at {folder.address} less than "
            f"{LIVE_S:.0f} s ago, and MLflow does not say that it has ended. Stop it with Ctrl-C, or wait a minute"
        )
    ids = {record.run_id for record in records if record.experiment == experiment}
    made = tuple(version for version in versions if names_checkpoint(version, ids, None))
    if made and not force:
        raise RemovalError(
            f"registered versions were made from run '{folder.name}' or name it: {_listed(made)}. Delete them first, "
            "or use --force, with which its files go, and the versions and the MLflow run with their evidence stay"
        )
    return Removal(folder, own, made)


def removal_order(folder: Folder) -> tuple[list[str], list[str]]:
    """Return the addresses to delete as (those after which no checkpoint can be resumed or read, the rest).

    A checkpoint is complete while it has a `state.json`, and a run resumes from the newest complete one. That one goes
    last: until then the run is what it was, and from then on it has no checkpoint, as if it had never begun. What lies
    directly in the folder, such as the list of the checkpoints, goes just before.
    """
    direct = [e.uri for e in folder.entries if "/" not in e.uri[len(folder.address) + 1 :]]
    states = [e.uri for e in folder.entries if e.uri.endswith(f"/{layout.TRAINING_STATE}") and e.uri not in direct]
    published = [uri for uri in states if uri.startswith(join(folder.address, layout.PUBLISHED))]
    kept = sorted(set(states) - set(published), key=lambda uri: (epoch_of(uri.split("/")[-2]), uri))
    first = [*published, *kept[:-1], *direct, *kept[-1:]]
    return first, [e.uri for e in folder.entries if e.uri not in set(first)]


@contextmanager
def kept_from_training(config: Config, notice: Notice) -> Iterator[None]:
    """Keep drivers on the Ray cluster of the configuration, where one answers, from training a run meanwhile.

    Raises:
        TrainingError: the run is being trained.
    """
    if config.cluster.address is None:
        yield
        return
    # Not at the top: the list of runs needs no Ray.
    import ray

    from pipelines.training.errors import TrainingError
    from pipelines.training.ray_train.monitor import only_driver
    from pipelines.training.resources import connect_ray

    try:
        connect_ray(config)
    except TrainingError as error:
        notice(f"{error}; whether the run is being trained is judged by what it has written last")
        yield
        return
    try:
        with only_driver(config, wait_s=0):
            yield
    finally:
        ray.shutdown()


def find_removal(config: Config, *, force: bool) -> Removal:
    """Return all that belongs to the run of the configuration, and whether it may be removed."""
    storage = Storage.of(config)
    uri, address = config.tracking.server, layout.run_folder(config.storage.root, config.name)
    return plan_removal(
        Folder(address, tuple(storage.list(address))),
        tracking.list_runs(uri, config.name),
        tracking.all_versions(uri),
        own_id=read_run_id(storage, address),
        experiment=config.tracking.experiment,
        now=time.time(),
        force=force,
    )


def remove(removal: Removal, config: Config) -> None:
    """Delete a run, in an order in which no interruption leaves something that looks usable; a repeat does the rest.

    What makes checkpoints complete goes first, then the MLflow run, then the files.
    """
    storage = Storage.of(config)
    first, rest = removal_order(removal.folder)
    for address in first:
        storage.delete(address)
    for record in removal.records:
        end = tracking.retire_run if removal.versions else tracking.delete_run
        end(config.tracking.server, record.run_id)
    for address in rest:
        storage.delete(address)
    if not storage.list(removal.folder.address):
        storage.delete_folder(removal.folder.address)


def _listed(versions: Iterable[ModelVersion]) -> str:
    """Return versions with their aliases, in words."""
    return ", ".join(" ".join([v.uri, *(f"@{alias}" for alias in v.aliases)]) for v in versions)
