"""Indexing of WebDataset tars written by other tools, so that training can read them (`ddpm index`)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np

from pipelines.presentation.progress import Progress, no_progress
from pipelines.shards.audit.scan import ByteCounter, ObjectStream, TarFaultError, in_threads, read_samples, scan_shard
from pipelines.shards.index import Dataset, DatasetError, ShardInfo, make_dataset, read_dataset
from pipelines.shards.members import MAX_CLASSES, Examined, FlawError, SampleFormat, decode_image
from pipelines.shards.quarantine import Problem, Quarantine, kept_shards, make_quarantine
from pipelines.storage import Entry, Storage, join, layout

SHOWN = 20
"""Largest number of problems in an error message."""


@dataclass(frozen=True)
class SplitRule:
    """A split, and the pattern that the paths of its tars below the dataset match."""

    split: str
    pattern: str

    @classmethod
    def parse(cls, text: str) -> SplitRule:
        """Parse NAME=PATTERN, or NAME for every tar.

        Raises:
            ValueError: the text has another form.
        """
        split, _, pattern = text.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", split):
            raise ValueError(f"{text!r} is not a split: write NAME=PATTERN, such as 'train=part-00[0-8]*.tar', or NAME")
        return cls(split, pattern or "*")


# Without rules, the split is the first folder below the dataset, or the start of the tar's name.
_BY_NAME = re.compile(r"^(train|test)(?:/|[^a-z/][^/]*\.tar$|\.tar$)")


class IndexRefusedError(DatasetError):
    """Tars or samples have problems, so no dataset was written; `problems` has all of them."""

    def __init__(self, uri: str, problems: Sequence[Problem]) -> None:
        lines = [f"\n  {p.shard}: {p.sample + ': ' if p.sample else ''}{p.reason}" for p in problems[:SHOWN]]
        more = f"\n  … and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
        super().__init__(
            f"{uri}: {len(problems):,} problem{'s' * (len(problems) != 1)}, so no dataset.json was written"
            f"{''.join(lines)}{more}\nWrite those again, or leave them out with --quarantine"
        )
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Indexed:
    """The dataset and the quarantine that `index_tars` wrote."""

    dataset: Dataset
    quarantine: Quarantine | None

    def lines(self) -> list[str]:
        """Return lines with counts, the configuration to train with, and what is missing."""
        data = self.dataset
        counts = ", ".join(f"{data.samples(split):,} {split}" for split in data.splits)
        lines = [
            f"{counts} samples in {sum(len(s) for s in data.splits.values()):,} shards; digest {data.digest[:12]}",
            f"train on it with data.uri={data.uri} data.image_size={data.image_size} data.channels={data.channels} "
            f"data.num_classes={len(data.classes)}",
        ]
        if "test" not in data.splits:
            lines.append("there is no split test: training works, `ddpm evaluate` needs one")
        if self.quarantine is not None:
            lines.append(f"entries in quarantine.json: {len(self.quarantine.excluded):,}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types, for `--json`."""
        return {
            "uri": self.dataset.uri,
            "digest": self.dataset.digest,
            "samples": {split: self.dataset.samples(split) for split in self.dataset.splits},
            "image_size": self.dataset.image_size,
            "channels": self.dataset.channels,
            "classes": list(self.dataset.classes),
            "quarantine": self.quarantine
            and {"digest": self.quarantine.digest, "excluded": [asdict(p) for p in self.quarantine.excluded]},
        }


def tars(uri: str, storage: Storage) -> dict[str, Entry]:
    """Return every tar below a folder, by its path relative to the folder."""
    start = len(uri.rstrip("/")) + 1
    return {e.uri[start:]: e for e in storage.list(uri) if e.uri.endswith(".tar")}


def assign_splits(names: Sequence[str], rules: Sequence[SplitRule] = ()) -> dict[str, list[str]]:
    """Return split -> tars sorted by name; the first matching rule decides.

    Raises:
        DatasetError: a tar belongs to no split, or there is no split train.
    """
    splits: dict[str, list[str]] = {}
    unassigned = []
    for name in sorted(names):
        if rules:
            split = next((rule.split for rule in rules if fnmatchcase(name, rule.pattern)), None)
        else:
            split = found.group(1) if (found := _BY_NAME.match(name)) else None
        if split is None:
            unassigned.append(name)
        else:
            splits.setdefault(split, []).append(name)
    if unassigned:
        raise DatasetError(
            f"{len(unassigned)} of {len(names)} tars belong to no split: {', '.join(unassigned[:5])}"
            f"{' …' if len(unassigned) > 5 else ''}; a split is a folder or the start of a name, train or test; "
            "or say which are which with --split 'train=PATTERN' --split 'test=PATTERN', or --split train for all"
        )
    if "train" not in splits:
        raise DatasetError(f"no tar is in the split train, only in {', '.join(splits)}: name it with --split train=…")
    # Train comes first, as in an ingest.
    return {"train": splits.pop("train"), **splits}


class Tally:
    """Counts over the flawless samples of a shard: pixels by value, and labels.

    All counts are integers, so sums do not depend on the order of shards.
    """

    def __init__(self) -> None:
        self.grey = np.zeros((1, 256), dtype=np.int64)
        self.colour = np.zeros((3, 256), dtype=np.int64)
        self.coloured = self.labelled = self.samples = 0
        self.top_label = -1

    def add(self, sample: Examined) -> None:
        """Count one sample."""
        assert sample.pixels is not None
        channels = sample.pixels.shape[-1]
        counts = self.grey if channels == 1 else self.colour
        for c in range(channels):
            counts[c] += np.bincount(sample.pixels[..., c].ravel(), minlength=256)
        self.samples += 1
        self.coloured += channels == 3
        self.labelled += sample.label is not None
        self.top_label = max(self.top_label, -1 if sample.label is None else sample.label)

    @classmethod
    def of(cls, parts: Sequence[Tally]) -> Tally:
        """Return the sum of the counts of several shards."""
        whole = cls()
        for part in parts:
            whole.grey += part.grey
            whole.colour += part.colour
            whole.coloured += part.coloured
            whole.labelled += part.labelled
            whole.samples += part.samples
            whole.top_label = max(whole.top_label, part.top_label)
        return whole

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of pixels in [-1, 1] per channel; a grey image counts in every channel."""
        counts = self.grey if channels == 1 else self.colour + self.grey
        values = np.arange(256)
        mean, std = [], []
        for n, s, q in zip(
            counts.sum(1).tolist(), (counts @ values).tolist(), (counts @ values**2).tolist(), strict=True
        ):
            mean.append(round(s / n / 127.5 - 1, 6))
            std.append(round((n * q - s * s) ** 0.5 / n / 127.5, 6))
        return tuple(mean), tuple(std)


@dataclass(frozen=True)
class _Scanned:
    """One shard, with its problems and counts."""

    info: ShardInfo
    problems: tuple[Problem, ...]
    tally: Tally


def index_tars(
    uri: str,
    storage: Storage,
    *,
    rules: Sequence[SplitRule] = (),
    classes: Sequence[str] = (),
    image_size: int | None = None,
    replace: bool = False,
    quarantine: bool = False,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Indexed:
    """Scan every tar below an address, write sidecars and, if there are no problems, `dataset.json`.

    Args:
        uri: the folder; tars in folders below it are included.
        rules: rules that assign tars to splits; default: folders or name prefixes `train` and `test`.
        classes: class names; default: those of the replaced dataset.json, else "0", "1", ….
        image_size: height and width in pixels; by default those of the first image.
        replace: replace an existing dataset.json.
        quarantine: write problems to `quarantine.json` instead of raising an error.
        threads: number of shards read in parallel.
        progress: called with (done, total) MiB.

    Raises:
        IndexRefusedError: a tar or a sample has a problem, and `quarantine` is false.
        DatasetError: there are no tars, a split has no samples, or none that is kept, or there is a dataset.json
            already.
    """
    described = _described(uri, storage, replace)
    entries = tars(uri, storage)
    if not entries:
        raise DatasetError(f"no *.tar at {uri}: give the folder that holds the shards")
    splits = assign_splits(list(entries), rules)
    form = find_form([(name, entries[name]) for name in splits["train"]], storage, image_size, len(classes) or None)
    counter = ByteCounter(sum(entry.size for entry in entries.values()), progress)
    scan = partial(_scan, uri=uri, storage=storage, form=form, counter=counter)
    order = [(name, entries[name]) for names in splits.values() for name in names]
    done = dict(zip([name for name, _ in order], in_threads(scan, order, threads or default_threads()), strict=True))
    problems = [problem for scanned in done.values() for problem in scanned.problems]
    if problems and not quarantine:
        raise IndexRefusedError(uri, problems)
    for split, names in splits.items():
        if not any(done[name].tally.samples for name in names):
            raise IndexRefusedError(uri, problems) if problems else DatasetError(f"{uri}: {split} has no samples")
    dataset = _describe(
        uri, {split: [done[n] for n in names] for split, names in splits.items()}, form, classes, described
    )
    left_out = make_quarantine(dataset, problems) if problems else None
    for split in splits:
        kept_shards(dataset, split, left_out)  # raises where nothing is left of a split
    if left_out is None:
        storage.delete(join(uri, layout.QUARANTINE))
    else:
        storage.write(join(uri, layout.QUARANTINE), left_out.to_json().encode())
    storage.write(join(uri, layout.DATASET), dataset.to_json().encode())
    return Indexed(dataset, left_out)


def default_threads() -> int:
    """Return the number of shards read in parallel: two per core, because half of the time is spent waiting."""
    return min(32, 2 * (os.cpu_count() or 1))


def _described(uri: str, storage: Storage, replace: bool) -> Dataset | None:
    """Return the existing dataset, or None if there is none that can be read.

    Raises:
        DatasetError: there is one, and `replace` is false.
    """
    if not storage.exists(join(uri, layout.DATASET)):
        return None
    if not replace:
        raise DatasetError(
            f"{uri} has a dataset.json already: verify it with `ddpm check {uri}`, or write it again with --replace"
        )
    try:
        return read_dataset(uri, storage)
    except DatasetError:
        return None


def find_form(
    shards: Sequence[tuple[str, Entry]], storage: Storage, image_size: int | None, classes: int | None
) -> SampleFormat:
    """Return the properties that every sample must have: those of the first sample whose image can be read.

    Raises:
        IndexRefusedError: no image can be read; the error has the problems of the samples.
        DatasetError: the image is not square, or there are no samples.
    """
    problems = []
    for name, entry in shards:
        try:
            for number, sample in enumerate(read_samples(ObjectStream(entry.uri, entry.size, storage))):
                try:
                    height, width, _ = decode_image(sample.contents).shape
                except FlawError as error:
                    problems.append(Problem(name, number, sample.key, error.flaw.kind, error.flaw.reason))
                    continue
                if image_size is None and height != width:
                    raise DatasetError(
                        f"{name}: {sample.key} is {height}x{width}: images must be square and of one size; unpack and "
                        "ingest them with `ddpm ingest FOLDER`, or give --image-size if this one is the exception"
                    )
                return SampleFormat(image_size or height, None, "cls" in sample.contents, classes)
        except TarFaultError as error:
            problems.append(error.problem(name))
    raise (
        IndexRefusedError(shards[0][1].uri.removesuffix("/" + shards[0][0]), problems)
        if problems
        else DatasetError(f"{', '.join(name for name, _ in shards[:5])}: not one sample for the split train")
    )


def _scan(
    named: tuple[str, Entry], *, uri: str, storage: Storage, form: SampleFormat, counter: ByteCounter
) -> _Scanned:
    """Scan one shard and write its index, so that only the shards being scanned are in memory."""
    name, entry = named
    tally = Tally()
    found = scan_shard(name, ObjectStream(entry.uri, entry.size, storage, counter.add), form, tally.add)
    storage.write(join(uri, layout.index_name(name)), found.index.to_json().encode())
    return _Scanned(ShardInfo(name, len(found.index), found.bytes, found.sha256), found.problems, tally)


def _describe(
    uri: str, splits: dict[str, list[_Scanned]], form: SampleFormat, classes: Sequence[str], described: Dataset | None
) -> Dataset:
    everything = Tally.of([scanned.tally for shards in splits.values() for scanned in shards])
    channels = 3 if everything.coloured else 1
    mean, std = Tally.of([scanned.tally for scanned in splits["train"]]).statistics(channels)
    assert form.image_size is not None
    return make_dataset(
        uri,
        splits={split: tuple(scanned.info for scanned in shards) for split, shards in splits.items()},
        classes=_class_names(everything.top_label + 1, classes, described),
        channels=channels,
        image_size=form.image_size,
        mean=mean,
        std=std,
    )


def _class_names(count: int, given: Sequence[str], described: Dataset | None) -> tuple[str, ...]:
    """Return the class names: the given ones, else those of the replaced dataset, else numbers."""
    assert count <= MAX_CLASSES
    if given:
        return tuple(given) if count else ()
    if described is not None and len(described.classes) >= count > 0:
        return described.classes
    return tuple(str(i) for i in range(count))
