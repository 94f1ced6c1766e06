"""Indexing of WebDataset tars written by other tools, so that training can read them (`ddpm index`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from ddpm.image_size import ImageSize, as_setting, of_sides
from pipelines.shards.audit.indexed import IndexedTar, IndexTar, Tally
from pipelines.shards.audit.recorded import (
    IN_THREADS,
    ByteCounter,
    Recorded,
    Tar,
    TarReading,
    list_tars,
    read_tars,
)
from pipelines.shards.audit.scan import ObjectStream, TarFaultError, read_samples
from pipelines.shards.forgotten import forgotten_samples
from pipelines.shards.index import Dataset, DatasetError, ShardInfo, make_dataset, read_dataset
from pipelines.shards.members import MAX_CLASSES, FlawError, SampleFormat, decode_image
from pipelines.shards.quarantine import Problem, Quarantine, kept_shards, make_quarantine, store_quarantine
from pipelines.storage import Storage, join, layout

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
            f"train on it with data.uri={data.uri} data.image_size={as_setting(data.image_size)} "
            f"data.channels={data.channels} "
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


def index_tars(
    uri: str,
    storage: Storage,
    *,
    rules: Sequence[SplitRule] = (),
    classes: Sequence[str] = (),
    image_size: ImageSize | None = None,
    replace: bool = False,
    quarantine: bool = False,
    reading: TarReading = IN_THREADS,
) -> Indexed:
    """Scan every tar below an address, write sidecars and, if there are no problems, `dataset.json`.

    What is in each tar is recorded below `index-progress/` as soon as it is known: given again after an interruption,
    or with `quarantine` after an `IndexRefusedError`, the same call reads no tar again that has not changed. The
    records are deleted when `dataset.json` is written.

    Args:
        uri: the folder; tars in folders below it are included.
        rules: rules that assign tars to splits; default: folders or name prefixes `train` and `test`.
        classes: class names; default: those of the replaced dataset.json, else "0", "1", ….
        image_size: height and width in pixels, one number for square images; by default those of the first image.
        replace: replace an existing dataset.json.
        quarantine: write problems to `quarantine.json` instead of raising an error.
        reading: where the tars are read, and who is told.

    Raises:
        IndexRefusedError: a tar or a sample has a problem, and `quarantine` is false.
        DatasetError: there are no tars, a split has no samples, or none that is kept, or there is a dataset.json
            already.
    """
    described = _described(uri, storage, replace)
    stored = list_tars(uri, storage)
    if not stored:
        raise DatasetError(f"no *.tar at {uri}: give the folder that holds the shards")
    splits = assign_splits(list(stored), rules)
    form = find_form([stored[name] for name in splits["train"]], storage, image_size, len(classes) or None)
    recorded = Recorded(IndexTar(uri, storage, form), storage, join(uri, layout.INDEX_PROGRESS))
    everything = _Everything.read(recorded, stored, splits, reading)
    problems = everything.problems
    if problems and not quarantine:
        raise IndexRefusedError(uri, problems)
    for split in splits:
        if not everything.tallies[split].samples:
            raise IndexRefusedError(uri, problems) if problems else DatasetError(f"{uri}: {split} has no samples")
    dataset = everything.describe(uri, form, classes, described)
    kept_out = (*forgotten_samples(dataset, storage), *problems)
    left_out = make_quarantine(dataset, kept_out) if kept_out else None
    for split in splits:
        kept_shards(dataset, split, left_out)  # raises where nothing is left of a split
    if left_out is None:
        storage.delete(join(uri, layout.QUARANTINE))
    else:
        store_quarantine(left_out, uri, storage)
    storage.write(join(uri, layout.DATASET), dataset.to_json().encode())
    recorded.clear()
    return Indexed(dataset, left_out)


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
    shards: Sequence[Tar], storage: Storage, image_size: ImageSize | None, classes: int | None
) -> SampleFormat:
    """Return the properties that every sample must have: those of the first sample whose image can be read.

    Raises:
        IndexRefusedError: no image can be read; the error has the problems of the samples.
        DatasetError: there are no samples.
    """
    problems = []
    for tar in shards:
        name, stream = tar.name, ObjectStream(tar.entry.uri, tar.entry.size, storage)
        try:
            for number, sample in enumerate(read_samples(stream)):
                try:
                    height, width, _ = decode_image(sample.contents).shape
                except FlawError as error:
                    problems.append(Problem(name, number, sample.key, error.flaw.kind, error.flaw.reason))
                    continue
                return SampleFormat(image_size or of_sides(height, width), None, "cls" in sample.contents, classes)
        except TarFaultError as error:
            problems.append(error.problem(name))
    raise (
        IndexRefusedError(shards[0].entry.uri.removesuffix("/" + shards[0].name), problems)
        if problems
        else DatasetError(f"{', '.join(tar.name for tar in shards[:5])}: not one sample for the split train")
    )


@dataclass(frozen=True)
class _Everything:
    """What is in all tars.

    Attributes:
        shards: split -> its shards, sorted by name.
        problems: in order of split, shard and sample.
        tallies: split -> counts over its flawless samples.
    """

    shards: dict[str, tuple[ShardInfo, ...]]
    problems: tuple[Problem, ...]
    tallies: dict[str, Tally]

    @classmethod
    def read(
        cls, recorded: Recorded[IndexedTar], stored: dict[str, Tar], splits: dict[str, list[str]], reading: TarReading
    ) -> _Everything:
        """Read all tars that have no record."""
        order = [(split, stored[name]) for split, names in splits.items() for name in names]
        counter = ByteCounter(sum(tar.entry.size for _, tar in order), reading.progress)
        infos, problems = dict[int, ShardInfo](), dict[int, tuple[Problem, ...]]()
        tallies = {split: Tally() for split in splits}
        for place, found in read_tars(recorded, [tar for _, tar in order], counter, reading):
            infos[place], problems[place] = found.info, found.problems
            tallies[order[place][0]].include(found.tally)
        shards: dict[str, list[ShardInfo]] = {split: [] for split in splits}
        for place, (split, _) in enumerate(order):
            shards[split].append(infos[place])
        return cls(
            {split: tuple(infos) for split, infos in shards.items()},
            tuple(problem for place in sorted(problems) for problem in problems[place]),
            tallies,
        )

    def describe(self, uri: str, form: SampleFormat, classes: Sequence[str], described: Dataset | None) -> Dataset:
        """Return the dataset.

        Args:
            uri: its folder.
            form: the properties that every sample must have.
            classes: names of the classes that were given.
            described: the dataset that is replaced.
        """
        whole = Tally()
        for part in self.tallies.values():
            whole.include(part)
        channels = 3 if whole.coloured else 1
        mean, std = self.tallies["train"].statistics(channels)
        assert form.image_size is not None
        return make_dataset(
            uri,
            splits=self.shards,
            classes=_class_names(whole.top_label + 1, classes, described),
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
