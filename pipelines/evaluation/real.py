"""Features of the real images of a dataset, computed once per evaluator and stored beside the dataset.

Every evaluation of any model compares with the same real images. They are read once for each evaluator, as a stream, in
Ray tasks; what is stored is enough for every score, so that a second evaluation reads no real image.

Below `datasets/NAME/features/STREAM-EVALUATOR/` there are

    SPLIT-000000000.safetensors …   features, labels and small copies of the images
    moments.safetensors             of the features of each split
    held-out.safetensors            some test images as they are, for likelihoods
    real.json                       names them all with their SHA-256, signed, and is written last

What nobody who is trusted has signed is computed anew: the images and the evaluator are all that decides it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors.numpy import load as numpy_load
from safetensors.numpy import save as numpy_save
from safetensors.torch import load, save
from torch import Tensor

from ddpm.quality import FeatureMoments
from pipelines.config import Config
from pipelines.environment.scratch import temporary_folder
from pipelines.evaluation.devices import task_device
from pipelines.evaluation.evaluators.base import Evaluator
from pipelines.evaluation.evaluators.share import reference_mask
from pipelines.evaluation.images import thumbnail_size, thumbnails, to_levels
from pipelines.evaluation.rows import Rows
from pipelines.evaluation.scores import features_name
from pipelines.presentation.progress import Notice, Progress, no_notice, no_progress
from pipelines.remote.tasks import finished
from pipelines.shards.index import Dataset, DatasetError
from pipelines.shards.quarantine import Quarantine, kept_shards, read_quarantine, stream_digest
from pipelines.shards.read import Batch, opened_split, spread_positions
from pipelines.signing import Derived, SignatureError, Signer, Trust
from pipelines.storage import Storage, join, layout

PART = 4096
"""Images of one stored part, and of one Ray task."""
ENCODE_BATCH = 256
HELD_OUT = 256
"""Test images that are stored as they are, for likelihoods."""
IN_FLIGHT = 64
"""Tasks that are submitted at a time."""
SPLITS = ("train", "test")
FORMAT = 2
"""Of the record; that of earlier releases, 1, was not signed."""


@dataclass(frozen=True)
class RealSplit:
    """Features and predictions of the images of one split.

    Attributes:
        count: number of its images.
        class_counts: number of its images by class; empty without labels.
        moments: of the features of those of its images that models are compared with.
    """

    count: int
    class_counts: tuple[int, ...]
    moments: FeatureMoments


@dataclass(frozen=True)
class Real:
    """The real images of a dataset, as an evaluator sees them.

    Attributes:
        stored: the folder in which all of it is.
        files: names of the files in it -> their SHA-256, as they were signed.
        stream_digest: digest of the dataset with its quarantine.
        train, test: the splits.
    """

    stored: Derived
    files: Mapping[str, str]
    stream_digest: str
    train: RealSplit
    test: RealSplit
    width: int
    thumbnail: tuple[int, int, int]

    def load(self, split: str, folder: Path, most: int | None = None) -> RealRows:
        """Return features, labels and small copies of the images of a split, in files below `folder`.

        Args:
            most: number of images, from the first one on; all of them by default.
        """
        count = getattr(self, split).count if most is None else min(most, getattr(self, split).count)
        rows = RealRows.at(folder, split, self.width, self.thumbnail)
        if len(rows.labels) >= count:
            return rows
        for first in range(0, count, PART):
            part = numpy_load(self._read(_part_name(split, first)))
            rows.write(first, {name: array[: count - first] for name, array in part.items()})
        return rows

    def reference(self, folder: Path, most: int) -> Tensor:
        """Return the features of train images that models are compared with, [N, width], N <= `most`.

        Args:
            folder: for the files of all features of the split.
        """
        rows = self.load("train", folder)
        chosen = np.flatnonzero(rows.reference.map())[:most]
        return torch.from_numpy(np.ascontiguousarray(rows.features.map()[chosen]))

    def test_features(self, most: int) -> Tensor:
        """Return the features of the first test images [N, width], N <= `most`."""
        with temporary_folder("real") as scratch:
            return torch.from_numpy(self.load("test", scratch, most=most).features.read(0, most))

    def held_out(self) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
        """Return up to `HELD_OUT` test images, uint8 [N, C, H, W], and their labels [N], if any."""
        part = numpy_load(self._read(layout.REAL_HELD_OUT))
        return part["images"], part.get("labels")

    def _read(self, name: str) -> bytes:
        """Return a file.

        Raises:
            DatasetError: it is gone, or not what was signed.
        """
        data = self.stored.read(name, self.files.get(name))
        if data is None:
            raise DatasetError(
                f"{join(self.stored.folder, name)} is gone, or not what {layout.REAL} beside it says: delete "
                f"{self.stored.folder}, and the next evaluation reads and encodes the real images anew"
            )
        return data


@dataclass(frozen=True)
class RealRows:
    """Rows of a split, one for each image in shard order.

    Attributes:
        features: float32 [N, width].
        labels: class indices, int64 [N]; -1 for data without labels.
        reference: whether models are compared with the image, bool [N]; not where the evaluator was trained on it.
        pixels: small copies of the images, uint8 [N, C, h, w].
    """

    features: Rows
    labels: Rows
    reference: Rows
    pixels: Rows

    @classmethod
    def at(cls, folder: Path, name: str, width: int, thumbnail: tuple[int, int, int]) -> RealRows:
        """Return the rows in files of a folder, empty where there are none."""
        return cls(
            Rows(folder / f"{name}-features", (width,), np.float32),
            Rows(folder / f"{name}-labels", (), np.int64),
            Rows(folder / f"{name}-reference", (), np.bool_),
            Rows(folder / f"{name}-pixels", thumbnail, np.uint8),
        )

    def write(self, at: int, part: Mapping[str, NDArray[Any]]) -> None:
        """Put the rows of a stored part at a place; `labels` last, by whose number they are known to be whole."""
        for name in ("features", "reference", "pixels", "labels"):
            getattr(self, name).write(at, part[name])


def open_real(
    dataset: Dataset,
    evaluator: Evaluator,
    config: Config,
    *,
    progress: Progress = no_progress,
    notice: Notice = no_notice,
) -> Real:
    """Return what an evaluator says of the real images; they are read and encoded on the Ray cluster the first time.

    Args:
        config: names the cache of shards, says whether tasks have a GPU, who signs and who is believed.

    Raises:
        DatasetError: the dataset has no train or no test split.
    """
    storage = Storage.of(config)
    quarantine = read_quarantine(dataset.uri, storage)
    stream = stream_digest(dataset, quarantine)
    parts = layout.FEATURES, features_name(stream, evaluator.digest)
    stored = Derived(storage, join(dataset.uri, *parts), layout.REAL, "/".join(parts))
    channels, *sides = dataset.shape
    thumbnail = (channels, *thumbnail_size(*sides))
    record, why = None, "once for this evaluator"
    try:
        record = stored.find(Trust.of(config.registry))
    except SignatureError as error:
        why = f"because what is stored of them in {stored.folder} is not believed: {error}"
    data = None if record is None else stored.read(layout.REAL_MOMENTS, record["files"].get(layout.REAL_MOMENTS))
    if record is not None and data is None:
        why = f"because {join(stored.folder, layout.REAL_MOMENTS)} is gone, or not what was stored"
    if record is None or data is None:
        signer = Signer.of(config.registry)  # before anything is computed
        notice(f"the real images are read and encoded, {why}")
        record = _compute(dataset, quarantine, config, evaluator, stored, progress)
        stored.record(record, signer)
        data = storage.read(join(stored.folder, layout.REAL_MOMENTS))
    tensors = load(data)

    def split(name: str) -> RealSplit:
        described = record["splits"][name]
        moments = FeatureMoments(described["reference"], tensors[f"{name}.mean"], tensors[f"{name}.scatter"])
        return RealSplit(described["count"], tuple(described["class_counts"]), moments)

    return Real(stored, record["files"], stream, split("train"), split("test"), evaluator.encoder.width, thumbnail)


def _batches(dataset: Dataset, config: Config, split: str, positions: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
    """Yield a batch for each of these lists of positions in a split's shard order."""
    data = config.data
    with opened_split(dataset, split, Storage.of(config), data.cache_dir, data.cache_gib) as reader:
        for some in positions:
            yield reader.at(some)


def _compute(
    dataset: Dataset,
    quarantine: Quarantine | None,
    config: Config,
    evaluator: Evaluator,
    stored: Derived,
    progress: Progress,
) -> dict[str, Any]:
    """Encode every real image in Ray tasks, store what a later evaluation needs, and return the record of it."""
    needs = {"CPU": 1, "GPU": int(config.cluster.gpus_per_worker > 0)}
    counts = {split: sum(shard.samples for shard in kept_shards(dataset, split, quarantine)) for split in SPLITS}
    total, done = sum(counts.values()), 0
    shared = ray.put(evaluator)
    task = ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"])(_encode_part)
    splits: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    for split in SPLITS:
        spans = [(first, min(first + PART, counts[split])) for first in range(0, counts[split], PART)]
        calls = (task.remote(dataset, config, split, span, shared, stored) for span in spans)
        found: dict[int, _Part] = {}
        for place, part in finished(calls, needs, "encode real images", at_once=IN_FLIGHT):
            found[place] = part
            done += spans[place][1] - spans[place][0]
            progress(done, total)
        parts = [found[i] for i in range(len(spans))]  # always in this order, whatever finished first
        files |= {_part_name(split, first): part.digest for (first, _), part in zip(spans, parts, strict=True)}
        moments = reduce(lambda a, b: a + b, [part.moments for part in parts if part.moments is not None])
        tensors |= {f"{split}.mean": moments.mean, f"{split}.scatter": moments.scatter}
        classes = np.sum([part.class_counts for part in parts], axis=0).tolist()
        splits[split] = {"count": counts[split], "reference": moments.count, "class_counts": classes}
    files |= {
        layout.REAL_HELD_OUT: stored.write(layout.REAL_HELD_OUT, _held_out(dataset, config, counts["test"])),
        layout.REAL_MOMENTS: stored.write(layout.REAL_MOMENTS, save(tensors)),
    }
    return {
        "format": FORMAT,
        "stream_digest": stream_digest(dataset, quarantine),
        "evaluator": evaluator.record(),
        "splits": splits,
        "files": files,
    }


@dataclass(frozen=True)
class _Part:
    """The result of a task that encodes images.

    Attributes:
        moments: None where none of them is a reference.
        digest: SHA-256 of the file of their rows.
    """

    moments: FeatureMoments | None
    class_counts: tuple[int, ...]
    digest: str


def _encode_part(
    dataset: Dataset, config: Config, split: str, span: tuple[int, int], evaluator: Evaluator, stored: Derived
) -> _Part:
    """Encode the images at the positions [start, stop) of a split, and store their rows."""
    torch.set_num_threads(1)
    encode = evaluator.encoder.to(task_device())
    share = evaluator.share if split == "train" else None
    quarantine = read_quarantine(dataset.uri, stored.storage)
    positions = np.arange(*span)
    batches = [positions[i : i + ENCODE_BATCH] for i in range(0, len(positions), ENCODE_BATCH)]
    rows: list[dict[str, NDArray[Any]]] = []
    for batch in _batches(dataset, config, split, batches):
        levels = to_levels(batch.images)
        rows.append(
            {
                "features": encode(levels).features.numpy(),
                "labels": np.full(len(levels), -1) if batch.labels is None else batch.labels.numpy(),
                "reference": reference_mask(share, dataset, quarantine, batch.ordinals).numpy(),
                "pixels": thumbnails(levels),
            }
        )
    part = {name: np.concatenate([each[name] for each in rows]) for name in rows[0]}
    digest = stored.write(_part_name(split, span[0]), numpy_save(part))
    classes = len(dataset.classes)
    chosen = part["features"][part["reference"]]
    return _Part(
        FeatureMoments.of(torch.from_numpy(chosen)) if len(chosen) else None,
        tuple(np.bincount(part["labels"], minlength=classes).tolist()) if classes else (),
        digest,
    )


def _held_out(dataset: Dataset, config: Config, count: int) -> bytes:
    """Return test images for likelihoods, spread evenly over the split, as they are stored."""
    (batch,) = _batches(dataset, config, "test", [held_out_positions(count)])
    part = {"images": to_levels(batch.images).numpy()}
    return numpy_save(part if batch.labels is None else part | {"labels": batch.labels.numpy()})


def held_out_positions(count: int) -> NDArray[np.int64]:
    """Return the positions of the images that `Real.held_out` gives, of a test split of so many."""
    return spread_positions(count, HELD_OUT)


def _part_name(split: str, first: int) -> str:
    return f"{split}-{first:09d}.safetensors"
