"""What has seen a picture: trainings, their checkpoints, models tuned from them, versions, and what judges."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines import tracking
from pipelines.checkpoints import mentioned
from pipelines.config import Config
from pipelines.presentation.errors import ConfigError
from pipelines.provenance.find import EXPLAINED, Match, Query, find, plain
from pipelines.provenance.trained import (
    Occurrence,
    Training,
    UnknownOrderError,
    read_trainings,
    times_before,
)
from pipelines.search.study import StudyError, StudyStore
from pipelines.shards.audit.recorded import TarReading
from pipelines.shards.index import DatasetError, read_dataset
from pipelines.shards.joined import TRAIN
from pipelines.signing import Signer
from pipelines.storage import Storage, join, layout
from pipelines.tracking import ModelVersion

SHOWN = 5
"""Largest number of samples and ordinals in a line; `--json` has all."""
STATEMENT_VERSION = 1
NOT_PROVEN = (
    "It says what the records below this root say. It does not prove that no other copy of the picture was trained on: "
    "data that were trained on elsewhere, or whose records were deleted, are not in it. Near-duplicates are found by a "
    "fingerprint that misses some crops and strong changes. That a model was given a picture does not mean that it can "
    "draw it, and that it was given none does not mean that it draws nothing like it."
)
_VERSION = re.compile(r"models:/([^/@\s\"]+)(?:/(\d+)|@([\w.-]+))")


@dataclass(frozen=True)
class Exposure:
    """How a training was given the picture.

    Attributes:
        training: the training.
        occurrences: every time, in order.
        through: earlier models whose weights it began from and that had been given the picture, in words.
        unknown: why the occurrences cannot be known; None where they are.
        study: name of the study whose trial it is; None for another training.
    """

    training: Training
    occurrences: tuple[Occurrence, ...] = ()
    through: tuple[str, ...] = ()
    unknown: str | None = None
    study: str | None = None

    def times(self, images_seen: int) -> int:
        """Return how often the model at so many images had been given the picture itself."""
        return times_before(self.occurrences, images_seen)

    @property
    def concerned(self) -> bool:
        """Whether a model of it may have been given the picture."""
        return bool(self.occurrences or self.through or self.unknown)

    def to_dict(self) -> dict[str, Any]:
        """Return the exposure as JSON types."""
        return {
            "run": self.training.run,
            "run_id": self.training.run_id,
            "study": self.study,
            "images_seen": self.training.images_seen,
            "times": len(self.occurrences),
            "occurrences": [asdict(each) for each in self.occurrences],
            "checkpoints": [{**asdict(kept), "times": self.times(kept.images_seen)} for kept in self.training.kept],
            "through": list(self.through),
            "unknown": self.unknown,
        }


@dataclass(frozen=True)
class SeenVersion:
    """A registered version that was given the picture, or may have been.

    Attributes:
        version: the version.
        images_seen: by its checkpoint.
        times: how often it had been given the picture itself.
        because: of what it is here, in words.
    """

    version: ModelVersion
    images_seen: int
    times: int
    because: str

    def to_dict(self) -> dict[str, Any]:
        """Return the version as JSON types."""
        named = {"version": self.version.uri, "aliases": list(self.version.aliases), "run_id": self.version.run_id}
        return {**named, "images_seen": self.images_seen, "times": self.times, "because": self.because}


@dataclass(frozen=True)
class Judge:
    """Something that judges models, and what the picture is in it."""

    address: str
    role: str


@dataclass(frozen=True)
class Seen:
    """Where a picture is, and what has seen it.

    Attributes:
        query: what was looked for.
        root: address below which runs were looked at.
        searched: address -> digest of the datasets that were searched.
        matches: samples that are the picture.
        exposures: trainings that were given it.
        versions: registered versions that were; None where no MLflow server could be asked.
        judges: what judges models with it: evaluators, features of real images, scores of versions, and studies.
        notes: what could not be looked at.
    """

    query: Query
    root: str
    searched: Mapping[str, str]
    matches: tuple[Match, ...]
    exposures: tuple[Exposure, ...] = ()
    versions: tuple[SeenVersion, ...] | None = None
    judges: tuple[Judge, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def nowhere(self) -> list[str]:
        """What was looked for, and is in no dataset, as it is named."""
        found = {name for match in self.matches for name in match.asked}
        return [one.named for one in self.query.each if one.named not in found]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types, for `--json`."""
        return {
            "query": self.query.named,
            "nowhere": self.nowhere,
            "root": self.root,
            "searched": dict(self.searched),
            "matches": [plain(match) for match in self.matches],
            "trainings": [exposure.to_dict() for exposure in self.exposures],
            "versions": None if self.versions is None else [version.to_dict() for version in self.versions],
            "judges": [asdict(judge) for judge in self.judges],
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """Yield what was found, in words."""
        datasets = f"{len(self.searched):,} dataset{'s' * (len(self.searched) != 1)}"
        for name in self.nowhere:
            what = f"{name}: " if self.query.listed else ""
            yield f"{what}in none of {datasets}: {', '.join(self.searched) or 'there are none'}"
        for match in self.matches[:SHOWN]:
            sure = f" ({match.similarity:.1%})" if match.how.startswith("near") else ""
            gone = ", which was erased" if match.erased else ""
            what = f"sample {match.key} of {match.shard}, split {match.split}"
            yield f"{match.uri}: {what}: {EXPLAINED[match.how]}{sure}{gone}"
        if len(self.matches) > SHOWN:
            yield f"… and {len(self.matches) - SHOWN:,} more samples: --json has all"
        for exposure in self.exposures:
            yield from _training_lines(exposure)
        for seen in self.versions or ():
            names = " ".join([seen.version.uri, *(f"@{alias}" for alias in seen.version.aliases)])
            yield f"{names}: {seen.because}"
        for judge in self.judges:
            yield f"{judge.address}: {judge.role}"
        if self.matches and not self.exposures:
            yield "no training whose checkpoints are stored was given it"
        if self.versions is None:
            yield "no MLflow server answers, so registered versions were not looked at"
        yield from self.notes


def _training_lines(exposure: Exposure) -> Iterator[str]:
    training, study = exposure.training, f" (a trial of study '{exposure.study}')" if exposure.study else ""
    name = f"run '{training.run}'{study}"
    if exposure.unknown is not None:
        yield f"{name}: not known: {exposure.unknown}"
    if exposure.occurrences:
        count, last = len(exposure.occurrences), training.images_seen
        ordinals = ", ".join(f"{each.ordinal:,}" for each in exposure.occurrences[:SHOWN])
        more = ", …" if count > SHOWN else ""
        yield (
            f"{name}: {count:,} time{'s' * (count != 1)} in {last:,} images, at ordinal{'s' * (count != 1)} "
            f"{ordinals}{more}"
        )
        kept = [
            f"{exposure.times(each.images_seen):,} at {each.images_seen:,} images"
            for each in {each.images_seen: each for each in training.kept}.values()
        ]
        yield f"{name}: times before each checkpoint that is stored: {', '.join(kept)}"
    for origin in exposure.through:
        yield f"{name}: began from {origin}"


def look(
    query: Query,
    config: Config,
    reading: Callable[[], TarReading],
    *,
    data: Sequence[str] = (),
    near: bool = True,
) -> Seen:
    """Find a picture in all datasets below the storage root, and what has seen it.

    Args:
        query: what is looked for.
        config: of the root, and of the MLflow server where one is running.
        reading: returns how tars are read.
        data: addresses of further datasets; those that runs name are searched anyway.
        near: look for near-duplicates as well.

    Raises:
        DatasetError: a dataset that was named is missing or damaged.
        StorageError, TrackingError: a service does not answer.
    """
    storage, root = Storage.of(config), config.storage.root
    trainings, notes = read_trainings(root, storage), []
    below = _folders(join(root, layout.DATASETS), layout.DATASET, storage)
    searched: dict[str, str] = {}
    matches: list[Match] = []
    for uri in dict.fromkeys([*data, *below, *(uri for each in trainings for uri in each.data)]):
        try:
            dataset = read_dataset(uri, storage)
        except DatasetError as error:
            if uri in data:
                raise
            notes.append(f"not searched: {error}")
            continue
        searched[uri] = dataset.digest
        matches += find(query, dataset, storage, reading(), near=near)
    versions = None if config.tracking.uri is None else tracking.all_versions(config.tracking.server)
    studies = {} if versions is None else _studies(config)
    exposures = _exposures(trainings, matches, storage, versions or (), studies)
    seen = None if versions is None else tuple(_versions(versions, exposures))
    judges = tuple(judge for uri in searched for judge in _judges(uri, matches, root, storage, versions or ()))
    concerned = tuple(exposure for exposure in exposures if exposure.concerned)
    return Seen(query, root, searched, tuple(matches), concerned, seen, judges, tuple(notes))


def _folders(below: str, file: str, storage: Storage) -> list[str]:
    """Return the addresses of the folders below an address that have a file of this name."""
    end = f"/{file}"
    return sorted(entry.uri.removesuffix(end) for entry in storage.scan(below) if entry.uri.endswith(end))


def _studies(config: Config) -> dict[str, str]:
    """Return MLflow run -> name of the study that it is a trial of."""
    return {record.run_id: record.study for record in tracking.list_runs(config.tracking.server) if record.study}


def _exposures(
    trainings: Iterable[Training],
    matches: Sequence[Match],
    storage: Storage,
    versions: Sequence[ModelVersion],
    studies: Mapping[str, str],
) -> list[Exposure]:
    """Return what is known of each training, those that others began from first."""
    trainings, of_data = list(trainings), {match.uri for match in matches}
    direct: dict[str, Exposure] = {}
    for training in trainings:
        occurrences: tuple[Occurrence, ...] = ()
        unknown = None
        try:
            if of_data & set(training.data):
                occurrences = tuple(training.occurrences(matches, storage))
        except UnknownOrderError as error:
            unknown = str(error)
        study = studies.get(training.run_id or "")
        direct[training.run] = Exposure(training, occurrences, (), unknown, study)
    by_run_id = {each.training.run_id: each for each in direct.values() if each.training.run_id}
    return [
        Exposure(each.training, each.occurrences, tuple(_through(each, by_run_id, versions)), each.unknown, each.study)
        for each in direct.values()
    ]


def _through(exposure: Exposure, by_run_id: Mapping[str, Exposure], versions: Sequence[ModelVersion]) -> Iterator[str]:
    """Yield the models that a training began from, over any number of steps, and that had been given the picture."""
    todo, done = [_began_from(exposure.training)], set()
    while todo:
        reference = todo.pop()
        for run_id, images in _origins(reference, versions):
            origin = by_run_id.get(run_id)
            if origin is None or run_id in done:
                continue
            done.add(run_id)
            at = origin.training.images_seen if images is None else int(images)
            if times := origin.times(at):
                yield (
                    f"runs:/{run_id}/{at}, which is run '{origin.training.run}' and had been given it "
                    f"{times:,} time{'s' * (times != 1)}"
                )
            todo.append(_began_from(origin.training))


def _began_from(training: Training) -> str:
    """Return the models that a training began from: their checkpoints, or the reference of an earlier release."""
    return str(training.lineage.get("init_from_origins") or training.lineage.get("init_from") or "")


def _origins(reference: str, versions: Sequence[ModelVersion]) -> Iterator[tuple[str, str | None]]:
    """Yield (MLflow run, images seen or None for its last) that a MODEL reference is of; an alias as it is now."""
    yield from ((run_id, None if at is None or not at.isdigit() else at) for run_id, at in mentioned(reference))
    for name, number, alias in _VERSION.findall(reference):
        for version in versions:
            if version.name == name and (version.version == number or alias in version.aliases):
                yield version.run_id, version.tags.get("images_seen")


def _versions(versions: Iterable[ModelVersion], exposures: Sequence[Exposure]) -> Iterator[SeenVersion]:
    by_run_id = {each.training.run_id: each for each in exposures if each.training.run_id}
    for version in versions:
        exposure = by_run_id.get(version.run_id)
        if exposure is None or not exposure.concerned:
            continue
        seen = int(version.tags.get("images_seen") or exposure.training.images_seen)
        times, run = exposure.times(seen), f"run '{exposure.training.run}' at {seen:,} images"
        if times:
            because = f"{run}, which had been given it {times:,} time{'s' * (times != 1)}"
        elif exposure.through:
            because = f"{run}, which began from {exposure.through[0]}"
        elif exposure.unknown:
            because = f"{run}, of which it is not known"
        else:
            continue
        yield SeenVersion(version, seen, times, because)


def _judges(
    uri: str, matches: Sequence[Match], root: str, storage: Storage, versions: Sequence[ModelVersion]
) -> Iterator[Judge]:
    """Yield what judges models of a dataset by a split that has the picture, and the decisions that were made by it.

    Versions and studies compare samples with the images of the train split, and have those of the test split beside it.
    """
    splits = {match.split for match in matches if match.uri == uri}
    if TRAIN in splits:
        yield from _made_from(join(uri, layout.EVALUATORS), "an evaluator that was trained on it", storage)
    as_what = {TRAIN: "as a reference", "test": "as a test image"}
    how = " and ".join(f"{as_what[split]} (split {split})" for split in as_what if split in splits)
    if not how:
        return
    yield from _made_from(join(uri, layout.FEATURES), f"features of real images, which have it {how}", storage)
    for version in versions:
        if version.tags.get("dataset_uri") == uri and "scores" in version.tags:
            yield Judge(version.uri, f"its scores, by which the gate decides, have it {how}")
    for address in _folders(join(root, layout.STUDIES), layout.STUDY, storage):
        with suppress(StudyError, ValueError, KeyError, TypeError):  # another release's, or deleted meanwhile
            if StudyStore(storage, address).description()["config"]["data"]["uri"] == uri:
                yield Judge(address, f"a study whose trials are judged by images that have it {how}")


def _made_from(folder: str, role: str, storage: Storage) -> Iterator[Judge]:
    for name in sorted({entry.uri.rpartition("/")[0] for entry in storage.scan(folder)}):
        yield Judge(name, role)


def write_statement(seen: Seen, path: Path, signer: Signer) -> tuple[Path, Path]:
    """Write what was found to a file, and its signature beside it; return both paths.

    Anybody who has the public key verifies it: `openssl dgst -sha256 -verify KEY.pub -signature FILE.sig FILE`.

    Raises:
        ConfigError: the files cannot be written.
    """
    said = seen.to_dict()
    for training in said["trainings"]:  # which ordinals, but not how each was drawn
        training["occurrences"] = [each["ordinal"] for each in training["occurrences"]]
    content = {
        "statement_version": STATEMENT_VERSION,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "says": "which samples below this root are this picture, and what was trained on them",
        "does_not_prove": NOT_PROVEN,
        **said,
    }
    data, signature = json.dumps(content, indent=1).encode(), path.with_name(f"{path.name}.sig")
    try:
        path.write_bytes(data)
        signature.write_bytes(signer.sign_bytes(data))
    except OSError as error:
        raise ConfigError(
            f"--statement {path}: {error.strerror}: name a file in a folder that you may write to"
        ) from error
    return path, signature
