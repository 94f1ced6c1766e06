"""What is found while a source is listed: its classes, its images in order, and what is left out and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.manifest import SourceImage, rank
from pipelines.shards.ingest.report import BadImage, Names

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")
NO_FILE = "a link that leads nowhere, a pipe, a socket or a device"
"""Reason for skipping a name in a folder that has no bytes to read."""
UNREAD_COLUMN = "columns that nothing reads"
TEST_FOLDERS = ("test", "validation", "val", "valid")
SPLIT_FOLDERS = ("train", *TEST_FOLDERS)


@dataclass(frozen=True)
class Filters:
    """Which images an ingest leaves out, though they can be read; by default none.

    Attributes:
        min_side: smallest shorter side, in pixels.
        max_aspect: largest ratio of the longer to the shorter side; None for any.
        min_caption: smallest number of characters of a caption; 0 also takes images without one.
        min_score: column of a table, and its smallest number; None for no such column.
        near_duplicates: "remove" leaves out images that are nearly the same as an earlier one; "keep" does not.
    """

    min_side: int = 0
    max_aspect: float | None = None
    min_caption: int = 0
    min_score: tuple[str, float] | None = None
    near_duplicates: Literal["keep", "remove"] = "keep"

    @property
    def column(self) -> str | None:
        """Return the column of scores."""
        return self.min_score and self.min_score[0]

    def by_row(self, caption: str | None, score: float | None) -> str | None:
        """Return why an image is left out, by what a table says of it; None where it is kept."""
        if len(caption or "") < self.min_caption:
            return f"the caption has fewer than {self.min_caption:,} characters"
        if self.min_score is not None and score is not None and not score >= self.min_score[1]:  # NaN is below
            return f"{self.min_score[0]} is below {self.min_score[1]:g}"
        return None

    def by_size(self, size: Sequence[int]) -> str | None:
        """Return why an image of this width and height is left out; None where it is kept."""
        if min(size) < self.min_side:
            return f"the shorter side has fewer than {self.min_side:,} pixels"
        if self.max_aspect is not None and max(size) > self.max_aspect * min(size):
            return f"the longer side is more than {self.max_aspect:g} times the shorter one"
        return None

    def check_source(self, where: str) -> None:
        """Refuse filters by what a table says, for a source without one.

        Raises:
            DatasetError: names the setting.
        """
        setting = "data.min_caption" if self.min_caption else "data.min_score" if self.min_score else None
        if setting:
            raise DatasetError(
                f"{where} has no table, and {setting} leaves out images by what one says: write a metadata.jsonl with "
                "`text` or the scores, or leave the setting out"
            )


@dataclass
class Notes:
    """What a listing leaves out or tells, filled while the images are taken.

    Attributes:
        bad: rows and files that are left out before any image is opened.
        unused: reason -> names of files and columns that are not used.
        deeper: paths of images in a folder inside their class folder, which does not count as a class.
        filtered: why images were left out by what a table says of them -> number of images.
    """

    bad: list[BadImage] = field(default_factory=list)
    unused: dict[str, Names] = field(default_factory=dict)
    deeper: Names = field(default_factory=Names)
    filtered: Counter[str] = field(default_factory=Counter)

    def unuse(self, reason: str, name: str) -> None:
        """Count a name that is not used."""
        self.unused.setdefault(reason, Names()).add(name)


@dataclass(frozen=True)
class Draft:
    """A source that has been listed, whose images are still to be taken, once.

    Attributes:
        classes: class names; empty for data without labels.
        images: (rank, image), in the order of the ranks.
        most: number of images, or more where some will be left out.
        notes: filled while the images are taken.
        drawn: whether the splits are drawn at random, because the source has none.
    """

    classes: tuple[str, ...]
    images: Iterator[tuple[str, SourceImage]]
    most: int
    notes: Notes
    drawn: bool = False


def drawn_split(path: str, test_fraction: float) -> str:
    """Return the split of an image, chosen by a hash of its path."""
    return "test" if int(rank(path)[:8], 16) < test_fraction * 2**32 else "train"


def named_splits(files: Iterable[str], notes: Notes) -> dict[str, str | None]:
    """Return the split of each file that is used: its folder or the beginning of its name, None where it is drawn.

    Args:
        files: paths of files that hold many images.
        notes: gets the files of splits that are not used.
    """
    named: dict[str, str | None] = {}
    for name in sorted(files):
        words = [*name.lower().split("/")[:-1], re.split(r"[-_.]", name.lower().rpartition("/")[2])[0]]
        named[name] = next((word for word in words if word in SPLIT_FOLDERS), None)
    test = next((word for word in TEST_FOLDERS if word in named.values()), None)
    if "train" not in named.values() or test is None:
        return dict.fromkeys(named)
    for name, word in named.items():
        if word not in ("train", test):
            notes.unuse("of another split than those that are used", name)
    return {name: "test" if word == test else word for name, word in named.items() if word in ("train", test)}
