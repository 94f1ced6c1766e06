"""Check of every byte of a dataset against its index, and of every sample against the dataset's format (`ddpm
check`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.presentation.progress import StageNotice
from pipelines.shards.audit.recorded import (
    IN_THREADS,
    Advance,
    ByteCounter,
    Recorded,
    Tar,
    TarReading,
    can_record,
    list_tars,
    read_tars,
    stamp,
)
from pipelines.shards.audit.scan import ObjectStream, ShardScan, scan_shard
from pipelines.shards.forgotten import forgotten_samples
from pipelines.shards.index import Dataset, DatasetError, Member, ShardIndex, ShardInfo, read_dataset
from pipelines.shards.members import SampleFormat
from pipelines.shards.quarantine import Problem, Quarantine, make_quarantine, read_quarantine, store_quarantine
from pipelines.storage import NotFoundError, Storage, join, layout

SHOWN = 100
"""Largest number of problems that are shown; `--json` has all."""


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        dataset: the dataset that was checked.
        bytes: number of bytes read, those of an interrupted check that this one continued among them.
        problems: problems in order of shard, then sample.
        quarantine: quarantine of the dataset after the check; None if there is none.
    """

    dataset: Dataset
    bytes: int
    problems: tuple[Problem, ...]
    quarantine: Quarantine | None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types, for `--json`."""
        return {
            "uri": self.dataset.uri,
            "digest": self.dataset.digest,
            "clean": not self.problems,
            "shards": sum(len(shards) for shards in self.dataset.splits.values()),
            "samples": {split: self.dataset.samples(split) for split in self.dataset.splits},
            "bytes": self.bytes,
            "problems": [asdict(problem) for problem in self.problems],
            "quarantine": self.quarantine
            and {"digest": self.quarantine.digest, "excluded": len(self.quarantine.excluded)},
        }

    def summary(self) -> list[str]:
        """Return lines on what was read, the number of problems by kind, and whether quarantine.json covers them."""
        shards = sum(len(shards) for shards in self.dataset.splits.values())
        samples = sum(self.dataset.samples(split) for split in self.dataset.splits)
        read = f"{shards:,} shards, {samples:,} samples, {self.bytes / 2**20:,.1f} MiB read"
        if not self.problems:
            return [f"{read}: every byte and every sample is as recorded"]
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in Counter(p.kind for p in self.problems).most_common())
        found = [f"{read}; {len(self.problems):,} problem{'s' * (len(self.problems) != 1)}: {kinds}"]
        needed = make_quarantine(self.dataset, self.problems)
        if self.quarantine is not None and self.quarantine.digest == needed.digest:
            entries = f"{len(needed.excluded):,} entr{'y' if len(needed.excluded) == 1 else 'ies'}"
            found.append(f"quarantine.json covers them: {entries}, digest {needed.digest[:12]}")
        elif needed.excluded:
            found.append(f"leave them out of training with `ddpm check {self.dataset.uri} --quarantine`")
        return found


def check(uri: str, storage: Storage, *, reading: TarReading = IN_THREADS) -> CheckReport:
    """Check a dataset; nothing of it is changed.

    While the check runs, the problems of each shard are recorded below `check-progress/`: given again after an
    interruption, the same call reads no shard again that has not changed since. The records are deleted when it has
    ended. Where they cannot be written, it does without.

    Args:
        uri: folder of the dataset.
        storage: the store.
        reading: where the shards are read, and who is told.

    Raises:
        DatasetError: there is no dataset, or dataset.json is damaged.
        StorageError: the store does not answer, so the check is incomplete.
    """
    dataset = read_dataset(uri, storage)
    quarantine, found = _read_quarantine(dataset, storage)
    stored = list_tars(uri, storage)
    shards = sorted((s for split in dataset.splits.values() for s in split), key=lambda s: s.name)
    folder = join(uri, layout.CHECK_PROGRESS)
    kept = can_record(folder, storage)
    if not kept:
        reading.notice(f"{folder} cannot be written, so a check that is interrupted begins again")
    form = SampleFormat(dataset.image_size, dataset.channels, bool(dataset.classes), len(dataset.classes))
    recorded = Recorded(CheckTar(uri, storage, form), storage, folder if kept else None)
    there = [replace(stored[shard.name], expected=shard) for shard in shards if shard.name in stored]
    counter = ByteCounter(sum(tar.entry.size for tar in there), reading.progress)
    of_shards = dict(read_tars(recorded, there, counter, reading))
    found += [problem for place in sorted(of_shards) for problem in of_shards[place]]
    found += [_missing(shard) for shard in shards if shard.name not in stored]
    found += [
        Problem(name, None, None, "extra", "is not in dataset.json, so it is never read: remove it, or index it")
        for name in stored.keys() - {s.name for s in shards}
    ]
    found += _listed_twice(shards)
    order = sorted(found, key=lambda p: (p.shard, p.index is not None or p.sample is not None, p.index or 0))
    recorded.clear()
    return CheckReport(dataset, counter.done, tuple(order), quarantine)


def write_quarantine(report: CheckReport, storage: Storage) -> CheckReport:
    """Write the problems of a check to `quarantine.json`, so that readers leave those samples out.

    What `ddpm forget` has put out stays out. Without any of it an existing file is deleted.

    Returns:
        The result with the new quarantine.
    """
    forgotten = forgotten_samples(report.dataset, storage)
    quarantine = make_quarantine(report.dataset, [*forgotten, *report.problems])
    if not quarantine.excluded:
        storage.delete(join(report.dataset.uri, layout.QUARANTINE))
        return CheckReport(report.dataset, report.bytes, report.problems, None)
    store_quarantine(quarantine, report.dataset.uri, storage)
    return CheckReport(report.dataset, report.bytes, report.problems, quarantine)


def show(report: CheckReport, console: Console, notice: StageNotice) -> None:
    """Print the problems, as a table on a terminal and as plain lines elsewhere, and the summary.

    Args:
        console: where to print.
        notice: prints a line (stage, text) on the console.
    """
    shown = report.problems[:SHOWN]
    if console.is_terminal and shown:
        columns = Table("shard", "sample", "what is wrong")
        for problem in shown:
            columns.add_row(Text(problem.shard), Text(problem.sample or "(the shard)"), Text(problem.reason))
        console.print(columns)
    else:
        for problem in shown:
            notice("wrong", f"{problem.shard}  {problem.sample or '(the shard)'}  {problem.reason}")
    if len(report.problems) > SHOWN:
        notice("wrong", f"… and {len(report.problems) - SHOWN:,} more: --json has all of them")
    for line in report.summary():
        notice("check", line)


@dataclass(frozen=True)
class CheckTar:
    """Compare a shard with what dataset.json and its sidecar say of it, and each sample with the dataset's format.

    Attributes:
        uri: folder of the dataset.
        storage: the store.
        form: the properties that every sample must have.
    """

    uri: str
    storage: Storage
    form: SampleFormat

    def inputs(self, tar: Tar) -> Any:
        """Return what decides the problems besides the tar."""
        assert tar.expected is not None
        expected = [tar.expected.samples, tar.expected.bytes, tar.expected.sha256]
        return [asdict(self.form), expected, stamp(tar.sidecar)]

    def __call__(self, tar: Tar, advance: Advance) -> list[Problem]:
        """Return the problems of the shard."""
        assert tar.expected is not None
        try:
            stream = ObjectStream(tar.entry.uri, tar.entry.size, self.storage, advance)
            scan = scan_shard(tar.name, stream, self.form)
        except NotFoundError:
            return [Problem(tar.name, None, None, "missing", "disappeared while it was read: put it back")]
        return _compare(tar.expected, scan, self.uri, self.storage)

    def to_plain(self, result: list[Problem]) -> Any:
        """Return problems as JSON types."""
        return [asdict(problem) for problem in result]

    def from_plain(self, plain: Any, tar: Tar) -> list[Problem]:
        """Return the problems of a record.

        Raises:
            ValueError, KeyError or TypeError: it is damaged.
        """
        return [Problem(**problem) for problem in plain]


def _missing(info: ShardInfo) -> Problem:
    reason = f"is not there: put it back, {info.bytes:,} bytes with SHA-256 {info.sha256[:12]}…"
    return Problem(info.name, None, None, "missing", reason)


def _compare(info: ShardInfo, scan: ShardScan, uri: str, storage: Storage) -> list[Problem]:
    """Compare what a tar holds with dataset.json and its sidecar; return its problems."""
    whole = partial(Problem, info.name, None, None)
    problems = []
    if scan.bytes != info.bytes:
        kind, word = ("truncated", "cut short") if scan.bytes < info.bytes else ("bytes", "too long")
        problems.append(
            whole(kind, f"is {word}: {scan.bytes:,} bytes, dataset.json says {info.bytes:,}; write or copy it again")
        )
    elif scan.sha256 != info.sha256:
        problems.append(
            whole(
                "bytes",
                f"has other bytes than were indexed: SHA-256 {scan.sha256[:12]}…, dataset.json says "
                f"{info.sha256[:12]}…; write or copy it again",
            )
        )
    damaged = bool(problems)
    problems += [p for p in scan.problems if p.index is None] + [p for p in scan.problems if p.index is not None]
    return problems + _check_sidecar(info, scan, uri, storage, damaged)


def _check_sidecar(info: ShardInfo, scan: ShardScan, uri: str, storage: Storage, damaged: bool) -> list[Problem]:
    """Compare the sidecar with the tar; return its problem, or the lost samples where the tar is `damaged`."""
    name = layout.index_name(info.name)
    again = f"write it again with `ddpm index {uri} --replace`"
    whole = partial(Problem, info.name, None, None, "sidecar")
    try:
        index = ShardIndex.from_json(storage.read(join(uri, name)))
    except NotFoundError:
        return [whole(f"has no {name}: {again}")]
    except DatasetError as error:
        return [whole(f"has a {name} that cannot be read ({error}): {again}")]
    if len(index) != info.samples:
        return [whole(f"has a {name} with {len(index)} samples, dataset.json says {info.samples}: {again}")]
    if damaged or any(p.index is None for p in scan.problems):
        there = {key: scan.index.members(i) for i, key in enumerate(scan.index.keys)}
        return [
            Problem(info.name, i, key, *_changed(index.members(i), there.get(key, {})))
            for i, key in enumerate(index.keys)
            if there.get(key) != index.members(i)
        ]
    return (
        []
        if index == scan.index
        else [whole(f"has a {name} that does not fit it: {_difference(index, scan)}; {again}")]
    )


def _changed(recorded: Mapping[str, Member], there: Mapping[str, Member]) -> tuple[str, str]:
    """Return (kind, reason) for a sample that differs from its record in the sidecar."""
    others = [name for name, m in there.items() if name in recorded and recorded[name]._replace(crc32=m.crc32) == m]
    if len(others) == len(recorded) == len(there):
        changed = ", ".join(name for name in others if there[name] != recorded[name])
        return "changed", f"has other bytes than were indexed: {changed}"
    first, last = min(m.offset for m in recorded.values()), max(m.offset + m.size for m in recorded.values())
    return "lost", f"is not in the tar as recorded, at bytes {first:,} to {last:,}"


def _difference(index: ShardIndex, scan: ShardScan) -> str:
    if len(index) != len(scan.index):
        return f"it lists {len(index)} samples, the tar holds {len(scan.index)}"
    keys = enumerate(zip(index.keys, scan.index.keys, strict=True))
    differing = (i for i, (a, b) in keys if a != b or index.members(i) != scan.index.members(i))
    i = next(differing, -1)
    if i < 0:
        return "it lists extensions that no sample has"
    listed, key = index.keys[i], scan.index.keys[i]
    if listed != key:
        return f"sample {i} is {listed!r} in it and {key!r} in the tar"
    return f"members of sample {i} ({key!r}) lie elsewhere in the tar, or hold other bytes"


def _read_quarantine(dataset: Dataset, storage: Storage) -> tuple[Quarantine | None, list[Problem]]:
    """Return the quarantine of a dataset, and problems of the quarantine for which readers would refuse it."""
    problem = partial(Problem, layout.QUARANTINE, None, None, "quarantine")
    try:
        quarantine = read_quarantine(dataset.uri, storage)
    except DatasetError as error:
        return None, [problem(str(error))]
    if quarantine is not None and quarantine.dataset_digest != dataset.digest:
        theirs, ours = quarantine.dataset_digest[:12], dataset.digest[:12]
        return quarantine, [problem(f"is of dataset {theirs}, this one is {ours}: write it again with --quarantine")]
    return quarantine, []


def _listed_twice(shards: Sequence[ShardInfo]) -> list[Problem]:
    """Return a problem for each shard that dataset.json lists more than once."""
    counts = Counter(shard.name for shard in shards)
    return [
        Problem(name, None, None, "duplicate", f"is listed {count} times in dataset.json, which lets splits overlap")
        for name, count in counts.items()
        if count > 1
    ]
