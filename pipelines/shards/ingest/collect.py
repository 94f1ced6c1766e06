"""What is found while a source is listed: its classes, its images in order, and what is left out and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pipelines.shards.ingest.manifest import SourceImage, rank
from pipelines.shards.ingest.report import BadImage, Names

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")
NO_FILE = "a link that leads nowhere, a pipe, a socket or a device"
"""Reason for skipping a name in a folder that has no bytes to read."""
TEST_FOLDERS = ("test", "validation", "val", "valid")
SPLIT_FOLDERS = ("train", *TEST_FOLDERS)


@dataclass
class Notes:
    """What a listing leaves out or tells, filled while the images are taken.

    Attributes:
        bad: rows and files that are left out before any image is opened.
        unused: reason -> names of files and columns that are not used.
        deeper: paths of images in a folder inside their class folder, which does not count as a class.
    """

    bad: list[BadImage] = field(default_factory=list)
    unused: dict[str, Names] = field(default_factory=dict)
    deeper: Names = field(default_factory=Names)

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
