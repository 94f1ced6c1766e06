"""Networks that judge images, each with a record of which one it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import ray

from pipelines.config import Config
from pipelines.environment.scratch import temporary_folder
from pipelines.evaluation.evaluators.base import Encoded, Evaluator, FeatureEncoder
from pipelines.evaluation.evaluators.encoder import check_encoder, open_encoder
from pipelines.evaluation.evaluators.inception import check_inception, open_inception
from pipelines.evaluation.evaluators.share import TrainShare, reference_mask, reference_part
from pipelines.evaluation.evaluators.stored import find, store
from pipelines.evaluation.evaluators.train import Trainable, Training, train_on_ray
from pipelines.presentation.errors import ConfigError
from pipelines.presentation.progress import Notice, no_notice
from pipelines.shards.index import Dataset
from pipelines.signing import check_signing
from pipelines.storage import Storage

__all__ = [
    "Encoded",
    "Evaluator",
    "FeatureEncoder",
    "TrainShare",
    "check_evaluator",
    "evaluator_kind",
    "find_evaluator",
    "open_evaluator",
    "open_matcher",
    "reference_mask",
    "reference_part",
]


def evaluator_kind(config: Config, dataset: Dataset) -> Literal["classifier", "contrastive", "inception", "encoder"]:
    """Return the kind of evaluator that judges samples of a dataset: the configured one, by default by its labels."""
    if config.evaluation.evaluator != "auto":
        return config.evaluation.evaluator
    return "classifier" if dataset.classes else "contrastive"


def check_evaluator(config: Config, dataset: Dataset) -> None:
    """Check, before anything starts, that samples of a model of this dataset can be judged.

    Raises:
        ConfigError: they cannot be; says why and what to do.
    """
    kind, weights = evaluator_kind(config, dataset), config.evaluation.weights
    if config.task == "classifier":
        raise ConfigError(
            "task=classifier trains a network that draws no samples, so there is nothing to evaluate: "
            "use `ddpm train`, and name its run as guidance.classifier where a model is evaluated"
        )
    if "test" not in dataset.splits or dataset.samples("test") < 2:
        raise ConfigError(
            f"{dataset.uri} has no split 'test' of two images or more, with which samples are compared: ingest it "
            "with data.test_fraction, or give the source a folder test/"
        )
    if kind == "classifier" and not dataset.classes:
        raise ConfigError(
            f"evaluation.evaluator=classifier is trained on classes, and {dataset.uri} has none: "
            "use evaluation.evaluator=contrastive, which needs no labels"
        )
    if weights is not None and kind in ("classifier", "contrastive"):
        raise ConfigError(
            f"evaluation.weights = {weights} has no use for the evaluator '{kind}', which is trained on the dataset: "
            "choose evaluation.evaluator=inception or encoder"
        )
    if weights is not None and "://" not in weights and not Path(weights).expanduser().exists():
        raise ConfigError(f"evaluation.weights = {weights}: there is no such file or folder on this machine")
    if kind == "inception":
        check_inception(weights)
    if kind == "encoder":
        check_encoder(config.evaluation, dataset)


def open_evaluator(
    config: Config,
    dataset: Dataset,
    notice: Notice = no_notice,
    *,
    connect: Callable[[], object] = lambda: None,
) -> Evaluator:
    """Return the evaluator of a dataset; one that is trained on it is stored beside it, and trained where none is yet.

    It is trained in a Ray task where this process is connected to a cluster, else in this process.

    Args:
        config: names the evaluator, who signs one that is trained, and whose are believed.
        dataset: whose images are judged.
        notice: called before an evaluator is trained.
        connect: called before an evaluator is trained, for a process that is not connected to Ray yet.

    Raises:
        ConfigError: there is none for this dataset; `check_evaluator` says so earlier.
        DatasetError: the stored one was signed by nobody who is believed, or its weights are not what its record names.
        TaskError: no node of the Ray cluster can hold the training.
    """
    found = find_evaluator(config, dataset)
    if found is not None:
        return found
    kind = evaluator_kind(config, dataset)
    assert kind == "classifier" or kind == "contrastive", f"an evaluator '{kind}' is opened from files, not trained"
    return _train(kind, config, dataset, notice, connect)


def find_evaluator(config: Config, dataset: Dataset) -> Evaluator | None:
    """Return the evaluator of a dataset; None where it is one that is trained on the dataset, and was not yet.

    Raises:
        ConfigError, DatasetError: as `open_evaluator`.
    """
    check_evaluator(config, dataset)
    kind = evaluator_kind(config, dataset)
    if kind == "classifier" or kind == "contrastive":
        return find(kind, dataset, config)
    with _local(config.evaluation.weights, Storage.of(config)) as path:
        return open_inception(path) if kind == "inception" else open_encoder(path, config.evaluation, dataset)


def open_matcher(
    config: Config,
    dataset: Dataset,
    notice: Notice = no_notice,
    *,
    connect: Callable[[], object] = lambda: None,
) -> Evaluator:
    """Return the matcher of images and captions of a dataset with embeddings; arguments and errors as `open_evaluator`.

    Its encoder is a `Matcher`, and its accuracy the share of real test images whose own caption matches best.
    """
    found = find("captions", dataset, config)
    return _train("captions", config, dataset, notice, connect) if found is None else found


def _train(
    kind: Trainable,
    config: Config,
    dataset: Dataset,
    notice: Notice,
    connect: Callable[[], object],
) -> Evaluator:
    """Train an evaluator on the dataset, and store it beside it."""
    connect()
    check_signing(config.registry)
    notice(f"training the evaluator ({kind}) on real images, once for this dataset")
    training = Training(kind, dataset, config)
    use_gpu = config.cluster.gpus_per_worker > 0
    trained = train_on_ray(training, use_gpu=use_gpu) if ray.is_initialized() else training()
    return store(kind, trained, dataset, config)


@contextmanager
def _local(weights: str | None, storage: Storage) -> Iterator[Path]:
    """Give the path of a file or folder on this machine, to which what lies at an address is copied."""
    assert weights is not None
    if "://" not in weights:
        yield Path(weights).expanduser()
        return
    with temporary_folder("weights") as scratch:
        path = scratch / weights.rstrip("/").rsplit("/", 1)[-1]
        if storage.exists(weights):
            storage.download(weights, path)
        else:
            storage.download_folder(weights, path)
        yield path
