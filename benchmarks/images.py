"""Real images of a dataset in memory, the dataset's evaluator, and training on them by the steps of `ddpm train`.

There is no Ray, S3 or MLflow in it: what is measured with it is what the training makes of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.results import Size
from ddpm.prediction import Denoiser, NetworkDenoiser
from ddpm.quality import FeatureMoments
from pipelines.config import Config, compose, noise_schedule
from pipelines.evaluation.evaluators import Evaluator, open_evaluator, reference_part
from pipelines.evaluation.images import to_levels
from pipelines.shards.index import Dataset
from pipelines.shards.ingest.write import ingest
from pipelines.shards.read import Batch, opened_split, read_split
from pipelines.storage import Storage
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.speed import made_up_job
from pipelines.training.loop.state import load_weights, make_network, make_state
from pipelines.training.loop.train import step


@dataclass(frozen=True)
class RealImages:
    """All images of a dataset by split, the evaluator of samples, and the moments of what they are compared with."""

    train: Batch
    test: Batch
    evaluator: Evaluator
    reference: FeatureMoments


@dataclass(frozen=True)
class Labelled:
    """Real images in [-1, 1] [N, C, S, S] with labels, the evaluator of samples, and the reference's moments."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    evaluator: Evaluator
    reference: FeatureMoments


SMALLEST = ("model.channels=[32]", "model.attention=[true]", "model.layers_per_block=1", "model.head_dim=32")
"""The network of `--smoke`."""


def evaluator_of(size: Size) -> list[str]:
    """Return the settings of the evaluator of a benchmark of some size, where they are not the experiment's own."""
    return size.of([], [], ["evaluation.evaluator_passes=1"])


def load_labelled(work: Path, source: str, settings: Sequence[str]) -> Labelled:
    """Return the labelled images of a source, ingested into `work`.

    Args:
        source: as `ddpm ingest` takes it: a name, or a folder of class folders.
        settings: overrides with the image size, the channels and the evaluator.
    """
    storage = Storage()
    uri = f"file://{work.resolve()}/data"
    places = [f"storage.root=file://{work.resolve()}", f"data.cache_dir={work.resolve()}/cache", "data.cache_gib=1"]
    config = compose([*settings, "storage=file", f"data.uri={uri}", *places])
    dataset = ingest(source, uri, storage, image_size=config.data.image_size, channels=config.data.channels).dataset
    real = load_images(config, dataset, storage)
    train, test = real.train, real.test
    assert train.labels is not None
    assert test.labels is not None
    return Labelled(train.images, train.labels, test.images, test.labels, real.evaluator, real.reference)


def load_images(config: Config, dataset: Dataset, storage: Storage) -> RealImages:
    """Return the images of a dataset; its evaluator is trained where there is none yet."""
    splits = {}
    for split in ("train", "test"):
        with opened_split(dataset, split, storage, config.data.cache_dir, config.data.cache_gib) as reader:
            splits[split] = read_split(reader)
    evaluator = open_evaluator(config, dataset)
    unseen = reference_part(evaluator.share, dataset, storage, splits["train"])
    reference = FeatureMoments.of(evaluator.encoder(to_levels(unseen.images)).features)
    return RealImages(splits["train"], splits["test"], evaluator, reference)


def trained(
    config: Config,
    images: Batch,
    start: dict[str, Tensor] | None = None,
    *,
    teacher: Denoiser | None = None,
    device: torch.device | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Tensor]:
    """Return the averaged weights of a training on images in an order of its own for every pass, by `config.seed`.

    Args:
        start: weights to start from; None for new ones.
        teacher: whose trajectories a consistency model learns; None for those of the data.
        device: where it computes; None: on the CPU.
        say: called with the loss of every 50th step.
    """
    context = RunContext.of(made_up_job(config), rank=0, world_size=1, device=device or torch.device("cpu"))
    context = replace(context, teacher=teacher)
    state = make_state(context.config, context.device, context.precision)
    if start is not None:
        load_weights(state, start, context.device)
    order, epoch, size = torch.empty(0, dtype=torch.long), 0, config.batch_size
    for seen in range(0, config.images, size):
        while len(order) < size:
            generator = torch.Generator().manual_seed(config.seed + epoch)
            order, epoch = torch.cat([order, torch.randperm(len(images), generator=generator)]), epoch + 1
        index, order = order[:size], order[size:]
        result = step(context, state, replace(images[index], ordinals=torch.arange(seen, seen + size)))
        if seen // size % 50 == 0:
            say(f"{seen:,} of {config.images:,} images, loss {result.loss:.4f}")
    return {key: value.cpu().clone() for key, value in state.ema.shadow.items()}


def denoiser_of(config: Config, weights: Mapping[str, Tensor], device: torch.device | None = None) -> NetworkDenoiser:
    """Return the denoiser of trained weights, which learns no more.

    Args:
        device: where it computes; None: on the CPU.
    """
    network = make_network(config)
    network.load_state_dict(weights)
    network = network.to(device or torch.device("cpu")).eval().requires_grad_(False)
    return NetworkDenoiser(network, noise_schedule(config), config.objective.prediction)
