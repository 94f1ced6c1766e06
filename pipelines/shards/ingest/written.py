"""What an ingest has written so far: counts, statistics and shards, merged from the records of finished shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipelines.shards.index import ShardInfo
from pipelines.shards.ingest.manifest import SourceImage
from pipelines.shards.ingest.report import NEARLY, BadImage, IngestReport, Names, PixelSums, ShardRecord
from pipelines.shards.ingest.sources import Source
from pipelines.shards.ingest.tasks import IngestSettings
from pipelines.storage import layout


@dataclass
class MergedRecords:
    """Merges the records of finished shards, in any order.

    Attributes:
        listed: the source.
        settings: settings of the ingest.
        alike: pairs of images that are nearly the same.
        images: images by split, of those that have been planned.
        shards: shards that hold a sample, by split.
        planned: names of all finished shards, also of those without a sample.
        samples: samples by split and class.
        changes: changes beyond crop and resize.
        bad: images that were left out.
        filtered: why images were left out by their size -> number of images.
        pixels: sums over the pixels of the train split.
        reused: shards that were finished before.
    """

    listed: Source
    settings: IngestSettings
    alike: Names = field(default_factory=Names)
    images: Counter[str] = field(default_factory=Counter)
    shards: dict[str, list[ShardInfo]] = field(default_factory=lambda: {"train": [], "test": []})
    planned: list[str] = field(default_factory=list)
    samples: dict[str, Counter[int]] = field(default_factory=lambda: {"train": Counter(), "test": Counter()})
    changes: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, tuple[BadImage, ...]]] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)
    pixels: PixelSums = field(default_factory=lambda: PixelSums(0, (), ()))
    reused: int = 0

    @property
    def removes(self) -> bool:
        """Return whether near-duplicates are left out."""
        return self.settings.filters.near_duplicates == "remove"

    @property
    def compared(self) -> bool:
        """Return whether images are compared with each other: to be in one split, where that is drawn, or removed."""
        return self.listed.drawn or self.removes

    def counted(self, images: Iterable[SourceImage]) -> Iterator[SourceImage]:
        """Yield the images, and count them."""
        for image in images:
            self.images[image.split] += 1
            yield image

    def add(self, record: ShardRecord, reused: bool) -> None:
        """Take the record of a finished shard, and whether it was finished before."""
        self.planned.append(record.name)
        self.reused += reused
        self.samples[record.split].update(record.per_class)
        self.changes.update(record.changes)
        self.filtered.update(record.filtered)
        if record.bad:
            self.bad.append((record.name, record.bad))
        if record.split == "train":
            self.pixels += record.pixels
        if record.samples:
            self.shards[record.split].append(ShardInfo(record.name, record.samples, record.size, record.sha256))

    def report(self, source: str) -> IngestReport:
        """Return the report of the ingest."""
        listed, settings = self.listed, self.settings
        named = dict(enumerate(listed.classes)) or {0: ""}
        empty = (n for i, n in named.items() if listed.classes and not any(c[i] for c in self.samples.values()))
        return IngestReport(
            source=source,
            settings=settings.described(),
            samples={split: {name: count[i] for i, name in named.items()} for split, count in self.samples.items()},
            bad=(*listed.bad, *(bad for _, found in sorted(self.bad, key=_train_first) for bad in found)),
            empty_classes=tuple(empty),
            changes=dict(sorted(self.changes.items())),
            without_caption=listed.without_caption if settings.captioned else Names(),
            unused=dict(listed.unused),
            alike=self.alike,
            deeper=listed.deeper,
            filtered=self._all_filtered(),
        )

    def _all_filtered(self) -> dict[str, int]:
        removed = Counter({NEARLY: self.alike.count if self.removes else 0})
        return dict(sorted((self.filtered + removed + Counter(self.listed.filtered)).items()))

    def explain_empty(self, source: str, split: str, report: IngestReport) -> str:
        """Return the error message for a split without readable images."""
        named = "".join(f"\n  {bad.origin}: {bad.reason}" for bad in report.bad[:5])
        named = "".join(f"\n  {_images(n)} left out: {reason}" for reason, n in report.filtered.items()) + named
        more = f"\n  and {len(report.bad) - 5:,} more: see {layout.INGEST_REPORT}" if len(report.bad) > 5 else ""
        if self.images[split]:
            return f"{source}: no readable image for the {split} split{named}{more}"
        other = self.images.total()
        fix = f"the {other:,} images fell to the other: choose another test_fraction, or make train/ and test/ yourself"
        nothing = f"{source}: no readable image for the {split} split"
        return f"{nothing}; {fix if other else 'it holds no image'}{named}{more}"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _train_first(found: tuple[str, tuple[BadImage, ...]]) -> tuple[bool, str]:
    return found[0].startswith("test"), found[0]
