"""`quarantine.json`: the shards and samples of a dataset that readers leave out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.index import Dataset, DatasetError, ShardIndex, ShardTable
from pipelines.storage import Storage, join, layout

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Problem:
    """Something wrong with a sample, or with a whole shard.

    Attributes:
        shard: name of the shard, as in dataset.json.
        index: of the sample within the shard; None for the whole shard, or for a sample that cannot be located.
        sample: key of the sample; None for the whole shard.
        kind: identifier for programs, such as "truncated", "bytes", "decode" or "label".
        reason: description for people.
    """

    shard: str
    index: int | None
    sample: str | None
    kind: str
    reason: str


@dataclass(frozen=True)
class Quarantine:
    """The content of `quarantine.json`: samples and whole shards of one dataset that readers leave out.

    Attributes:
        dataset_digest: digest of the dataset that it belongs to.
        excluded: problems in order of shard and index; a shard that is left out as a whole has one entry.
    """

    dataset_digest: str
    excluded: tuple[Problem, ...]

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 over the dataset digest and the excluded samples; the reasons are not part of it."""
        content = [self.dataset_digest, [[p.shard, p.index, p.sample] for p in self.excluded]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def by_shard(self) -> dict[str, dict[int, Problem] | None]:
        """Return shard -> excluded samples by index, or None where the whole shard is left out."""
        found: dict[str, dict[int, Problem] | None] = {}
        for problem in self.excluded:
            if problem.index is None:
                found[problem.shard] = None
            elif (entries := found.setdefault(problem.shard, {})) is not None:
                entries[problem.index] = problem
        return found

    def to_json(self) -> str:
        """Return the text of `quarantine.json`."""
        plain = {"schema_version": SCHEMA_VERSION, **asdict(self), "digest": self.digest}
        return json.dumps(plain, indent=1)


def make_quarantine(dataset: Dataset, problems: Iterable[Problem]) -> Quarantine:
    """Return the quarantine for these problems; its digest does not depend on their order.

    A shard that has a problem itself is left out as a whole. Problems of tars that are not in the dataset are ignored.
    """
    shards = {name for split in dataset.splits for name in dataset.shards(split).names}
    first: dict[tuple[str, int], Problem] = {}
    for problem in sorted(problems, key=lambda p: (p.shard, p.index is not None, p.index or 0)):
        if problem.shard not in shards or (problem.shard, -1) in first:
            continue
        if problem.index is None:
            first[problem.shard, -1] = replace(problem, sample=None)
        else:
            first.setdefault((problem.shard, problem.index), problem)
    return Quarantine(dataset.digest, tuple(first.values()))


def read_quarantine(uri: str, storage: Storage) -> Quarantine | None:
    """Read the quarantine beside a dataset; None where there is none.

    It has an effect only on readers that it is passed to.

    Raises:
        DatasetError: it is of an unknown version, or damaged.
    """
    return _read(join(uri, layout.QUARANTINE), uri, storage)


def store_quarantine(quarantine: Quarantine, uri: str, storage: Storage, *, only_copy: bool = False) -> None:
    """Write the quarantine of a dataset, and the copy of it that stays when another one takes its place.

    Args:
        only_copy: write the copy alone.
    """
    text = quarantine.to_json().encode()
    storage.write(join(uri, layout.quarantine_file(quarantine.digest)), text)
    if not only_copy:
        storage.write(join(uri, layout.QUARANTINE), text)


def quarantine_of(dataset: Dataset, digest: str, storage: Storage) -> tuple[Quarantine | None] | None:
    """Return the quarantine under which the stream of a dataset has a digest, in a tuple; None where none of them has.

    Raises:
        DatasetError: a quarantine that is kept is damaged.
    """
    if stream_digest(dataset, None) == digest:
        return (None,)
    kept = (entry.uri for entry in storage.scan(join(dataset.uri, layout.QUARANTINES)))
    for where in (join(dataset.uri, layout.QUARANTINE), *kept):
        found = _read(where, dataset.uri, storage)
        if found is not None and stream_digest(dataset, found) == digest:
            return (found,)
    return None


def _read(where: str, uri: str, storage: Storage) -> Quarantine | None:
    text = storage.find(where)
    return None if text is None else parse_quarantine(text, uri, where)


def parse_quarantine(text: bytes, uri: str, where: str) -> Quarantine:
    """Return the quarantine in the text of a `quarantine.json`.

    Args:
        uri: folder of the dataset.
        where: address of the file, for messages.

    Raises:
        DatasetError: it is of an unknown version, or damaged.
    """
    try:
        plain = json.loads(text)
        version, recorded = plain["schema_version"], plain["digest"]
        if version == SCHEMA_VERSION:
            found = Quarantine(plain["dataset_digest"], tuple(Problem(**entry) for entry in plain["excluded"]))
            if found.digest == recorded:
                return found
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{where} is damaged: {error}; write it again with `ddpm check {uri} --quarantine`"
        ) from error
    if version != SCHEMA_VERSION:
        raise DatasetError(f"{where} has version {version}, this release reads {SCHEMA_VERSION}")
    raise DatasetError(
        f"{where} does not match its own digest: it was edited or damaged; "
        f"write it again with `ddpm check {uri} --quarantine`"
    )


def drop_stale_quarantine(dataset: Dataset, storage: Storage) -> None:
    """Delete the quarantine of a rewritten dataset, if it is of an earlier dataset or damaged."""
    try:
        quarantine = read_quarantine(dataset.uri, storage)
    except DatasetError:
        quarantine = None
    if quarantine is None or quarantine.dataset_digest != dataset.digest:
        storage.delete(join(dataset.uri, layout.QUARANTINE))


def stream_digest(dataset: Dataset, quarantine: Quarantine | None) -> str:
    """Return the digest that the order of samples depends on: of the dataset, combined with that of the quarantine."""
    if quarantine is None:
        return dataset.digest
    return hashlib.sha256(f"{dataset.digest}/{quarantine.digest}".encode()).hexdigest()


def kept_shards(dataset: Dataset, split: str, quarantine: Quarantine | None) -> ShardTable:
    """Return a split's shards with the numbers of samples that the quarantine leaves, without empty shards.

    Raises:
        DatasetError: the quarantine is of another dataset, or leaves no sample.
    """
    shards = dataset.shards(split)
    if quarantine is None:
        return shards
    counts = kept_counts(dataset, split, quarantine)
    there = np.flatnonzero(counts > 0)
    return shards.take(there, counts[there])


def kept_counts(dataset: Dataset, split: str, quarantine: Quarantine | None) -> NDArray[np.int64]:
    """Return the number of samples of each shard of a split that the quarantine leaves, int64 [shards].

    Raises:
        DatasetError: the quarantine is of another dataset, or leaves no sample.
    """
    shards = dataset.shards(split)
    if quarantine is None:
        return shards.samples
    if quarantine.dataset_digest != dataset.digest:
        raise DatasetError(
            f"the quarantine is of dataset {quarantine.dataset_digest[:12]}, {dataset.uri} is {dataset.digest[:12]}: "
            f"write it again with `ddpm check {dataset.uri} --quarantine`"
        )
    left_out, counts = quarantine.by_shard, shards.samples.copy()
    for number, name in enumerate(shards.names):
        if name in left_out:
            excluded = left_out[name]
            counts[number] = 0 if excluded is None else counts[number] - len(excluded)
    if not (counts > 0).any():
        raise DatasetError(f"the quarantine leaves no sample of {dataset.uri}'s split {split!r}")
    return counts


def kept_places(
    dataset: Dataset, split: str, quarantine: Quarantine | None, shards: NDArray[np.int64], indices: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return where the samples of a split are for a reader that leaves out those in quarantine.

    Args:
        shards: numbers of their shards in dataset.json, int64 [n].
        indices: of the samples in the shards, as the sidecars count them, int64 [n].

    Returns:
        (which of the samples are left, their shards among those of `kept_shards`, their indices there), int64 [m] each.

    Raises:
        DatasetError: the quarantine is of another dataset, or leaves no sample.
    """
    left, places = np.arange(len(shards)), indices.copy()
    if quarantine is None:
        return left, shards, places
    counts, names = kept_counts(dataset, split, quarantine), dataset.shards(split).names
    there = counts[shards] > 0
    for number in np.unique(shards):
        excluded = np.array(sorted(quarantine.by_shard.get(names[number]) or ()), dtype=np.int64)
        chosen = shards == number
        there[chosen] &= ~np.isin(indices[chosen], excluded)
        places[chosen] -= np.searchsorted(excluded, indices[chosen])
    return left[there], (np.cumsum(counts > 0) - 1)[shards[there]], places[there]


def kept_samples(name: str, index: ShardIndex, quarantine: Quarantine | None) -> ShardIndex:
    """Return the index of a shard without the samples in quarantine.

    Raises:
        DatasetError: an entry names another sample than the sidecar has at its index.
    """
    excluded = quarantine.by_shard.get(name, {}) if quarantine else {}
    if not excluded:
        return index if excluded is not None else index.select(())
    for i, problem in excluded.items():
        if not 0 <= i < len(index.keys) or index.keys[i] != problem.sample:
            there = repr(index.keys[i]) if 0 <= i < len(index.keys) else "nothing"
            raise DatasetError(
                f"the quarantine leaves out sample {i} ({problem.sample!r}) of {name}, whose index has {there} there: "
                "write it again with `ddpm check URI --quarantine`"
            )
    return index.select([i for i in range(len(index)) if i not in excluded])
