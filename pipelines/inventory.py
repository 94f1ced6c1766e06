"""What storage and MLflow hold of runs and studies, and its removal; `pipelines.housekeeping` decides.

Everything is read anew for every decision. Where MLflow does not answer, nothing is decided and nothing is deleted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from pipelines import housekeeping, tracking
from pipelines.checkpoints import list_published
from pipelines.config import Config, ConfigError
from pipelines.display import Notice
from pipelines.housekeeping import GRACE_S, Folder, Origin, Removal, RunSummary, Verdict, folders
from pipelines.storage import NotFoundError, Storage, join
from pipelines.tracking import ModelVersion, RunRecord, Tracker
from pipelines.training.run_id import read_run_id


def list_runs(config: Config, storage: Storage) -> list[RunSummary]:
    """Return the runs of the configuration's experiment and storage, the newest first.

    Raises:
        TrackingError, StorageError: a service does not answer.
    """
    records = tracking.list_runs(_uri(config))
    stored = _below(storage, join(config.storage.root, "runs"))
    return housekeeping.summaries(records, stored, config.tracking.experiment, time.time())


# --- Removing a run ------------------------------------------------------------------------------------------


@contextmanager
def kept_from_training(config: Config, storage: Storage, notice: Notice) -> Iterator[None]:
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
    from pipelines.training.ray_train.resources import connect_ray

    try:
        connect_ray(config, storage)
    except TrainingError as error:
        notice(f"{error}; whether the run is being trained is judged by what it has written last")
        yield
        return
    try:
        with only_driver(config, wait_s=0):
            yield
    finally:
        ray.shutdown()


def find_removal(config: Config, storage: Storage, *, force: bool) -> Removal:
    """Return all that belongs to the run of the configuration, and whether it may be removed."""
    uri, address = _uri(config), join(config.storage.root, "runs", config.name)
    return housekeeping.plan_removal(
        Folder(address, tuple(storage.list(address))),
        tracking.list_runs(uri, config.name),
        tracking.all_versions(uri),
        own_id=read_run_id(storage, address),
        experiment=config.tracking.experiment,
        now=time.time(),
        force=force,
    )


def remove(removal: Removal, config: Config, storage: Storage) -> None:
    """Delete a run, in an order in which no interruption leaves something that looks usable; a repeat does the rest.

    What makes checkpoints complete goes first, then the MLflow run, then the files.
    """
    first, rest = housekeeping.removal_order(removal.folder)
    for address in first:
        storage.delete(address)
    for record in removal.records:
        end = tracking.retire_run if removal.versions else tracking.delete_run
        end(_uri(config), record.run_id)
    for address in rest:
        storage.delete(address)
    if not storage.list(removal.folder.address):
        storage.delete_folder(removal.folder.address)


# --- What nothing names --------------------------------------------------------------------------------------


def find_garbage(config: Config, storage: Storage, grace_s: float = GRACE_S) -> list[Verdict]:
    """Return published checkpoints, studies, evaluators, samples and features that nothing names.

    Raises:
        TrackingError, StorageError: a service does not answer: then nothing is known to be garbage.
    """
    now, uri, root = time.time(), _uri(config), config.storage.root
    records, versions = tracking.list_runs(uri), tracking.all_versions(uri)
    runs = _below(storage, join(root, "runs"))
    verdicts = _judge_published(runs, records, versions, storage, uri, now, grace_s)
    for study in _below(storage, join(root, "studies")):
        verdicts.append(housekeeping.judge_study(study, records, versions, now, grace_s))
    datasets, scores = _below(storage, join(root, "datasets")), _Scores(uri, records, versions)
    verdicts += _judge_evaluators(datasets, scores, storage, now, grace_s)
    for folder in _below(storage, join(root, "evaluations")):
        verdicts.append(housekeeping.judge_scored(folder, folder.name in scores.samples, "samples", now, grace_s))
    return [verdict for verdict in verdicts if verdict.garbage]


def collect(verdict: Verdict, storage: Storage) -> None:
    """Delete a folder that nothing names: `state.json` first, without which no checkpoint looks complete.

    The origin of a checkpoint is in its `model.json`, which goes last: a repeat decides alike after an interruption.
    """
    place = {"state.json": 0, "model.json": 2}
    for entry in sorted(verdict.folder.entries, key=lambda entry: place.get(entry.uri.rsplit("/", 1)[-1], 1)):
        storage.delete(entry.uri)
    if not storage.list(verdict.folder.address):
        storage.delete_folder(verdict.folder.address)


def _waits(run: Folder) -> bool:
    """Return whether MLflow has not taken all that a run recorded: published checkpoints may be in it."""
    return any(entry.uri == join(run.address, tracking.UNSENT) for entry in run.entries)


def _judge_published(
    runs: list[Folder],
    records: list[RunRecord],
    versions: list[ModelVersion],
    storage: Storage,
    uri: str,
    now: float,
    grace_s: float,
) -> list[Verdict]:
    present = [record for record in records if not record.deleted]
    verdicts, named = [], _Named(uri)
    for run in runs:
        published = folders(run.entries, join(run.address, "published"))
        # Any run may record what lies here; those of this name do as a rule, and the others are asked when they do not.
        own = [record for record in present if record.name == run.name]
        if not published or (own and _waits(run)):
            continue
        run_id = read_run_id(storage, run.address)
        origins = {folder.address: _origin(folder, run_id, storage) for folder in published}
        recorded = named.by(own)
        if not all(origins[folder.address].named_by(recorded, folder.name) for folder in published):
            recorded = named.by(present)
        for folder in published:
            origin = origins[folder.address]
            verdicts.append(housekeeping.judge_published(folder, origin, records, recorded, versions, now, grace_s))
    return verdicts


def _judge_evaluators(
    datasets: list[Folder], scores: _Scores, storage: Storage, now: float, grace_s: float
) -> list[Verdict]:
    """Decide about the evaluators of the datasets, and about the features that they gave the real images."""
    verdicts = []
    for dataset in datasets:
        digest = _read(storage, join(dataset.address, "dataset.json")).get("digest")
        for folder in folders(dataset.entries, join(dataset.address, "evaluator")):
            current = digest is None or folder.name == digest[:16]
            named = set() if current else scores.evaluators
            # One of each kind, in a folder of its own; an earlier release had one in all, without such a folder.
            records_there = [entry.uri for entry in folder.entries if entry.uri.endswith("/evaluator.json")]
            digests = {str(_read(storage, uri).get("digest")) for uri in records_there}
            verdicts.append(housekeeping.judge_evaluators(folder, digests, digest, named, now, grace_s))
        verdicts += [
            housekeeping.judge_scored(folder, folder.name in scores.features, "features", now, grace_s)
            for folder in folders(dataset.entries, join(dataset.address, "features"))
        ]
    return verdicts


class _Named:
    """The published checkpoints that runs record; each run is asked once."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.known: dict[str, set[str]] = {}

    def by(self, records: list[RunRecord]) -> set[tuple[str, str]]:
        """Return (ID, name) of those that these runs record, with the run's own ID and with MLflow's."""
        for record in records:
            if record.run_id not in self.known:
                published = list_published(Tracker(self.uri, record.run_id))
                self.known[record.run_id] = {one.uri.rsplit("/", 1)[-1] for one in published}
        return {
            (run, name)
            for record in records
            for run in (record.run_id, record.id)
            if run is not None
            for name in self.known[record.run_id]
        }


class _Scores:
    """What the scores of all runs and registered versions name; they are read when somebody asks."""

    def __init__(self, uri: str, records: list[RunRecord], versions: list[ModelVersion]) -> None:
        self.uri, self.records, self.versions = uri, [record for record in records if not record.deleted], versions

    @cached_property
    def _all(self) -> list[dict[str, Any]]:
        texts = [version.tags["scores"] for version in self.versions if "scores" in version.tags]
        for record in self.records:
            tracker = Tracker(self.uri, record.run_id)
            texts += [tracker.read_text(name) for name in tracker.names("evaluation")]
        return [json.loads(text) for text in texts]

    @cached_property
    def evaluators(self) -> set[str]:
        """Digests of the evaluators."""
        return {str(scores.get("evaluator_digest")) for scores in self._all}

    @cached_property
    def samples(self) -> set[str]:
        """Names of the folders of samples, which are digests; not their addresses, which are spelt with the root."""
        return {str(scores.get("samples")).rsplit("/", 1)[-1] for scores in self._all}

    @cached_property
    def features(self) -> set[str]:
        """Names of the folders of features."""
        found = [(str(scores.get("stream_digest")), str(scores.get("evaluator_digest"))) for scores in self._all]
        return {f"{stream[:16]}-{evaluator[:16]}" for stream, evaluator in found}


def _origin(folder: Folder, run_id: str | None, storage: Storage) -> Origin:
    lineage = _read(storage, join(folder.address, "model.json")).get("lineage") or {}
    return Origin(run_id, lineage.get("run_id"), lineage.get("images_seen"))


def _read(storage: Storage, address: str) -> dict[str, Any]:
    """Return a JSON object; nothing where there is none, or a damaged one."""
    try:
        plain = json.loads(storage.read(address))
    except (NotFoundError, ValueError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _below(storage: Storage, address: str) -> list[Folder]:
    return folders(storage.list(address), address)


def _uri(config: Config) -> str:
    if config.tracking.uri is None:
        raise ConfigError("no MLflow server is named: set tracking.uri or MLFLOW_TRACKING_URI, or run `ddpm up`")
    return config.tracking.uri
