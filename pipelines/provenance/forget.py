"""Take a picture out: of every dataset that has it, and of the aliases of versions that were given it.

Each step is done by whoever comes to it first, and finds what was done before: a call that was killed, or two at once,
end the same, and a second one changes nothing. Nothing is trained here, and no version is deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines import registry, tracking
from pipelines.config import CANDIDATE, PREVIOUS, Config
from pipelines.presentation.progress import Display, Notice
from pipelines.provenance.find import Match
from pipelines.provenance.seen import Exposure, Seen, SeenVersion
from pipelines.provenance.trained import Kept, Training
from pipelines.registry.forgotten import FORGET_TAG, ForgetRecord, write_record
from pipelines.shards.erase import erase
from pipelines.shards.erased import ImageFile
from pipelines.shards.forgotten import Forgetting, quarantine_forgotten, record_forgetting
from pipelines.shards.index import read_dataset
from pipelines.shards.quarantine import read_quarantine
from pipelines.signing import Authority
from pipelines.storage import Storage, is_local, local_path

_COPIES = (
    "shard caches of nodes (data.cache_dir) may hold the shards as they were until they make room: delete their "
    "folders. Among the pictures of evaluations and reports in MLflow, those of nearest training images and of "
    "inpainted test images show pictures of the dataset: look at them. What was drawn from a model is not the picture, "
    "and stays"
)


@dataclass(frozen=True)
class CleanStart:
    """From where a training without the picture could go on.

    Attributes:
        run: of the training that was given it.
        model: the newest checkpoint from before that which `init_from` can name; None: from the beginning.
        images_seen: by that checkpoint.
        lost: images that would have to be trained on again.
    """

    run: str
    model: str | None
    images_seen: int
    lost: int


@dataclass(frozen=True)
class Forgotten:
    """What was done, or would be.

    Attributes:
        seen: where the picture is, and what has seen it.
        record: the request; None where the picture is in no dataset.
        quarantined: dataset -> number of samples that this call has put into its quarantine.
        erased: dataset -> number of samples that this call has overwritten; empty where nothing was to be erased.
        versioned: addresses of stores that keep, or may keep, what was overwritten, with how to delete it.
        marked: versions that the gate refuses from now on.
        moved: alias -> version that it went to, None where there is no clean one.
        starts: from where clean trainings could go on.
        dry_run: whether nothing was done.
    """

    seen: Seen
    record: ForgetRecord | None
    quarantined: dict[str, int]
    erased: dict[str, int]
    versioned: tuple[str, ...]
    marked: tuple[SeenVersion, ...]
    moved: dict[str, str | None]
    starts: tuple[CleanStart, ...]
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        """Return what was done as JSON types, for `--json`."""
        return {
            **self.seen.to_dict(),
            "request": None if self.record is None else self.record.id,
            "taken_out": [{"uri": match.uri, "shard": match.shard, "key": match.key} for match in self.seen.matches],
            "quarantined": self.quarantined,
            "erased": self.erased,
            "marked": [version.version.uri for version in self.marked],
            "aliases": self.moved,
            "clean_starts": [vars(start) for start in self.starts],
            "dry_run": self.dry_run,
        }

    def lines(self) -> list[str]:
        """Return what was done, in words."""
        would = "would be " if self.dry_run else ""
        lines = list(self.seen.lines())
        for uri, count in self.quarantined.items():
            done = f"{count:,} sample{'s' * (count != 1)} {would}put into quarantine"
            lines.append(f"{uri}: {done if count else 'what it has of the picture is in quarantine already'}")
        for uri, count in self.erased.items():
            done = f"{count:,} sample{'s' * (count != 1)} {would}erased"
            lines.append(f"{uri}: {done if count else 'what it had of the picture is erased already'}")
        lines += self.versioned
        if self.erased and not self.dry_run:
            lines.append(_COPIES)
        lines += [f"{version.version.uri} {would}marked: the gate refuses it" for version in self.marked]
        for alias, number in self.moved.items():
            went = f"{would}given back to version {number}" if number else "stays: it has had no version without it"
            lines.append(f"alias {alias} {went}")
        for start in self.starts:
            where = (
                "the beginning" if start.model is None else f"init_from={start.model} ({start.images_seen:,} images)"
            )
            lines.append(
                f"run '{start.run}': a clean training can go on from {where}, and trains on {start.lost:,} images again"
            )
        if self.record is not None and not self.dry_run:
            lines.append(f"request {self.record.id} is recorded, with digests and without the picture")
        return lines


def forget(
    seen: Seen,
    config: Config,
    display: Display,
    connect: Callable[[], None],
    *,
    reason: str = "",
    erase_bytes: bool = False,
    dry_run: bool = False,
    notice: Notice,
) -> Forgotten:
    """Take a picture out of every dataset that has it, and away from versions that were given it.

    Args:
        seen: where the picture is, and what has seen it, without near-duplicates unless these are to go, too.
        config: of the root and the services.
        display, connect: for the gate, which gives aliases back.
        reason: recorded with the request.
        erase_bytes: overwrite it in the shards as well.
        dry_run: say what would be done.
        notice: called with what is done, in words.

    Raises:
        StorageError, TrackingError: a service does not answer; the same call does the rest.
    """
    chosen, exposures, marked = seen.matches, seen.exposures, seen.versions or ()
    if not chosen:
        return Forgotten(seen, None, {}, {}, (), (), {}, (), dry_run)
    storage, at = Storage.of(config), datetime.now(UTC).isoformat(timespec="seconds")
    trainings = {each.training.run_id: _first(each) for each in exposures if each.training.run_id}
    record = ForgetRecord(seen.query.named, tuple(sorted({match.sha256 for match in chosen})), at, reason, trainings)
    quarantined: dict[str, int] = {}
    erased: dict[str, int] = {}
    authority = None if dry_run else Authority.of(config.registry)
    for uri in dict.fromkeys(match.uri for match in chosen):
        before = _in_quarantine(uri, storage)
        own = [match for match in chosen if match.uri == uri]
        if authority is not None:
            _take_out(own, uri, at, reason, storage)
        quarantined[uri] = sum((match.shard, match.index) not in before for match in own)
        notice(f"{uri}: {len(own):,} sample{'s' * (len(own) != 1)} of the picture")
        if erase_bytes and authority is None:
            erased[uri] = sum(not match.erased for match in own)
        elif erase_bytes and authority is not None:
            places = [(match.shard, match.index, match.key) for match in own]
            erased[uri] = len(erase(uri, places, storage, authority, at=at, notice=notice))
    if authority is not None:
        record = write_record(record, config.storage.root, storage, authority)
        for version in marked:
            if version.version.tags.get(FORGET_TAG) != record.id:
                tracking.set_version_tags(
                    config.tracking.server, version.version.name, version.version.version, {FORGET_TAG: record.id}
                )
    moved = _give_back(marked, config, display, connect, dry_run=dry_run)
    starts = tuple(_clean_start(exposure) for exposure in exposures)
    versioned = tuple(line for uri in erased for line in _versioned(uri, storage))
    return Forgotten(seen, record, quarantined, erased, versioned, marked, moved, starts, dry_run)


def _versioned(uri: str, storage: Storage) -> Iterator[str]:
    """Yield how to delete what a store keeps of overwritten objects, where it may keep any."""
    kept = storage.keeps_versions(uri)
    if kept is False:
        return
    says = "keeps the shards as they were, as earlier versions" if kept else "may keep the shards as they were"
    if not uri.startswith("s3://"):
        yield f"{uri} {says}: delete earlier versions of its .tar files, if the bucket has any"
        return
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    yield (
        f"{uri} {says}. List them with `aws s3api list-object-versions --bucket {bucket} --prefix {prefix}/ --query "
        f"'Versions[?!IsLatest].[Key,VersionId]'`, and delete each with `aws s3api delete-object --bucket {bucket} "
        "--key KEY --version-id VERSION`"
    )


def _first(exposure: Exposure) -> int:
    """Return the ordinal from which on a training had been given it; -1 where it began with it, or may have."""
    if exposure.through or exposure.unknown is not None:
        return -1
    return exposure.occurrences[0].ordinal


def _in_quarantine(uri: str, storage: Storage) -> set[tuple[str, int | None]]:
    quarantine = read_quarantine(uri, storage)
    return {(problem.shard, problem.index) for problem in (quarantine.excluded if quarantine else ())}


def _take_out(matches: Sequence[Match], uri: str, at: str, reason: str, storage: Storage) -> None:
    """Record the images of a dataset that must stay out, and put them into its quarantine."""
    images = {match.sha256: ImageFile(match.size, match.crc32, match.sha256) for match in matches}
    record_forgetting(Forgetting(tuple(images[sha256] for sha256 in sorted(images)), at, reason), uri, storage)
    dataset = None
    while dataset is None or read_dataset(uri, storage).digest != dataset.digest:  # others erase from it
        dataset = read_dataset(uri, storage)
        quarantine_forgotten(dataset, storage)


def _give_back(
    marked: Sequence[SeenVersion], config: Config, display: Display, connect: Callable[[], None], *, dry_run: bool
) -> dict[str, str | None]:
    """Give the aliases of marked versions back to the newest clean version that had them; return where they went."""
    moved: dict[str, str | None] = {}
    for each in marked:
        for alias in each.version.aliases:
            if alias in (CANDIDATE, PREVIOUS):
                continue
            gate = registry.Gate(config, display, connect, each.version.name, alias)
            name = f"{alias} of {each.version.name}"
            try:
                moved[name] = gate.rollback(dry_run=dry_run).version
            except registry.RegistryError as error:
                display.stage("forget", str(error))
                moved[name] = None
    return moved


def _clean_start(exposure: Exposure) -> CleanStart:
    """Return the newest checkpoint of a training from before it was given the picture."""
    training, first = exposure.training, _first(exposure)
    before = [kept for kept in training.kept if kept.images_seen <= first and _reference(training, kept) is not None]
    newest = max(before, key=lambda kept: (kept.images_seen, kept.published), default=None)
    seen = 0 if newest is None else newest.images_seen
    model = None if newest is None else _reference(training, newest)
    return CleanStart(training.run, model, seen, training.images_seen - seen)


def _reference(training: Training, kept: Kept) -> str | None:
    """Return the MODEL reference of a checkpoint; None where it has none."""
    if kept.published and training.run_id:
        return f"runs:/{training.run_id}/{kept.images_seen}"
    return str(local_path(kept.address)) if is_local(kept.address) else None
