"""Score a model: draw as many samples as the real test split has, with its labels, and compare features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.generate import Sampling, to_uint8
from ddpm.model import Model
from ddpm.quality import FeatureMoments, frechet_distance
from pipelines.display import Progress, no_progress
from pipelines.evaluation.devices import task_device
from pipelines.evaluation.evaluators import Evaluator, to_levels
from pipelines.evaluation.tasks import finished
from pipelines.shards.cache import ShardCache
from pipelines.shards.fetch import ShardFetcher
from pipelines.shards.index import Dataset
from pipelines.shards.quarantine import read_quarantine
from pipelines.shards.read import Batch, ShardReader, default_cache_dir, read_split
from pipelines.storage import Storage


@dataclass(frozen=True)
class Scores:
    """The quality of a model's samples; comparable only with scores of the same evaluator, dataset, n and seed.

    Attributes:
        frechet_distance: distance of the samples' features to those of the real train split; lower is better.
        floor: the same distance of the real test split, which n perfect samples would have.
        ceiling: the same distance of noise.
        class_accuracy: share of samples, 0..1, that the evaluator assigns to the requested class; None without classes.
        real_accuracy: the evaluator's accuracy on the real test split, 0..1; None without classes.
        n: number of samples, equal to that of the test split.
        seed: seed of the samples' noise.
        evaluator_digest: SHA-256 of the evaluator's weights.
        dataset_digest: digest of the dataset.
        sampling: the settings with which the samples were drawn.
    """

    frechet_distance: float
    floor: float
    ceiling: float
    class_accuracy: float | None
    real_accuracy: float | None
    n: int
    seed: int
    evaluator_digest: str
    dataset_digest: str
    sampling: dict[str, Any]

    def lines(self) -> list[tuple[str, str]]:
        """Return the scores in words, as lines of (name, text)."""
        lines = []
        if self.class_accuracy is not None:
            text = f"{self.class_accuracy:.4f} of {self.n} samples (real test: {self.real_accuracy:.4f})"
            lines.append(("accuracy", text))
        ratio = self.frechet_distance / self.floor
        text = (
            f"Frechet {self.frechet_distance:.2f} = {ratio:.2f} times the floor {self.floor:.2f} of real test images "
            f"(noise: {self.ceiling:.0f})"
        )
        return [*lines, ("distance", text)]

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Scores:
        """Read what `asdict` gave, by this or an earlier release."""
        known = {f.name: plain[f.name] for f in fields(cls)}
        return cls(**{**known, "sampling": Sampling.from_json(plain["sampling"]).to_json()})

    def metrics(self) -> dict[str, float]:
        """Return the scores as MLflow metrics by name."""
        values = {
            "eval/frechet_distance": self.frechet_distance,
            "eval/frechet_floor": self.floor,
            "eval/frechet_ceiling": self.ceiling,
            "eval/frechet_over_floor": self.frechet_distance / self.floor,
        }
        return values if self.class_accuracy is None else values | {"eval/class_accuracy": self.class_accuracy}


@dataclass(frozen=True)
class Evaluation:
    """Scores, the samples that they belong to (uint8 [N, H, W, C]), and the samples' labels ([N])."""

    scores: Scores
    samples: NDArray[np.uint8]
    labels: NDArray[np.int64]


def open_splits(dataset: Dataset, storage: Storage, cache_dir: str | None, cache_gib: float) -> dict[str, Batch]:
    """Return all real samples of a dataset by split, read through the node's shard cache."""
    cache = ShardCache(Path(cache_dir) if cache_dir else default_cache_dir(), int(cache_gib * 2**30))
    quarantine = read_quarantine(dataset.uri, storage)

    def read(split: str) -> Batch:
        fetcher = ShardFetcher(dataset.uri, storage, cache)
        try:
            return read_split(ShardReader(dataset, split, fetcher, quarantine))
        finally:
            fetcher.close()

    return {split: read(split) for split in ("train", "test")}


def evaluate(
    model: Model,
    settings: Sampling,
    dataset: Dataset,
    splits: dict[str, Batch],
    evaluator: Evaluator,
    *,
    seed: int,
    batch_size: int,
    use_gpu: bool = False,
    progress: Progress = no_progress,
) -> Evaluation:
    """Draw samples on the Ray cluster, as many as the test split has and with its labels, and score them.

    Args:
        splits: the reference, see `reference_part`, as "train", and the test split.
        seed: of the noise.
        batch_size: images of one Ray task.
        use_gpu: whether a task gets a GPU.
        progress: called with the images drawn so far and their total number.
    """
    test = splits["test"]
    n = len(test.images)
    labels = test.labels if model.spec.classes else None
    samples = sample_on_ray(
        model, settings, labels=labels, count=n, seed=seed, batch_size=batch_size, use_gpu=use_gpu, progress=progress
    )
    reference = FeatureMoments.of(evaluator.encoder(to_levels(splits["train"].images)).features)

    def distance(images: Tensor) -> float:
        return frechet_distance(reference, FeatureMoments.of(evaluator.encoder(to_levels(images)).features))

    noise = torch.randn(test.images.shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
    accuracy = None
    probabilities = evaluator.encoder(to_levels(samples)).probabilities
    if labels is not None and evaluator.labels and probabilities is not None:
        accuracy = (probabilities.argmax(1) == labels).double().mean().item()
    scores = Scores(
        frechet_distance=distance(samples),
        floor=distance(test.images),
        ceiling=distance(noise),
        class_accuracy=accuracy,
        real_accuracy=evaluator.accuracy,
        n=n,
        seed=seed,
        evaluator_digest=evaluator.digest,
        dataset_digest=dataset.digest,
        sampling=settings.to_json(),
    )
    return Evaluation(scores, to_uint8(samples).numpy(), (torch.zeros(n) if labels is None else labels).long().numpy())


def sample_on_ray(
    model: Model,
    settings: Sampling,
    *,
    labels: Tensor | None,
    count: int,
    seed: int,
    batch_size: int,
    use_gpu: bool,
    progress: Progress,
) -> Tensor:
    """Draw images in Ray tasks of `batch_size`, on which the images do not depend.

    Returns:
        Images [count, C, H, W] in [-1, 1], rounded to the 256 levels of a picture, which is what a user of the model
        receives.
    """
    shared = ray.put(model.to("cpu"))
    task = _sample_chunk.options(num_cpus=1, num_gpus=1 if use_gpu else 0)
    pending = []
    for image_ids in torch.arange(count).split(batch_size):
        chunk_labels = None if labels is None else labels[image_ids]
        pending.append(task.remote(shared, settings, chunk_labels, image_ids, seed))
    parts: dict[int, Tensor] = {}
    for place, drawn in finished(pending, {"CPU": 1, "GPU": int(use_gpu)}, "draw samples"):
        parts[place] = torch.from_numpy(drawn.copy())
        progress(sum(len(part) for part in parts.values()), count)
    pixels = torch.cat([parts[place] for place in sorted(parts)])
    return (pixels.permute(0, 3, 1, 2).float() / 127.5) - 1


@ray.remote
def _sample_chunk(
    model: Model,
    settings: Sampling,
    labels: Tensor | None,
    image_ids: Tensor,
    seed: int,
) -> NDArray[np.uint8]:
    """Draw the images of these numbers (int64 [N]); uint8 [N, H, W, C]."""
    torch.set_num_threads(1)
    device = task_device()
    model = model.to(device)
    on_device = None if labels is None else labels.to(device)
    images = model.generate(
        on_device, sampling=settings, seed=seed, image_ids=image_ids.to(device), batch_size=len(image_ids)
    )
    return to_uint8(images).cpu().numpy()
