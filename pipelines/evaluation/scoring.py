"""Score the model of a MODEL reference, and record the scores in its MLflow run; what was scored before is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import numpy as np
import ray

from ddpm.generate import Sampling
from ddpm.model import Model
from pipelines import references, tracking
from pipelines.checkpoints import record_scores
from pipelines.config import Config
from pipelines.display import Display
from pipelines.evaluation.evaluate import Evaluation, Request, evaluate
from pipelines.evaluation.evaluators import open_evaluator
from pipelines.evaluation.plots import grid_choice, label_grid
from pipelines.evaluation.real import open_real
from pipelines.evaluation.samples import read_images
from pipelines.evaluation.scores import Scores
from pipelines.references import Resolved
from pipelines.shards.index import read_dataset
from pipelines.shards.quarantine import read_quarantine, stream_digest
from pipelines.storage import Storage, join
from pipelines.tracking import Tracker

FOLDER = "evaluation"
"""Of the scores among the artifacts of a run."""


def score_model(
    resolved: Resolved,
    settings: Sampling,
    config: Config,
    storage: Storage,
    display: Display,
    connect: Callable[[], None],
    dataset_uri: str | None = None,
) -> tuple[Scores, bool]:
    """Score a model, or read the scores that its run has for the same model, settings, data and evaluator.

    Args:
        settings: with which the samples are drawn.
        connect: connects this process to the Ray cluster; called only where something has to be computed.
        dataset_uri: of the data to compare with; by default, those that the model was trained on.

    Returns:
        The scores, and whether they were computed now.

    Raises:
        DatasetError: the data cannot be used to score a model.
    """

    def notice(text: str) -> None:
        display.stage("evaluate", text)

    model, tracker = resolved.model, resolved.tracker
    dataset = read_dataset(dataset_uri or model.spec.lineage.get("dataset_uri", config.data.uri), storage)
    model = references.guided(model, settings, config.tracking.uri, storage)
    evaluator = open_evaluator(config, dataset, storage, notice, connect=connect)
    model_digest = resolved.published.digest if resolved.published else weights_digest(model)
    request = request_of(config, settings)
    stream = stream_digest(dataset, read_quarantine(dataset.uri, storage))
    images_seen = int(model.spec.lineage.get("images_seen", 0))
    decisive = [model_digest, evaluator.digest, stream, request.n, request.seeds, request.likelihood_images]
    key = hashlib.sha256(json.dumps([*decisive, settings.key()]).encode()).hexdigest()[:16]
    artifact = f"{FOLDER}/{images_seen:012d}-{key}.json"
    if tracker and artifact in tracker.names(FOLDER):
        notice("skipped: this model was scored with these settings already")
        return Scores.from_plain(json.loads(tracker.read_text(artifact))), False
    connect()
    real = open_real(
        dataset,
        evaluator,
        storage,
        cache_dir=config.data.cache_dir,
        cache_gib=config.data.cache_gib,
        use_gpu=request.use_gpu,
        progress=display.counter("evaluate", "real images"),
        notice=notice,
    )
    n = request.n or real.test.count
    drawn = f"{n:,} samples" if len(request.seeds) == 1 else f"{len(request.seeds)} x {n:,} samples"
    notice(f"{drawn} at guidance scale {settings.guidance.scale:g}, judged by the {evaluator.kind}")
    done = evaluate(
        model,
        model_digest,
        request,
        real,
        evaluator,
        storage,
        dataset_digest=dataset.digest,
        progress=display.counter("evaluate", "images"),
        notice=notice,
    )
    if tracker:
        _record(tracker, done, model, storage, artifact, images_seen, config.tracking.grid_images)
        if resolved.published and settings == model.spec.sampling:
            record_scores(tracker, resolved.published.images_seen, done.scores.metrics())
    return done.scores, True


def request_of(config: Config, settings: Sampling) -> Request:
    """Return what the configuration asks of an evaluation."""
    asked = config.evaluation
    use_gpu = config.cluster.gpus_per_worker > 0
    there = ray.cluster_resources() if ray.is_initialized() else {}
    return Request(
        sampling=settings,
        n=asked.n,
        seeds=tuple(range(asked.seed, asked.seed + asked.seeds)),
        batch_size=asked.batch_size,
        likelihood_images=asked.likelihood_images,
        actors=asked.actors or max(int(there.get("GPU" if use_gpu else "CPU", 1)), 1),
        use_gpu=use_gpu,
        root=join(config.storage.root, "evaluations"),
    )


def weights_digest(model: Model) -> str:
    """Return the SHA-256 over the weights of a model that was not published by a run."""
    found = hashlib.sha256(model.spec.to_json().encode())
    for name, tensor in sorted(model.network.state_dict().items()):
        found.update(name.encode())
        found.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return found.hexdigest()


def _record(
    tracker: Tracker,
    done: Evaluation,
    model: Model,
    storage: Storage,
    artifact: str,
    images_seen: int,
    grid_images: int,
) -> None:
    """Record scores and pictures in the run; the scores as a file last, by which a later evaluation finds them."""
    tracker.metrics(done.scores.metrics(), images_seen)
    _record_grid(tracker, done, model, storage, images_seen, grid_images)
    if done.copies is not None:
        tracker.image("nearest-training-images", done.copies.picture(), images_seen)
    if done.likelihoods is not None:
        terms = {
            "timesteps": done.likelihoods.timesteps.tolist(),
            "bits_per_dim": done.likelihoods.terms.mean(0).tolist(),
        }
        tracker.text(tracking.to_json(terms), artifact.replace(FOLDER, "bound", 1))
    tracker.text(tracking.to_json(done.scores.to_plain()), artifact)
    scored = "; ".join(text for _, text in done.scores.lines())
    tracking.describe(tracker, {"Score": f"at {images_seen:,} images: {scored}."})


def _record_grid(
    tracker: Tracker, done: Evaluation, model: Model, storage: Storage, images_seen: int, most: int
) -> None:
    """Record a picture of some samples, a column for each class."""
    classes, labels = model.spec.classes, done.plan.labels(done.plan.seeds[0])
    numbers = np.zeros(done.plan.n, np.int64) if labels is None else labels
    shown = grid_choice(numbers, len(classes) if labels is not None else 0, most)
    names = () if labels is None else tuple(classes[c] for c in labels[shown[0]])
    images = read_images(done.plan, storage, model.spec.shape[0], shown.ravel())
    tracker.image(FOLDER, label_grid(images, shown.shape[1], names), images_seen)
