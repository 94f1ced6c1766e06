"""Scoring a published checkpoint on the Ray cluster, beside the training that has published it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from pipelines import references, tracking
from pipelines.checkpoints import Published
from pipelines.config import Config
from pipelines.display import no_notice
from pipelines.errors import PipelineError
from pipelines.evaluation import evaluate as evaluation
from pipelines.evaluation.evaluate import Scores
from pipelines.evaluation.plots import label_grid
from pipelines.shards.index import read_dataset
from pipelines.storage import Storage
from pipelines.tracking import Tracker

GRID_ROWS = 8
_LOOK_EVERY_S = 1.0


class CancelledError(PipelineError):
    """An evaluation that is not needed any more: the training was stopped, or is another driver's."""


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation, as it is recorded.

    Attributes:
        scores: name -> value, as MLflow metrics.
        lines: the scores in words, as (name, text).
        dataset: (name, digest) of the data that they were measured on.
        record: (text, name) of the artifact that holds all of it.
        grid: samples, uint8 [H, W, C]; None where they were recorded before.
        at_ms: when it was made, in milliseconds since the epoch.
    """

    scores: dict[str, float]
    lines: tuple[tuple[str, str], ...]
    dataset: tuple[str, str]
    record: tuple[str, str]
    grid: NDArray[np.uint8] | None
    at_ms: int


Evaluate = Callable[[Published, threading.Event], Evaluated]
"""Scores a published checkpoint; raises `CancelledError` soon after the event is set."""


def needs(config: Config) -> dict[str, float]:
    """Return what an evaluation reserves on one node, by Ray's names."""
    return {"CPU": 1.0, **({"GPU": 1.0} if config.cluster.gpus_per_worker else {})}


def score_on_ray(config: Config, storage: Storage, tracker: Tracker) -> Evaluate:
    """Return the function that scores checkpoints of a run in a Ray task, away from the driver and its workers."""

    def evaluate(published: Published, cancelled: threading.Event) -> Evaluated:
        task = _score.remote(config, storage, tracker, published)
        while True:
            done, _ = ray.wait([task], timeout=_LOOK_EVERY_S)
            if done:
                try:
                    result: Evaluated = ray.get(task)
                except RayTaskError as error:
                    raise error.cause from error
                return result
            if cancelled.is_set():
                ray.cancel(task, force=True)
                raise CancelledError(f"the evaluation at {published.images_seen:,} images was stopped")

    return evaluate


# While the task waits for the tasks in which it draws, Ray gives its core to them.
@ray.remote(num_cpus=1, max_retries=2)
def _score(config: Config, storage: Storage, tracker: Tracker, published: Published) -> Evaluated:
    torch.set_num_threads(1)
    return score(config, storage, tracker, published)


def score(config: Config, storage: Storage, tracker: Tracker, published: Published) -> Evaluated:
    """Score a published checkpoint with the sampling settings in it, or return the scores that its run has already."""
    reference = f"runs:/{tracker.run_id}/{published.images_seen}"
    model = references.resolve(reference, tracking_uri=tracker.uri, storage=storage).model
    settings = model.spec.sampling
    dataset = read_dataset(model.spec.lineage.get("dataset_uri", config.data.uri), storage)
    splits = evaluation.open_splits(dataset, storage, config.data.cache_dir, config.data.cache_gib)
    evaluator = evaluation.get_evaluator(dataset, splits, storage, no_notice)
    key = [published.digest, evaluator.digest, dataset.digest, config.evaluation.seed, settings.key()]
    name = f"{published.images_seen:012d}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    artifact, grid = f"evaluation/{name}", None
    if artifact in tracker.names("evaluation"):
        scores = Scores.from_plain(json.loads(tracker.read_text(artifact)))
    else:
        done = evaluation.evaluate(
            model,
            settings,
            dataset,
            splits,
            evaluator,
            seed=config.evaluation.seed,
            batch_size=config.evaluation.batch_size,
            use_gpu=config.cluster.gpus_per_worker > 0,
        )
        scores, columns = done.scores, max(len(model.spec.classes), 1)
        of_class = [(done.labels == c).nonzero()[0] for c in range(columns)]
        order = [i for row in range(GRID_ROWS) for found in of_class for i in found[row : row + 1]]
        grid = label_grid(done.samples[order], columns, model.spec.classes)
    return Evaluated(
        scores=scores.metrics(),
        lines=tuple(scores.lines()),
        dataset=(dataset.uri.rsplit("/", 1)[-1], dataset.digest),
        record=(tracking.to_json(asdict(scores)), artifact),
        grid=grid,
        at_ms=int(time.time() * 1000),
    )
