"""What may be deleted, and why: decisions about values that were read from storage and MLflow; nothing is read here.

`pipelines.inventory` reads, asks these functions, and deletes. Whatever is not certain is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.filesize import decimal

from pipelines.checkpoints import epoch_of, names_checkpoint
from pipelines.errors import PipelineError
from pipelines.storage import Entry, join
from pipelines.tracking import ENDED, ModelVersion, RunRecord
from pipelines.training.log_lines import LIVE_S

GRACE_S = 86_400.0
"""Seconds for which nothing is garbage: its record may be on its way."""
State = Literal["running", "stopped", "finished", "failed", "unrecorded"]
_STATES: Mapping[str, State] = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}


class RemovalError(PipelineError):
    """A run is not removed; says why and what to do."""


@dataclass(frozen=True)
class Folder:
    """A folder on storage, with every object below it."""

    address: str
    entries: tuple[Entry, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rsplit("/", 1)[-1]

    @property
    def size(self) -> int:
        """Bytes of all that is in it."""
        return sum(entry.size for entry in self.entries)

    @property
    def modified(self) -> float | None:
        """When anything in it was last written, in seconds since the epoch; None where that is not sure."""
        times = [entry.modified for entry in self.entries]
        known = [time for time in times if time is not None]
        return max(known) if known and len(known) == len(times) else None

    def within(self, seconds: float, now: float) -> bool:
        """Return whether something was written in the last so many seconds, as far as one knows."""
        return self.modified is None or now - self.modified < seconds


def folders(entries: Iterable[Entry], parent: str) -> list[Folder]:
    """Return the folders directly below an address, in order of name, each with all that is in it."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.uri.startswith(f"{parent}/"):
            name, below, _ = entry.uri[len(parent) + 1 :].partition("/")
            if below:
                found.setdefault(name, []).append(entry)
    return [Folder(join(parent, name), tuple(found[name])) for name in sorted(found)]


# --- The list of runs ----------------------------------------------------------------------------------------


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


# --- Removing a run ------------------------------------------------------------------------------------------


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
        published = folders(self.folder.entries, join(self.folder.address, "published"))
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
    states = [e.uri for e in folder.entries if e.uri.endswith("/state.json") and e.uri not in direct]
    published = [uri for uri in states if uri.startswith(join(folder.address, "published"))]
    kept = sorted(set(states) - set(published), key=lambda uri: (epoch_of(uri.split("/")[-2]), uri))
    first = [*published, *kept[:-1], *direct, *kept[-1:]]
    return first, [e.uri for e in folder.entries if e.uri not in set(first)]


# --- What nothing names --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where a published checkpoint is from, as far as that is known.

    Attributes:
        id: of the run in whose folder it lies; None in those of earlier releases.
        run_id: of its MLflow run, by its `model.json`, as are the images seen.
    """

    id: str | None
    run_id: str | None
    images_seen: int | None

    def named_by(self, named: Iterable[tuple[str, str]], name: str) -> bool:
        """Return whether (run, name of a checkpoint) is among those that are recorded, for the run's id or MLflow's."""
        return any((run, name) in named for run in (self.id, self.run_id) if run is not None)


@dataclass(frozen=True)
class Verdict:
    """Whether a folder is garbage, and why or why not."""

    folder: Folder
    garbage: bool
    why: str


def judge_published(
    folder: Folder,
    origin: Origin,
    records: Sequence[RunRecord],
    named: Collection[tuple[str, str]],
    versions: Iterable[ModelVersion],
    now: float,
    grace_s: float = GRACE_S,
) -> Verdict:
    """Decide about a published checkpoint, `runs/RUN/published/X`.

    Args:
        records: MLflow's runs, deleted ones included.
        named: (ID, X) of the published checkpoints that all runs which are not deleted have recorded, with the run's
            own ID and with MLflow's; not their addresses, which change with the spelling of the root.
    """
    if folder.within(grace_s, now):
        return Verdict(folder, False, _young(grace_s))
    if origin.named_by(named, folder.name):
        return Verdict(folder, False, "an MLflow run records it")
    run_name = folder.address.split("/")[-3]
    if origin.id is not None or origin.run_id is not None:
        owners = [r for r in records if r.run_id == origin.run_id or (r.id is not None and r.id == origin.id)]
    else:  # a copy that was interrupted, in an earlier release
        owners = [record for record in records if record.name == run_name]
    for version in versions:
        if names_checkpoint(version, {record.run_id for record in owners}, origin.images_seen):
            return Verdict(folder, False, f"{version.uri} was made from it, or names it")
    if not owners:
        return Verdict(folder, False, "this MLflow server does not know its run: another may")
    present = [record for record in owners if not record.deleted]
    if not present:
        return Verdict(folder, True, f"the MLflow run of '{run_name}' is deleted")
    if any(record.status != "FINISHED" for record in present):
        return Verdict(folder, False, "its run has not finished and may still record it")
    return Verdict(folder, True, f"run '{run_name}' has finished and does not record it")


def judge_study(
    folder: Folder,
    records: Sequence[RunRecord],
    versions: Iterable[ModelVersion],
    now: float,
    grace_s: float = GRACE_S,
) -> Verdict:
    """Decide about a study, `studies/NAME`."""
    if folder.within(grace_s, now):
        return Verdict(folder, False, _young(grace_s))
    runs = [record for record in records if record.study == folder.name]
    if any(not record.deleted for record in runs):
        return Verdict(folder, False, "its MLflow run is there")
    for version in versions:
        if version.tags.get("study") == folder.name:
            return Verdict(folder, False, f"{version.uri} has its sampling settings from it")
    if not runs:
        return Verdict(folder, False, "this MLflow server does not know it: another may")
    return Verdict(folder, True, "the MLflow runs of the study and of its trials are deleted")


def judge_evaluators(
    folder: Folder,
    digests: Iterable[str],
    dataset_digest: str | None,
    named: Iterable[str],
    now: float,
    grace_s: float = GRACE_S,
) -> Verdict:
    """Decide about the evaluators that were trained on a dataset, one of each kind, `datasets/NAME/evaluator/X`.

    Args:
        digests: of those whose record is there.
        dataset_digest: of the dataset as it is now; None where there is none.
        named: digests of the evaluators of all scores of runs and registered versions.
    """
    if folder.within(grace_s, now):
        return Verdict(folder, False, _young(grace_s))
    if dataset_digest is None:
        return Verdict(folder, False, "its dataset has no dataset.json at the moment")
    if folder.name == dataset_digest[:16]:
        return Verdict(folder, False, "it has the evaluators of the dataset")
    if set(digests) & set(named):
        return Verdict(folder, False, "scores of a run or a registered version name one of them")
    return Verdict(folder, True, "the dataset has changed since, and no score names one of them")


def judge_scored(folder: Folder, named: bool, what: str, now: float, grace_s: float = GRACE_S) -> Verdict:
    """Decide about what an evaluation keeps: samples, `evaluations/X`, or features, `datasets/NAME/features/X`.

    Args:
        named: whether the scores of a run or of a registered version were computed from it.
        what: it is, in words.
    """
    if folder.within(grace_s, now):
        return Verdict(folder, False, _young(grace_s))
    if named:
        return Verdict(folder, False, "scores of a run or a registered version name it")
    return Verdict(folder, True, f"no score names these {what}, which an evaluation can make again")


def _listed(versions: Iterable[ModelVersion]) -> str:
    """Return versions with their aliases, in words."""
    return ", ".join(" ".join([v.uri, *(f"@{alias}" for alias in v.aliases)]) for v in versions)


def _young(grace_s: float) -> str:
    return f"it was written in {_span(grace_s)}"


def _span(seconds: float) -> str:
    return f"the last {seconds / 3600:g} hours"
