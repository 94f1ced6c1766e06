"""Folders that nothing refers to and that may be deleted; what runs and versions need, directly or not, stays.

Things are named by what they are, such as a digest or a run and the images that it had seen, never by an address, which
changes with the spelling of the storage root. Whatever is not certain is kept, and whatever was written lately: its
record may be on its way.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines import tracking
from pipelines.checkpoints import list_published, mentioned
from pipelines.config import Config
from pipelines.evaluation.scores import rests_on
from pipelines.housekeeping.folders import Folder, folders, folders_at
from pipelines.signing import said
from pipelines.storage import Storage, join, layout
from pipelines.tracking import ModelVersion, RunRecord, Tracker
from pipelines.training.run_id import read_run_id

GRACE_S = 86_400.0
"""Seconds for which nothing is garbage: its record may be on its way."""


@dataclass(frozen=True)
class Stored:
    """A folder that may be deleted where nothing names it.

    Attributes:
        names: by which others name it.
        why: it may go where nothing does, in words.
        kept: why it stays whatever names it; None where it does not.
        rests_on: names of what stays while it stays.
    """

    folder: Folder
    names: frozenset[str]
    why: str
    kept: str | None = None
    rests_on: frozenset[str] = frozenset()


@dataclass(frozen=True)
class GarbageVerdict:
    """Whether a folder is garbage, and why or why not."""

    folder: Folder
    garbage: bool
    why: str


def judge(
    stored: Sequence[Stored], named: Mapping[str, str], now: float, grace_s: float = GRACE_S
) -> list[GarbageVerdict]:
    """Decide about folders: what is named stays, and so does what it rests on, over any number of steps.

    Args:
        named: names of what runs and versions rest on -> which does, in words.
        now: seconds since the epoch.
        grace_s: seconds after its last write for which a folder stays.
    """
    stay: dict[str, str] = {}
    for one in stored:
        by = [named[name] for name in sorted(one.names & named.keys())]
        young = f"it was written in the last {grace_s / 3600:g} hours" if one.folder.within(grace_s, now) else None
        if reason := young or one.kept or next(iter(by), None):
            stay[one.folder.address] = reason
    todo = [one for one in stored if one.folder.address in stay]
    by_name: dict[str, list[Stored]] = defaultdict(list)
    for one in stored:
        for name in one.names:
            by_name[name].append(one)
    while todo:
        one = todo.pop()
        for other in (found for name in sorted(one.rests_on) for found in by_name[name]):
            if other.folder.address not in stay:
                stay[other.folder.address] = f"{one.folder.address} rests on it"
                todo.append(other)
    return [
        GarbageVerdict(one.folder, one.folder.address not in stay, stay.get(one.folder.address, one.why))
        for one in stored
    ]


def find_garbage(config: Config, grace_s: float = GRACE_S) -> list[GarbageVerdict]:
    """Return published checkpoints, studies, evaluators, samples and features that nothing names.

    Raises:
        TrackingError, StorageError: a service does not answer: then nothing is known to be garbage.
    """
    storage = Storage.of(config)
    now, uri, root = time.time(), config.tracking.server, config.storage.root
    records, versions = tracking.list_runs(uri), tracking.all_versions(uri)
    published = _published(folders_at(storage, join(root, layout.RUNS)), records, storage, uri)
    studies = _studies(folders_at(storage, join(root, layout.STUDIES)), records, storage)
    scored = _judges(folders_at(storage, join(root, layout.DATASETS)), storage)
    scored += [
        Stored(folder, frozenset({f"samples/{folder.name}"}), _again("samples"))
        for folder in folders_at(storage, join(root, layout.EVALUATIONS))
    ]
    named = _named(versions, records, uri, scores=bool(scored))
    verdicts = judge([*published, *studies, *scored], named, now, grace_s)
    return [verdict for verdict in verdicts if verdict.garbage]


def collect(verdict: GarbageVerdict, storage: Storage) -> None:
    """Delete a folder that nothing names: `state.json` first, without which no checkpoint looks complete.

    The origin of a checkpoint is in its `model.json`, which goes last: a repeat decides alike after an interruption.
    """
    place = {layout.TRAINING_STATE: 0, layout.MODEL: 2}
    for entry in sorted(verdict.folder.entries, key=lambda entry: place.get(entry.uri.rsplit("/", 1)[-1], 1)):
        storage.delete(entry.uri)
    if not storage.list(verdict.folder.address):
        storage.delete_folder(verdict.folder.address)


def _named(versions: Iterable[ModelVersion], records: Iterable[RunRecord], uri: str, *, scores: bool) -> dict[str, str]:
    """Return the names of what versions and runs rest on -> which does, in words.

    Args:
        scores: whether the scores of runs are read, of which there may be many.
    """
    named: dict[str, str] = {}
    for version in versions:
        tags = version.tags
        found = _mentioned(*tags.values()) | _checkpoint(version.run_id, tags.get("images_seen"))
        found |= rests_on(json.loads(tags.get("scores", "{}")))
        found |= {f"study/{tags['study']}"} if "study" in tags else set()
        named |= dict.fromkeys(found, f"{version.uri} was made from it, or names it")
    for record in records:
        if record.deleted:
            continue
        found = {f"study/{record.study}"} if record.study is not None else set()
        if scores:
            tracker = Tracker(uri, record.run_id)
            for name in tracker.names(layout.SCORES_RECORDED):
                found |= rests_on(json.loads(tracker.read_text(name)))
        named |= dict.fromkeys(found, f"the MLflow run of '{record.name}' names it")
    return named


def _checkpoint(run_id: str, images: str | None) -> set[str]:
    """Return the names of a published checkpoint that something names by its run and the images it had seen."""
    # Without a number of images any checkpoint of the run is meant; some do not say at how many they were made.
    return {f"{run_id}/any"} if not images else {f"{run_id}/{images}", f"{run_id}/unknown"}


def _mentioned(*texts: str) -> set[str]:
    """Return the names of the published checkpoints of which texts have MODEL references."""
    return {name for text in texts for pair in mentioned(text) for name in _checkpoint(*pair)}


def _published(runs: Iterable[Folder], records: Sequence[RunRecord], storage: Storage, uri: str) -> list[Stored]:
    """Return the published checkpoints of runs."""
    found = []
    for run in runs:
        published = folders(run.entries, join(run.address, layout.PUBLISHED))
        own_id = read_run_id(storage, run.address) if published else None
        waits = any(entry.uri == join(run.address, layout.UNSENT) for entry in run.entries)
        waits &= any(record.name == run.name and not record.deleted for record in records)
        recorded: dict[str, set[str]] = {}
        for folder in published:
            model = _read(storage, join(folder.address, layout.MODEL))
            lineage = model.get("lineage") or {}
            run_id, images = lineage.get("run_id"), lineage.get("images_seen", "unknown")
            owners = [r for r in records if r.run_id == run_id or (r.id is not None and r.id == own_id)]
            for owner in owners if not waits else ():
                if owner.run_id not in recorded and not owner.deleted:
                    there = list_published(Tracker(uri, owner.run_id))
                    recorded[owner.run_id] = {one.uri.rsplit("/", 1)[-1] for one in there}
            kept = "MLflow has not taken all that its run recorded" if waits else None
            if any(folder.name in recorded.get(owner.run_id, ()) for owner in owners):
                kept = "an MLflow run records it"
            if own_id is None and run_id is None:  # a copy that was interrupted, in an earlier release
                owners = [record for record in records if record.name == run.name]
            why, unsure = _of_owners(run.name, owners)
            names = frozenset(f"{owner.run_id}/{at}" for owner in owners for at in (images, "any"))
            found.append(Stored(folder, names, why, kept or unsure, frozenset(_mentioned(json.dumps(model)))))
    return found


def _of_owners(run: str, owners: Sequence[RunRecord]) -> tuple[str, str | None]:
    """Return why a published checkpoint may go where nothing names it, and why it stays all the same, if it does.

    Args:
        owners: the MLflow runs that it is of.
    """
    present = [owner for owner in owners if not owner.deleted]
    if not owners:
        return "", "this MLflow server does not know its run: another may"
    if any(owner.status != "FINISHED" for owner in present):
        return "", "its run has not finished and may still record it"
    if present:
        return f"run '{run}' has finished and does not record it", None
    return f"the MLflow run of '{run}' is deleted", None


def _studies(studies: Iterable[Folder], records: Sequence[RunRecord], storage: Storage) -> list[Stored]:
    """Return the studies; the models that they are about stay while they do."""
    found = []
    for folder in studies:
        known = any(record.study == folder.name for record in records)
        kept = None if known else "this MLflow server does not know it: another may"
        models = _mentioned(json.dumps(_read(storage, join(folder.address, layout.STUDY))))
        why = "the MLflow runs of the study and of its trials are deleted"
        found.append(Stored(folder, frozenset({f"study/{folder.name}"}), why, kept, frozenset(models)))
    return found


def _judges(datasets: Iterable[Folder], storage: Storage) -> list[Stored]:
    """Return the evaluators that were trained on datasets, and the features that evaluators gave the real images."""
    found = []
    for dataset in datasets:
        digest = _read(storage, join(dataset.address, layout.DATASET)).get("digest")
        for folder in folders(dataset.entries, join(dataset.address, layout.EVALUATORS)):
            # One of each kind, in a folder of its own; an earlier release had one in all, without such a folder.
            there = [entry.uri for entry in folder.entries if entry.uri.endswith(f"/{layout.EVALUATOR}")]
            names = {f"{layout.EVALUATORS}/{str(_read(storage, uri).get('digest'))[:16]}" for uri in there}
            kept = "its dataset has no dataset.json at the moment" if digest is None else None
            if digest is not None and folder.name == digest[:16]:
                kept = "it has the evaluators of the dataset"
            why = "the dataset has changed since, and no score names one of them"
            found.append(Stored(folder, frozenset(names), why, kept))
        for folder in folders(dataset.entries, join(dataset.address, layout.FEATURES)):
            evaluator = f"{layout.EVALUATORS}/{folder.name.rpartition('-')[2]}"
            names = {f"{layout.FEATURES}/{folder.name}"}
            found.append(Stored(folder, frozenset(names), _again("features"), None, frozenset({evaluator})))
    return found


def _again(what: str) -> str:
    """Return why something that an evaluation keeps may go."""
    return f"no score names these {what}, which an evaluation can make again"


def _read(storage: Storage, address: str) -> dict[str, Any]:
    """Return what a JSON object says, signed or not; nothing where there is none, or a damaged one."""
    return said(storage.find(address) or b"{}")
