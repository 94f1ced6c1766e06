"""Training an evaluator on its share of a dataset, which is read from the stream: one Ray task, or in this process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import ray
import torch
from safetensors.torch import save
from torch import Tensor

from ddpm.image_size import ImageSize
from pipelines.config import Config
from pipelines.evaluation.devices import one_thread, task_device
from pipelines.evaluation.evaluators.base import FeatureEncoder
from pipelines.evaluation.evaluators.classifier import Classifier, reduced, reduced_size, train_classifier
from pipelines.evaluation.evaluators.contrastive import Contrastive, train_contrastive
from pipelines.evaluation.evaluators.matcher import Matcher, matched, train_matcher
from pipelines.evaluation.evaluators.share import TrainShare, default_share, split_positions
from pipelines.evaluation.images import to_levels
from pipelines.remote.tasks import finished
from pipelines.shards.captions import Captions, read_captions
from pipelines.shards.index import Dataset
from pipelines.shards.read import Batch, ShardReader, opened_split, split_batches, spread_positions
from pipelines.storage import Storage

Trainable = Literal["classifier", "contrastive", "captions"]
"""The last one is the `Matcher`, which judges prompts beside one of the others."""
SEED = 0
MAX_CAPTIONS = 1_000
"""Captions, at most, that samples are drawn from."""
READ = 1024
READ_BYTES = 64 << 20
"""Largest number of images that are read at a time, and of bytes that they may take."""


@dataclass(frozen=True)
class Trained:
    """An evaluator network after its training.

    Attributes:
        weights: as a safetensors file.
        share: of the train split, on which it was trained.
        accuracy: of a classifier on the real test split, 0..1; of a matcher, the share of real test images whose own
            caption matches best, None where all have the same.
        text_dim: width of the embeddings that a matcher takes.
    """

    weights: bytes
    share: TrainShare
    accuracy: float | None
    text_dim: int = 0


@dataclass(frozen=True)
class Training:
    """The training of an evaluator; picklable, for a Ray task.

    Attributes:
        kind: of the evaluator.
        dataset: on whose train split.
        config: names storage and the shard cache, and says how many passes over the images there are.
    """

    kind: Trainable
    dataset: Dataset
    config: Config

    def __call__(self) -> Trained:
        """Read the share, train, and measure the accuracy, on the device that Ray has assigned and one thread."""
        share, device = default_share(self.dataset), task_device()
        with one_thread():
            with self._reader("train") as reader:
                shared = read_share(reader, share)
            images, labels = shared.images, shared.labels
            options: dict[str, Any] = {"seed": SEED, "device": device}
            if (passes := self.config.evaluation.evaluator_passes) is not None:
                options["passes"] = passes
            if self.kind == "contrastive":
                return Trained(_saved(train_contrastive(images, **options)), share, None)
            if self.kind == "captions":
                return self._matcher(shared, share, **options)
            assert labels is not None
            network = train_classifier(images, labels, len(self.dataset.classes), **options)
            with self._reader("test") as reader:
                batches = split_batches(reader, at_a_time(self.dataset))
                return Trained(_saved(network), share, accuracy(network.to(device), batches))

    def _matcher(self, shared: SharedImages, share: TrainShare, *, device: torch.device, **options: int) -> Trained:
        """Train the matcher of images and captions."""
        assert shared.pooled is not None
        network = train_matcher(shared.images, shared.pooled, device=device, **options)
        with self._reader("test") as reader:
            found = matched_captions(network.to(device), reader, prompt_captions(reader))
        return Trained(_saved(network.cpu()), share, found, shared.pooled.shape[1])

    def _reader(self, split: str) -> AbstractContextManager[ShardReader]:
        """Open a split of the dataset."""
        data, text = self.config.data, self.kind == "captions"
        return opened_split(self.dataset, split, Storage.of(self.config), data.cache_dir, data.cache_gib, text=text)


def train_on_ray(training: Training, *, use_gpu: bool) -> Trained:
    """Train an evaluator in a Ray task.

    Raises:
        TaskError: no node of the cluster can hold it.
    """
    needs = {"CPU": 1, "GPU": int(use_gpu)}
    task = ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"])(Training.__call__)
    ((_, trained),) = finished([task.remote(training)], needs, "train the evaluator")
    return trained


def untrained(
    kind: Trainable, dataset: Dataset, image_size: ImageSize, text_dim: int = 0
) -> Classifier | Contrastive | Matcher:
    """Return the network of a kind for the images of a dataset, for stored weights to be loaded into.

    Args:
        image_size: height and width, in pixels, at which it looks at them; one number for square images.
        text_dim: width of the embeddings of the captions, for a matcher.
    """
    if kind == "captions":
        return Matcher(dataset.channels, image_size, text_dim)
    if kind == "contrastive":
        return Contrastive(dataset.channels, image_size)
    return Classifier(dataset.channels, image_size, max(len(dataset.classes), 1))


def at_a_time(dataset: Dataset) -> int:
    """Return how many images are read at a time: few where they are large."""
    return max(1, min(READ, READ_BYTES // (4 * math.prod(dataset.shape))))


@dataclass(frozen=True)
class SharedImages:
    """The images of a share, in shard order.

    Attributes:
        images: uint8 [N, C, H, W] of `reduced_size`, to which larger ones are reduced.
        labels: int64 [N]; None for data without labels.
        pooled: embeddings of their captions, float32 [N, D]; None where the reader gives none.
    """

    images: Tensor
    labels: Tensor | None
    pooled: Tensor | None


def read_share(reader: ShardReader, share: TrainShare) -> SharedImages:
    """Read the images of a share, in shard order, and reduce large ones."""
    count, step = sum(shard.samples for shard in reader.shards), at_a_time(reader.dataset)
    images: list[Tensor] = []
    labels: list[Tensor] = []
    pooled: list[Tensor] = []
    for first in range(0, count, step):
        ordinals = torch.arange(first, min(first + step, count))
        chosen = ordinals[share.trained(split_positions(reader.dataset, reader.quarantine, ordinals))].numpy()
        if not len(chosen):
            continue
        batch = reader.at(chosen)
        images.append(reduced(to_levels(batch.images), reduced_size(reader.dataset.image_size)))
        if batch.labels is not None:
            labels.append(batch.labels)
        if batch.pooled is not None:
            pooled.append(batch.pooled)
    return SharedImages(*(torch.cat(parts) if parts else None for parts in (images, labels, pooled)))  # type: ignore[arg-type]


def prompt_captions(reader: ShardReader) -> Captions:
    """Return captions from all over a test split, `MAX_CAPTIONS` at most: those that samples are drawn from."""
    count = sum(shard.samples for shard in reader.shards)
    return read_captions(reader, spread_positions(count, MAX_CAPTIONS))


def matched_captions(network: Matcher, reader: ShardReader, captions: Captions) -> float | None:
    """Return the share of real images whose own caption matches best, 0..1; None where all have the same.

    Args:
        network: on the device to use.
        reader: of the split that the captions are of.
    """
    first, own = captions.different
    if len(first) < 2:
        return None
    step = at_a_time(reader.dataset)
    parts = [captions.positions[i : i + step] for i in range(0, len(captions), step)]
    vectors = torch.cat([network(to_levels(reader.at(part).images)).features for part in parts])
    texts = network.texts(captions.pooled[first].to(next(network.parameters()).device)).cpu()
    return float(matched(vectors, own, texts, SEED).double().mean())


def accuracy(encoder: FeatureEncoder, batches: Iterator[Batch]) -> float:
    """Return the share of labelled images that an encoder with the dataset's classes knows, 0..1."""
    right, count = 0, 0
    for batch in batches:
        found = encoder(to_levels(batch.images)).probabilities
        assert found is not None
        assert batch.labels is not None
        right += int((found.argmax(1) == batch.labels).sum())
        count += len(batch)
    return right / count


def _saved(network: torch.nn.Module) -> bytes:
    """Return weights as a safetensors file."""
    return save(dict(network.state_dict()))
