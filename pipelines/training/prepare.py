"""Everything that is checked, and opened, before a training starts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ddpm import first_weights
from ddpm.image_size import as_setting
from pipelines import checkpoints
from pipelines.checkpoints import newest_checkpoint, references
from pipelines.config import Config, ConfigError
from pipelines.presentation.progress import Notice, no_notice
from pipelines.shards.captions import caption_width
from pipelines.shards.index import Dataset, DatasetError
from pipelines.shards.ingest.report import recorded_encoder
from pipelines.shards.joined import TRAIN, parts_of, read_data
from pipelines.shards.text import is_path, local_encoder
from pipelines.storage import Storage
from pipelines.storage.retry import PATIENCE_S
from pipelines.tracking import FIRST_ANSWER_S
from pipelines.training.goodput import Goodput
from pipelines.training.loop.context import Job
from pipelines.training.resources import connect_ray, require_memory, require_resources
from pipelines.training.run_id import find_training_run, open_training_run

_INITIAL = ("first_weights", "init_from", "init_from_digest", "init_from_origins")
"""What the lineage of a model says of the weights that its training began with."""


@dataclass(frozen=True)
class PreparedRun:
    """A run whose configuration, data, checkpoints and cluster have been checked, and whose training has not started.

    Attributes:
        job: what the workers need.
        resumes_at: images seen by the newest checkpoint; 0 for a new run.
        length: images after which the run ends, as far as is known.
        began: when its driver turned to the cluster, in seconds since the epoch; the goodput counts from there.
    """

    job: Job
    resumes_at: int
    length: int
    began: float = field(default_factory=time.time)

    @property
    def complete(self) -> bool:
        """Whether the run has seen all its images already."""
        return self.resumes_at >= self.length

    def progress(self, goodput: Goodput | None) -> tuple[int, int]:
        """Return (images seen, images after which the run ends), by what is recorded of the training since."""
        seen = 0 if goodput is None else goodput.images_seen
        return max(self.resumes_at, seen), (goodput and goodput.length) or self.length


def prepare_run(
    config: Config, lineage: dict[str, Any], tags: Mapping[str, str] | None = None, notice: Notice = no_notice
) -> PreparedRun:
    """Check storage, dataset, earlier checkpoints of this name and the cluster, and open the MLflow run.

    What the cluster cannot hold is refused before there is an MLflow run, which would seem to be running for ever.

    Args:
        tags: of a trial of a study, whose MLflow server has answered before; for a new MLflow run.
        notice: called with lines for the user, such as what the cluster lacks while it is waited for.

    Raises:
        ConfigError, StorageError, DatasetError, ModelError, TrackingError, TrainingError: what is wrong, before
            anything starts.
    """
    storage = Storage.of(config)
    if config.guidance.kind != "classifier_free":
        raise ConfigError(
            f"guidance.kind = {config.guidance.kind}: a training draws its grids by itself; leave it at "
            "classifier_free, and choose guidance by another network in `ddpm evaluate` or `ddpm search guidance`"
        )
    storage.require(config.storage.root)
    dataset, quarantine = read_data(config.data, storage)
    check_dataset(dataset, config)
    check_captions(dataset, config)
    check_labels(dataset, config)
    state = newest_checkpoint(config)
    if state is not None:
        checkpoints.check_resumable(state, config, dataset, quarantine)
    initial = initial_lineage(config, new=state is None)
    # A driver is often restarted together with MLflow, or while it is away.
    patience_s = FIRST_ANSWER_S if state is None and tags is None else PATIENCE_S
    resumes_at, length = (0, config.images) if state is None else (state.images_seen, state.ends_at(config))
    began = time.time()
    if resumes_at < length:
        find_training_run(config, patience_s)  # what is wrong with it is told before the wait for a cluster
        connect_ray(config)
        require_resources(config, notice)
        require_memory(config, notice)
    tracker = open_training_run(config, tags, patience_s)
    origin = {**lineage, **initial, **encoder_lineage(config), "run_id": tracker.run_id}
    return PreparedRun(Job(config, dataset, tracker, origin, quarantine), resumes_at, length, began)


def initial_lineage(config: Config, *, new: bool) -> dict[str, Any]:
    """Return the weights that a run starts from.

    Args:
        new: whether the run has no checkpoint yet; otherwise what its newest one has recorded stays.

    Returns:
        `first_weights`, the version of the new weights (`ddpm.first_weights`), which runs of earlier releases lack; or
        `init_from` and `init_from_digest`, the SHA-256 of the weights that it named when the run began, and
        `init_from_origins`, the checkpoint that they were and those that its training began from, where it says so.

    Raises:
        ModelError: there is no such model, or it does not fit the configuration.
    """
    if not new:
        stored = checkpoints.newest_lineage(config)
        return {key: stored[key] for key in _INITIAL if key in stored}
    if config.init_from is None:
        return {"first_weights": first_weights.VERSION}
    found = references.initial_model(config, config.tracking.uri)
    origins = {"init_from_origins": " ".join(found.origins)} if found.origins else {}
    return {"init_from": config.init_from, "init_from_digest": found.digest, **origins}


def encoder_lineage(config: Config) -> dict[str, Any]:
    """Return which encoder has embedded the captions of a run on text; nothing for other runs.

    It is the one that the report of the dataset's ingest names, where it is a hub name or a folder that is here, else
    that of the configuration: the same encoder in another place.

    Returns:
        `text_encoder`, by which the model can be given prompts, and `text_encoder_digest` of its weights, by which
        another one is told from it, where that is known.
    """
    if config.model.text_dim == 0:
        return {}
    recorded = recorded_encoder(config.data.uri, Storage.of(config))
    there = recorded.name is not None and (local_encoder(recorded.name) is not None or not is_path(recorded.name))
    name = recorded.name if there else config.data.text_encoder or recorded.name
    return {"text_encoder": name, **({"text_encoder_digest": recorded.digest} if recorded.digest else {})}


def check_captions(dataset: Dataset, config: Config) -> None:
    """Refuse data on whose captions the network of the configuration cannot be conditioned.

    Raises:
        DatasetError: they have no embeddings, or those of two sources of a mixture were made by different encoders.
        ConfigError: the embeddings are of another width than the network's.
    """
    storage = Storage.of(config)
    width = config.model.text_dim
    for part, split in [*((part, TRAIN) for part in parts_of(dataset)), (dataset, "test")]:
        if not width or split not in part.splits:
            continue
        found = caption_width(part, split, storage)
        if found is None:
            raise DatasetError(
                f"{part.uri} has no embeddings of captions (emb.npy) in its split {split!r}, and model.text_dim = "
                f"{width} asks for them: ingest it with data.text_encoder from a source with captions, or set "
                "model.text_dim=0"
            )
        if found != width:
            raise ConfigError(
                f"model.text_dim = {width}, and the embeddings of the captions of {part.uri} have {found} numbers: "
                f"set model.text_dim={found}"
            )
    if width:
        _check_encoders(dataset, storage)


def _check_encoders(dataset: Dataset, storage: Storage) -> None:
    """Refuse a mixture whose captions were embedded by different encoders, as far as is known.

    Raises:
        DatasetError: names two of its sources.
    """
    known = [(source, recorded_encoder(source.uri, storage)) for source in dataset.sources]
    known = [(source, encoder) for source, encoder in known if encoder.digest]
    for source, encoder in known[1:]:
        first, other = known[0]
        if encoder.digest != other.digest:
            raise DatasetError(
                f"data.sources: the captions of '{first.name}' ({first.uri}) were embedded by {other.name}, and those "
                f"of '{source.name}' ({source.uri}) by {encoder.name}: ingest one of them again with the other's "
                "data.text_encoder"
            )


def check_labels(dataset: Dataset, config: Config) -> None:
    """Refuse a source without labels for a classifier of classes, which would learn nothing from it.

    Raises:
        DatasetError: names the source.
    """
    plain = [source for source in dataset.sources if not source.labels]
    if plain and config.task == "classifier" and not config.model.text_dim:
        raise DatasetError(
            f"data.sources: source '{plain[0].name}' ({plain[0].uri}) has no labels, and task = classifier learns "
            "them: leave it out"
        )


def check_dataset(dataset: Dataset, config: Config) -> None:
    """Refuse a dataset that does not fit the configuration.

    Raises:
        DatasetError: names each field that differs.
    """
    data = config.data
    pairs: dict[str, tuple[object, object]] = {
        "image_size": (as_setting(dataset.image_size), as_setting(data.image_size)),
        "channels": (dataset.channels, data.channels),
    }
    if dataset.sources or not data.sources:  # classes are those of all sources, not of the dataset that judges
        pairs["num_classes"] = len(dataset.classes), data.num_classes
    wrong = [
        f"data.{key} is {configured} in the config, {found} in {'all sources' if dataset.sources else 'the dataset'}"
        for key, (found, configured) in pairs.items()
        if found != configured
    ]
    if wrong:
        raise DatasetError(f"{dataset.uri} does not fit the configuration: {'; '.join(wrong)}")
