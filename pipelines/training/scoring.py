"""Scoring a published checkpoint on the Ray cluster, beside the training that has published it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import ray
import torch
from ray.exceptions import RayTaskError

from pipelines import checkpoints
from pipelines.checkpoints import Published, references
from pipelines.config import Config
from pipelines.evaluation import scoring as evaluation
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.recorded import Scored
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Silent
from pipelines.storage import Storage
from pipelines.tracking import Tracker

_LOOK_EVERY_S = 1.0


class CancelledError(PipelineError):
    """An evaluation that is not needed any more: the training was stopped, or is another driver's."""


Evaluate = Callable[[Published, threading.Event], Scored]
"""Scores a published checkpoint; raises `CancelledError` soon after the event is set."""


def needs(config: Config) -> dict[str, float]:
    """Return the resources that an evaluation reserves on one node, by Ray's names."""
    return {"CPU": 1.0, **({"GPU": 1.0} if config.cluster.gpus_per_worker else {})}


def score_on_ray(config: Config, tracker: Tracker) -> Evaluate:
    """Return the function that scores checkpoints of a run in a Ray task, away from the driver and its workers.

    What judges them is opened by the driver, which has the key with which it was signed.
    """

    def evaluate(published: Published, cancelled: threading.Event) -> Scored:
        task = _score.remote(tracker, published, evaluation_data(published, config))
        while True:
            done, _ = ray.wait([task], timeout=_LOOK_EVERY_S)
            if done:
                try:
                    result: Scored = ray.get(task)
                except RayTaskError as error:
                    raise error.cause from error
                return result
            if cancelled.is_set():
                ray.cancel(task, force=True)
                raise CancelledError(f"the evaluation at {published.images_seen:,} images was stopped")

    return evaluate


def evaluation_data(published: Published, config: Config) -> EvaluationData:
    """Return the opened evaluators and reference data for a published checkpoint."""
    # One at a time: more would take the cores of workers that start again.
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"actors": 1})})
    spec = checkpoints.published_spec(published, Storage.of(config))
    return EvaluationData.of(spec.lineage.get("dataset_uri", config.data.uri), config).opened(spec)


# While the task waits for the tasks in which it draws, Ray gives its core to them.
@ray.remote(num_cpus=1, max_retries=2)
def _score(tracker: Tracker, published: Published, data: EvaluationData) -> Scored:
    torch.set_num_threads(1)
    return score(tracker, published, data)


def score(tracker: Tracker, published: Published, data: EvaluationData) -> Scored:
    """Score a published checkpoint with the sampling settings in it; nothing is signed.

    Args:
        data: what judges it, opened.
    """
    reference = f"runs:/{tracker.run_id}/{published.images_seen}"
    resolved = references.resolve(reference, tracking_uri=tracker.uri, storage=data.storage)
    return evaluation.score(resolved, resolved.model.spec.sampling, data, Silent(), None)
