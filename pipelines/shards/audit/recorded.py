"""One pass over many tars that a later one continues: the result of each tar is recorded as soon as it is there.

A pass takes hours where a dataset is large. Its records lie in a folder below the dataset, one for each tar, each with
a digest of everything that decided it. A pass that is given again after its process or a node was killed reads the
tars without a record that still holds. Where the tars are read is the business of a `Runner`: in threads of this
process (`InThreads`), or as Ray tasks (`pipelines.remote.spread`).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar
from uuid import uuid4

import PIL

from pipelines.presentation.progress import Notice, Progress, no_notice, no_progress
from pipelines.shards.index import Dataset, DatasetError, Member, ShardIndex, ShardInfo
from pipelines.shards.members import IMAGE_MEMBERS
from pipelines.storage import Entry, NotFoundError, Storage, StorageError, TransientStorageError, join, layout

RELEASE = 1
"""Of the form of the records and of what is looked for in a tar; a record of another release does not hold."""
LOOKUPS = 32
"""Records that are read or deleted at a time."""
BLOCK_BYTES = 16 << 20
"""Bytes of a tar that are in memory at a time, unless a single member has more."""

Advance = Callable[[int], None]
"""Called with a number of bytes that were read."""
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class Tar:
    """A stored tar of a dataset.

    Attributes:
        name: path relative to the dataset.
        entry: the tar, as it is listed.
        sidecar: its index, as it is listed; None where there is none.
        expected: what dataset.json says of the tar; None where that is not asked for.
    """

    name: str
    entry: Entry
    sidecar: Entry | None = None
    expected: ShardInfo | None = None


class Runner(Protocol):
    """Where tars are read.

    Attributes:
        where: that, in words.
    """

    @property
    def where(self) -> str: ...

    def __call__(
        self, work: Callable[[Tar, Advance], R], items: Sequence[Tar], advance: Advance
    ) -> Iterator[tuple[int, R]]:
        """Yield (place in `items`, work(item, …)) as each of them finishes; after an error no further one is started.

        Args:
            work: what is done with a tar; it may be pickled.
            items: the tars.
            advance: called with the bytes that were read.
        """


@dataclass(frozen=True)
class InThreads:
    """Read tars in threads of this process.

    Attributes:
        threads: number of tars at a time; None for two per core, because half of the time is spent waiting.
        because: why Ray does not read them; "" where it was not asked to.
    """

    threads: int | None = None
    because: str = ""

    @property
    def count(self) -> int:
        """Number of threads."""
        return self.threads or min(32, 2 * (os.cpu_count() or 1))

    @property
    def where(self) -> str:
        """Where tars are read, in words."""
        reason = f": {self.because}" if self.because else ""
        return f"by {self.count} thread{'s' * (self.count != 1)} of this process{reason}"

    def __call__(
        self, work: Callable[[Tar, Advance], R], items: Sequence[Tar], advance: Advance
    ) -> Iterator[tuple[int, R]]:
        """Yield (place, result) of each tar as it finishes."""
        with ThreadPoolExecutor(self.count, thread_name_prefix="scan") as pool:
            places = {pool.submit(work, item, advance): place for place, item in enumerate(items)}
            try:
                for done in as_completed(places):
                    yield places.pop(done), done.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class TarReading:
    """Where the tars of a pass are read, and who is told.

    Attributes:
        runner: where they are read.
        progress: called with (done, total) MiB; tars that have a record count as done.
        notice: called with a line on how many tars have a record, and on where the others are read.
    """

    runner: Runner = field(default_factory=InThreads)
    progress: Progress = no_progress
    notice: Notice = no_notice


IN_THREADS = TarReading()


class TarWork(Protocol[R_co]):
    """What is done with a tar; Ray pickles it."""

    def inputs(self, tar: Tar) -> Any:
        """Return everything that decides the result besides the tar itself, as JSON types."""

    def __call__(self, tar: Tar, advance: Advance) -> R_co:
        """Read the tar, and return the result."""

    def to_plain(self, result: Any) -> Any:
        """Return a result as JSON types."""

    def from_plain(self, plain: Any, tar: Tar) -> R_co:
        """Return the result of a record.

        Raises:
            ValueError, KeyError or TypeError: the record is damaged, or what it stands for is not there any more.
        """


@dataclass(frozen=True)
class Recorded(Generic[R]):
    """Work on tars that writes the result of each below a folder.

    Attributes:
        work: what is done with a tar.
        storage: the store.
        folder: address of the folder of the records; None to keep none.
    """

    work: TarWork[R]
    storage: Storage
    folder: str | None

    def __call__(self, tar: Tar, advance: Advance) -> R:
        """Do the work, and record its result."""
        result = self.work(tar, advance)
        if self.folder is not None:
            text = json.dumps(self.work.to_plain(result), separators=(",", ":"))
            record = {"key": self.key(tar), "sha256": hashlib.sha256(text.encode()).hexdigest(), "result": text}
            self.storage.write(self.address(tar), json.dumps(record).encode())
        return result

    def address(self, tar: Tar) -> str:
        """Return the address of the record of a tar."""
        assert self.folder is not None
        return join(self.folder, layout.record_name(tar.name))

    def key(self, tar: Tar) -> str:
        """Return the digest of everything that decides the result."""
        content = [RELEASE, PIL.__version__, tar.name, stamp(tar.entry), self.work.inputs(tar)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def find(self, tar: Tar) -> tuple[R] | None:
        """Return the recorded result; None where there is none that holds."""
        try:
            record = json.loads(self.storage.find(self.address(tar)) or b"")
            text = record["result"]
            if record["key"] != self.key(tar) or record["sha256"] != hashlib.sha256(text.encode()).hexdigest():
                return None
            return (self.work.from_plain(json.loads(text), tar),)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def names(self) -> set[str]:
        """Return the addresses of all records."""
        return set() if self.folder is None else {entry.uri for entry in self.storage.scan(self.folder)}

    def clear(self) -> None:
        """Delete all records."""
        if self.folder is not None:
            with ThreadPoolExecutor(LOOKUPS, thread_name_prefix="records") as pool:
                list(pool.map(self.storage.delete, self.names()))
            self.storage.delete_folder(self.folder)


def stamp(entry: Entry | None) -> list[Any] | None:
    """Return what changes with the bytes of an object: its tag, else its time.

    Where the store says neither, what was found in the object holds for no second look.
    """
    return None if entry is None else [entry.size, entry.tag or entry.modified or uuid4().hex]


def list_tars(uri: str, storage: Storage) -> dict[str, Tar]:
    """Return every tar below a folder by its path relative to the folder, sorted."""
    start = len(uri.rstrip("/")) + 1
    ends = (layout.SHARD_SUFFIX, layout.INDEX_SUFFIX)
    found = {entry.uri[start:]: entry for entry in storage.list(uri) if entry.uri.endswith(ends)}
    names = (name for name in found if name.endswith(layout.SHARD_SUFFIX))
    return {name: Tar(name, found[name], found.get(layout.index_name(name))) for name in names}


def read_tars(
    recorded: Recorded[R], tars: Sequence[Tar], counter: ByteCounter, reading: TarReading
) -> Iterator[tuple[int, R]]:
    """Yield (place, result) of each tar: first of those that have a record, then of the others as they finish.

    Args:
        recorded: what is done with a tar.
        tars: the tars.
        counter: counts their bytes.
        reading: where they are read, and who is told.
    """
    there = recorded.names()
    known = [place for place, tar in enumerate(tars) if there and recorded.address(tar) in there]
    rest = set(range(len(tars)))
    if known:
        with ThreadPoolExecutor(LOOKUPS, thread_name_prefix="records") as pool:
            found = pool.map(lambda place: recorded.find(tars[place]), known)
            for place, result in zip(known, found, strict=True):
                if result is not None:
                    rest.remove(place)
                    yield place, result[0]
    counter.add(sum(tar.entry.size for place, tar in enumerate(tars) if place not in rest))
    if len(rest) < len(tars):
        reading.notice(
            f"{len(tars) - len(rest):,} of {len(tars):,} tars were read before: {recorded.folder} has their results"
        )
    if rest:
        left = sorted(rest)
        size = sum(tars[place].entry.size for place in left) / 2**20
        reading.notice(f"{len(left):,} tar{'s' * (len(left) != 1)}, {size:,.1f} MiB, {reading.runner.where}")
        for place, outcome in reading.runner(recorded, [tars[place] for place in left], counter.add):
            yield left[place], outcome


def can_record(folder: str, storage: Storage) -> bool:
    """Return whether records can be written below a folder.

    Raises:
        TransientStorageError: the store does not answer.
    """
    probe = join(folder, layout.PROBE_PREFIX + str(os.getpid()))
    try:
        storage.write(probe, b"")
        storage.delete(probe)
    except TransientStorageError:
        raise
    except StorageError:
        return False
    return True


class ByteCounter:
    """Counts bytes that several threads read, and reports them as progress in MiB."""

    def __init__(self, total_bytes: int, progress: Progress) -> None:
        self.total, self.done, self.progress = total_bytes, 0, progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count further bytes, and report the progress."""
        with self._lock:
            self.done += count
            whole = -(-self.total // 2**20)
            if whole:
                self.progress(whole if self.done >= self.total else self.done // 2**20, whole)


def read_shards(
    dataset: Dataset, work: TarWork[R], folder: str, storage: Storage, reading: TarReading
) -> Iterator[tuple[ShardInfo, R]]:
    """Yield what work gives for each shard of a dataset, as soon as it is known, and record it below the dataset.

    Shards that are not there are left out; `ddpm check` names them.

    Args:
        folder: name of the folder of the records, below the dataset.
        reading: where tars without a record are read, and who is told.
    """
    shards, tars = stored_shards(dataset, dataset.splits, storage)
    records = join(dataset.uri, folder)
    kept = can_record(records, storage)
    if not kept:
        reading.notice(f"{records} cannot be written, so all shards are read again at every call")
    counter = ByteCounter(sum(tar.entry.size for tar in tars), reading.progress)
    for place, result in read_tars(Recorded(work, storage, records if kept else None), tars, counter, reading):
        yield shards[place], result


def stored_shards(dataset: Dataset, splits: Iterable[str], storage: Storage) -> tuple[list[ShardInfo], list[Tar]]:
    """Return the shards of these splits that are there, and the tar of each."""
    stored = list_tars(dataset.uri, storage)
    shards = [shard for split in splits for shard in dataset.shards(split) if shard.name in stored]
    return shards, [replace(stored[shard.name], expected=shard) for shard in shards]


def read_sidecar(shard: ShardInfo, folder: str, storage: Storage) -> ShardIndex:
    """Return the index of a shard.

    Raises:
        DatasetError: it is gone or damaged.
    """
    where = layout.index_name(shard.address(folder))
    try:
        return ShardIndex.from_json(storage.read(where))
    except (NotFoundError, DatasetError) as error:
        raise DatasetError(f"{where}: {error}; write it again with `ddpm index {folder} --replace`") from error


def image_members(index: ShardIndex) -> dict[int, tuple[str, Member]]:
    """Return the image that training reads of each sample that has one: index -> its extension and place."""
    found: dict[int, tuple[str, Member]] = {}
    for name in IMAGE_MEMBERS:
        if name in index.columns:
            for i, row in enumerate(index.rows(name)):
                if row[0] >= 0:
                    found.setdefault(i, (name, Member(*row)))
    return found


def read_members(
    members: Mapping[int, tuple[str, Member]], uri: str, storage: Storage
) -> Iterator[tuple[int, str, memoryview]]:
    """Yield (index of the sample, extension, bytes) of members of a tar, in its order, which is read in blocks.

    Args:
        members: index of the sample -> extension and place of the member.
        uri: address of the tar.
    """
    wanted = sorted(members.items(), key=lambda item: item[1][1].offset)
    at = 0
    while at < len(wanted):
        start, stop, first = wanted[at][1][1].offset, 0, at
        while at < len(wanted) and (at == first or _end(wanted[at][1][1]) - start <= BLOCK_BYTES):
            stop = max(stop, _end(wanted[at][1][1]))
            at += 1
        block = memoryview(storage.read(uri, start, stop))
        for i, (name, member) in wanted[first:at]:
            yield i, name, block[member.offset - start : _end(member) - start]


def _end(member: Member) -> int:
    return member.offset + member.size
