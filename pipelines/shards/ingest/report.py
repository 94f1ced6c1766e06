"""The records of finished shards, and the report of an ingest: images that were left out, changed or not used."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.storage import NotFoundError, Storage, join, layout

REPORT_VERSION = 1
NEARLY = "nearly the same as an earlier one"
EXAMPLES = 100
"""Largest number of names per kind in the report."""


@dataclass(frozen=True)
class BadImage:
    """An image or a row of a table that was left out, and the reason."""

    origin: str
    reason: str


@dataclass(eq=False)
class Names:
    """How many names there are of a kind, and the first ones in the order of names, as many as the report shows."""

    count: int = 0
    _kept: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, *names: str) -> Names:
        """Return these names."""
        found = cls()
        for name in names:
            found.add(name)
        return found

    def add(self, name: str) -> None:
        """Count a name."""
        self.count += 1
        self._kept.append(name)
        if len(self._kept) == 2 * EXAMPLES:
            self._kept = sorted(self._kept)[:EXAMPLES]

    def __eq__(self, other: object) -> bool:
        """Return whether the counts and the first names are equal."""
        return isinstance(other, Names) and self.plain() == other.plain()

    def __bool__(self) -> bool:
        """Return whether there is any."""
        return self.count > 0

    @property
    def examples(self) -> tuple[str, ...]:
        """The first names, at most `EXAMPLES`."""
        return tuple(sorted(self._kept)[:EXAMPLES])

    def plain(self) -> dict[str, Any]:
        """Return the names as the report shows them."""
        return {"count": self.count, "examples": list(self.examples)}


@dataclass(frozen=True)
class PixelSums:
    """Exact sums over uint8 pixels per channel, independent of order and grouping of the images."""

    count: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]

    @classmethod
    def of(cls, pixels: NDArray[np.uint8]) -> PixelSums:
        """Return the sums of one image [H, W, C]."""
        flat = pixels.reshape(-1, pixels.shape[-1]).astype(np.int64)
        return cls(len(flat), tuple(flat.sum(0).tolist()), tuple((flat * flat).sum(0).tolist()))

    def __add__(self, other: PixelSums) -> PixelSums:
        """Return the sums over both; sums of no pixels fit any number of channels."""
        if not self.count or not other.count:
            return self if self.count else other
        return PixelSums(
            self.count + other.count,
            tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)),
            tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
        )

    def mean(self) -> tuple[float, ...]:
        """Return the mean of pixels in [-1, 1], per channel."""
        return tuple(round(s / self.count / 127.5 - 1, 6) for s in self.sums)

    def std(self) -> tuple[float, ...]:
        """Return the standard deviation of pixels in [-1, 1], per channel."""
        pairs = zip(self.sums, self.squares, strict=True)
        return tuple(round((self.count * q - s * s) ** 0.5 / self.count / 127.5, 6) for s, q in pairs)


@dataclass(frozen=True)
class ShardRecord:
    """The record of a finished shard, `ingest-progress/SHARD.json`.

    Attributes:
        name: file name of the tar.
        key: digest of the inputs and settings from which it was made.
        samples: number of samples; where it is 0, because no image could be read, there is no tar.
        size: size of the tar in bytes.
        sha256: SHA-256 of the tar.
        index_sha256: SHA-256 of its sidecar.
        pixels: sums over the pixels of its images.
        per_class: class index -> number of samples.
        changes: change beyond crop and resize, such as "RGBA made RGB" -> number of images.
        bad: images that were left out.
        filtered: why images were left out by their size -> number of images.
    """

    name: str
    key: str
    samples: int
    size: int
    sha256: str
    index_sha256: str
    pixels: PixelSums
    per_class: dict[int, int]
    changes: dict[str, int]
    bad: tuple[BadImage, ...]
    filtered: dict[str, int] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """Return the split that the shard belongs to."""
        return self.name.partition("-")[0]

    def to_json(self) -> str:
        """Return the text of the record."""
        return json.dumps({"schema_version": REPORT_VERSION, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: bytes | str) -> ShardRecord | None:
        """Read a record; None if it is damaged or of another version, so that its shard is written again."""
        try:
            plain = json.loads(text)
            if plain.pop("schema_version") != REPORT_VERSION:
                return None
            pixels = plain.pop("pixels")
            return cls(
                pixels=PixelSums(pixels["count"], tuple(pixels["sums"]), tuple(pixels["squares"])),
                per_class={int(label): count for label, count in plain.pop("per_class").items()},
                bad=tuple(BadImage(**bad) for bad in plain.pop("bad")),
                **plain,
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class IngestReport:
    """The content of `ingest-report.json`: facts about an ingest that the shards do not show.

    Attributes:
        source: the source as the user gave it.
        settings: the settings of the shards.
        samples: split -> class name ("" for data without classes) -> number of written samples.
        bad: images and rows that were left out.
        empty_classes: classes without any sample.
        changes: change beyond crop and resize -> number of images.
        without_caption: images without a caption in a source with captions; they have an empty caption.
        unused: reason -> files and columns that were not used.
        alike: pairs of images that are nearly the same, which are in one split.
        deeper: images in a folder inside their class folder, which is no class of its own.
        filtered: why images were left out though they can be read -> number of images.
    """

    source: str
    settings: dict[str, Any]
    samples: dict[str, dict[str, int]]
    bad: tuple[BadImage, ...] = ()
    empty_classes: tuple[str, ...] = ()
    changes: dict[str, int] = field(default_factory=dict)
    without_caption: Names = field(default_factory=Names)
    unused: dict[str, Names] = field(default_factory=dict)
    alike: Names = field(default_factory=Names)
    deeper: Names = field(default_factory=Names)
    filtered: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of the report, with every left-out image; other lists are counts with the first names."""
        plain = asdict(self)
        plain["bad_count"] = len(self.bad)
        plain |= {name: getattr(self, name).plain() for name in ("without_caption", "alike", "deeper")}
        plain["unused"] = {reason: names.plain() for reason, names in sorted(self.unused.items())}
        return json.dumps({"report_version": REPORT_VERSION, **plain}, indent=1)

    def lines(self) -> list[str]:
        """Return one line for each kind of change, missing captions, and unused files."""
        found = [f"{_images(count)}: {change}" for change, count in sorted(self.changes.items())]
        found += [f"{_images(count)} left out: {reason}" for reason, count in sorted(self.filtered.items())]
        if self.without_caption:
            found.append(f"{_counted(self.without_caption)} without a caption, such as {_first(self.without_caption)}")
        if self.alike:
            alike = _counted(self.alike)
            split = "" if NEARLY in self.filtered else ", and in its split"
            found.append(f"{alike} nearly the same as another{split}, such as {_first(self.alike)}")
        if self.deeper:
            found.append(
                f"{_counted(self.deeper)} in a folder inside a class folder, which makes no class of its own, such "
                f"as {_first(self.deeper)}: for classes of the inner folders, name them in a metadata.jsonl, or move "
                "them up"
            )
        return found + [
            f"{names.count:,} not used, {why}: such as {_first(names)}" for why, names in sorted(self.unused.items())
        ]


def _counted(names: Names) -> str:
    return _images(names.count)


def _first(names: Names) -> str:
    return names.examples[0]


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


@dataclass(frozen=True)
class RecordedEncoder:
    """The text encoder that embedded the captions of a dataset; fields are None if unknown.

    Attributes:
        name: hub name or folder.
        digest: SHA-256 over its weights.
    """

    name: str | None = None
    digest: str | None = None


def recorded_encoder(uri: str, storage: Storage) -> RecordedEncoder:
    """Return the text encoder that embedded the captions of a dataset, from the report of its ingest."""
    try:
        settings = json.loads(storage.read(join(uri, layout.INGEST_REPORT)))["settings"]
        return RecordedEncoder(settings["text_encoder"] or None, settings.get("text_encoder_digest"))
    except (NotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return RecordedEncoder()
