"""Ingest: images of a folder, or the built-in digits, to WebDataset shards with their indexes."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image

from pipelines.shards.index import Dataset, DatasetError, ShardInfo, index_tar, make_dataset, sidecar
from pipelines.storage import Storage, join

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """One image to ingest, not yet opened.

    Attributes:
        split: "train" or "test".
        label: index into the classes.
        origin: where it comes from, for reports and the sample's json.
        load: opens it; may raise OSError or ValueError.
    """

    split: str
    label: int
    origin: str
    load: Callable[[], Image.Image]


@dataclass(frozen=True)
class BadImage:
    """An image that was left out, and why."""

    origin: str
    reason: str


@dataclass(frozen=True)
class Ingested:
    """What an ingest wrote and what it left out."""

    dataset: Dataset
    bad: tuple[BadImage, ...]
    empty_classes: tuple[str, ...]


def ingest(
    source: str,
    uri: str,
    storage: Storage,
    *,
    image_size: int,
    channels: int,
    shard_samples: int = 1000,
    test_fraction: float = 0.1,
    progress: Progress = lambda done, total: None,
) -> Ingested:
    """Write a source's images as PNG shards with `dataset.json`; the same input gives the same digest.

    Args:
        source: "digits", or a folder of class folders, with or without `train/` and `test/` above them.
        uri: the folder to write to. `dataset.json` is written last and stale shards are removed after it.
        image_size: images are cropped to their central square and resized to this.
        channels: 1 (grey) or 3 (RGB).
        shard_samples: samples per shard.
        test_fraction: share of a folder without `test/` that becomes the test split, chosen by path.

    Raises:
        DatasetError: no such source, no class folders, or not one readable image in a split.
    """
    if source == "digits":
        classes, sources = _digits(image_size, channels)
    else:
        classes, sources = _folder(Path(source), test_fraction)
    bad: list[BadImage] = []
    per_class: Counter[int] = Counter()
    splits: dict[str, tuple[ShardInfo, ...]] = {}
    statistics = _Statistics(channels)
    done = 0
    with tempfile.TemporaryDirectory(prefix="ddpm-ingest-") as scratch:
        for split in ("train", "test"):

            def samples(split: str = split) -> Iterator[dict[str, Any]]:
                nonlocal done
                for number, item in enumerate(s for s in sources if s.split == split):
                    done += 1
                    progress(done, len(sources))
                    try:
                        pixels = _prepare(item.load(), image_size, channels)
                    except (OSError, ValueError, Image.DecompressionBombError) as error:
                        bad.append(BadImage(item.origin, str(error) or type(error).__name__))
                        continue
                    per_class[item.label] += 1
                    if split == "train":
                        statistics.add(pixels)
                    yield {
                        "__key__": f"{split}-{number:08d}",
                        "png": _png(pixels),
                        "cls": str(item.label).encode(),
                        "json": json.dumps({"origin": item.origin, "class": classes[item.label]}).encode(),
                    }

            splits[split] = _write_split(split, samples(), Path(scratch), uri, storage, shard_samples)
            if not splits[split]:
                named = "".join(f"\n  {b.origin}: {b.reason}" for b in bad[:5])
                raise DatasetError(f"{source}: no readable image for the {split} split{named}")
    dataset = make_dataset(
        uri,
        splits=splits,
        classes=tuple(classes),
        channels=channels,
        image_size=image_size,
        mean=statistics.mean(),
        std=statistics.std(),
    )
    empty = tuple(name for i, name in enumerate(classes) if not per_class[i])
    report = {"source": source, "bad": [asdict(b) for b in bad], "empty_classes": empty}
    storage.write(join(uri, "ingest-report.json"), json.dumps(report, indent=1).encode())
    storage.write(join(uri, "dataset.json"), dataset.to_json().encode())
    _remove_stale(uri, dataset, storage)
    return Ingested(dataset, tuple(bad), empty)


def source_digest(source: str) -> str:
    """A digest that changes when a source's files do (names, sizes and modification times for a folder)."""
    state = [source]
    if source != "digits":
        folder = Path(source)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        state += [f"{p.relative_to(folder)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256("\n".join(state).encode()).hexdigest()


def _write_split(
    split: str,
    samples: Iterator[dict[str, Any]],
    scratch: Path,
    uri: str,
    storage: Storage,
    shard_samples: int,
) -> tuple[ShardInfo, ...]:
    shards: list[ShardInfo] = []

    def publish(name: str) -> None:
        path = Path(name)
        index = index_tar(path)
        if index.keys:
            storage.upload(path, join(uri, path.name))
            storage.write(join(uri, sidecar(path.name)), index.to_json().encode())
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            shards.append(ShardInfo(path.name, len(index.keys), path.stat().st_size, digest))
        path.unlink()

    pattern = str(scratch / f"{split}-%06d.tar")
    # mtime=0: the writer would stamp the current time, and equal inputs would not give equal digests.
    with webdataset.ShardWriter(
        pattern, maxcount=shard_samples, maxsize=1e12, post=publish, mtime=0.0, verbose=0
    ) as writer:
        for sample in samples:
            writer.write(sample)
    return tuple(shards)


def _remove_stale(uri: str, dataset: Dataset, storage: Storage) -> None:
    current = {name for shards in dataset.splits.values() for s in shards for name in (s.name, sidecar(s.name))}
    for entry in storage.list(uri):
        name = entry.uri[len(uri.rstrip("/")) + 1 :]
        if name.startswith(("train-", "test-")) and name.endswith((".tar", ".index.json")) and name not in current:
            storage.delete(entry.uri)


def _digits(image_size: int, channels: int) -> tuple[list[str], list[Source]]:
    """scikit-learn's 1,797 digits; every fifth, counted from the fifth, is for testing."""
    if (image_size, channels) != (8, 1):
        raise DatasetError(
            f"digits are 8x8 grey, not {image_size}x{image_size} with {channels} channels: use data=digits"
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError("digits come with scikit-learn: pip install 'ddpm-pipelines[local]'") from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [str(i) for i in range(10)], [
        Source(
            "test" if i % 5 == 4 else "train",
            int(label),
            f"digits[{i}]",
            partial(Image.fromarray, pixels[i]),
        )
        for i, label in enumerate(digits.target)
    ]


def _folder(folder: Path, test_fraction: float) -> tuple[list[str], list[Source]]:
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder; a source is `digits` or a folder of class folders")
    if not 0 < test_fraction < 1:
        raise DatasetError(f"the test fraction must be between 0 and 1, got {test_fraction}")
    divided = (folder / "train").is_dir() and (folder / "test").is_dir()
    roots = {split: folder / split for split in ("train", "test")} if divided else {"": folder}
    classes = sorted({p.name for root in roots.values() for p in root.iterdir() if p.is_dir() and p.name[0] != "."})
    if not classes:
        raise DatasetError(f"{folder} has no class folders; expected {folder}/CLASS/*.png")
    sources: list[tuple[str, Source]] = []
    for split, root in roots.items():
        for label, name in enumerate(classes):
            for path in sorted((root / name).rglob("*")) if (root / name).is_dir() else []:
                if path.suffix.lower() in SUFFIXES:
                    origin = str(path.relative_to(folder))
                    rank = hashlib.sha256(origin.encode()).hexdigest()
                    here = split or ("test" if int(rank[:8], 16) < test_fraction * 2**32 else "train")
                    sources.append((rank, Source(here, label, origin, partial(_open, path))))
    # Files come class by class: ordered by hash instead, every shard holds every class.
    return classes, [source for _, source in sorted(sources, key=lambda pair: pair[0])]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image.copy()


def _prepare(image: Image.Image, size: int, channels: int) -> NDArray[np.uint8]:
    """Central square, resized, as uint8 [size, size, channels]."""
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BOX if side > 2 * size else Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).reshape(size, size, channels)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "png")
    return buffer.getvalue()


class _Statistics:
    """Running mean and deviation of pixels in [-1, 1], per channel."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sum = np.zeros(channels)
        self.squares = np.zeros(channels)

    def add(self, pixels: NDArray[np.uint8]) -> None:
        values = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64) / 127.5 - 1
        self.count += len(values)
        self.sum += values.sum(0)
        self.squares += (values**2).sum(0)

    def mean(self) -> tuple[float, ...]:
        return tuple(round(float(v), 6) for v in self.sum / max(self.count, 1))

    def std(self) -> tuple[float, ...]:
        variance = self.squares / max(self.count, 1) - (self.sum / max(self.count, 1)) ** 2
        return tuple(round(float(v) ** 0.5, 6) for v in np.maximum(variance, 0))
