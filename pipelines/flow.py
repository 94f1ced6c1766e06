"""The whole way, stage by stage: ingest, train, evaluate, register. A stage whose inputs have not changed is skipped.

Nothing is remembered on the side: each stage finds its earlier result where it left it (the dataset's report, the run's
checkpoints and scores, the version's tags) and compares digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

from ddpm.generate import SamplingSettings
from pipelines import models, registry, tracking
from pipelines.config import Config, ConfigError
from pipelines.evaluation import evaluate as evaluation
from pipelines.evaluation.evaluate import Scores
from pipelines.evaluation.plots import label_grid
from pipelines.models import Published, Resolved
from pipelines.registry import Verdict
from pipelines.shards.index import DatasetError, read_dataset
from pipelines.shards.ingest.write import Ingested, ingest, source_digest
from pipelines.storage import NotFoundError, Storage, join
from pipelines.tracking import ModelVersion, Tracker
from pipelines.training import driver
from pipelines.training.driver import TrainingError, TrainingResult


class Display(Protocol):
    """What a stage tells the terminal."""

    def stage(self, name: str, text: str) -> None:
        """A stage begins, ends or is skipped."""

    def counter(self, description: str, unit: str) -> Callable[[int, int], None]:
        """A progress bar: call it with (done, total)."""

    def training(self, images: int, resumes_at: int) -> Callable[[dict[str, float]], None]:
        """A training progress bar: call it with what the workers report."""


@dataclass(frozen=True)
class FlowResult:
    """What the flow leaves behind."""

    tracker: Tracker
    scores: Scores
    version: ModelVersion
    verdict: Verdict
    skipped: tuple[str, ...]


def run(config: Config, lineage: dict[str, Any], display: Display) -> FlowResult:
    """Every stage in order.

    Raises:
        TrainingError: training was stopped before its end.
    """
    storage = Storage.of(config)
    storage.require(config.storage.root)
    skipped = []
    if ingest_stage(config, storage, display) is None:
        skipped.append("ingest")
    result = train_stage(config, storage, lineage, display)
    if result.status == "complete":
        skipped.append("train")
    if result.status == "stopped" or result.published is None:
        raise TrainingError(f"stopped at {result.images_seen} images; the same command goes on from there")
    resolved = models.resolve(
        f"runs:/{result.tracker.run_id}/{result.published.images_seen}",
        tracking_uri=result.tracker.uri,
        storage=storage,
    )
    scores, fresh = evaluate_stage(
        resolved, result.published, models.sampling_settings(config), config, storage, display
    )
    if not fresh:
        skipped.append("evaluate")
    version, verdict, fresh = register_stage(resolved, result.published, scores, config, display)
    if not fresh:
        skipped.append("register")
    return FlowResult(result.tracker, scores, version, verdict, tuple(skipped))


def ingest_stage(config: Config, storage: Storage, display: Display) -> Ingested | None:
    """Ingest `data.source` unless the same input was ingested with the same settings before; None when skipped."""
    data = config.data
    if data.source is None:
        read_dataset(data.uri, storage)
        display.stage("ingest", f"skipped: data.source is not set, {data.uri} is used as it is")
        return None
    key = ingest_key(config)
    try:
        if storage.read(join(data.uri, "ingest-key")).decode() == key:
            dataset = read_dataset(data.uri, storage)
            driver.check_dataset(dataset, config)
            display.stage("ingest", f"skipped: {data.uri} holds this input already (digest {dataset.digest[:12]})")
            return None
    except (NotFoundError, DatasetError):
        pass
    display.stage("ingest", f"{data.source} -> {data.uri}")
    counter = display.counter("ingest", "images")
    done = ingest(
        data.source,
        data.uri,
        storage,
        image_size=data.image_size,
        channels=data.channels,
        shard_samples=data.shard_samples,
        test_fraction=data.test_fraction,
        progress=counter,
    )
    show_ingested(done, display)
    driver.check_dataset(done.dataset, config)
    storage.write(join(data.uri, "ingest-key"), key.encode())
    return done


def show_ingested(done: Ingested, display: Display) -> None:
    """What was written, and by name what was left out."""
    dataset = done.dataset
    for bad in done.bad:
        display.stage("left out", f"{bad.origin}: {bad.reason}")
    for name in done.empty_classes:
        display.stage("empty", f"class {name} has no readable image")
    counts = ", ".join(f"{dataset.samples(split):,} {split}" for split in dataset.splits)
    classes = f"{len(dataset.classes)} classes, digest {dataset.digest[:12]}"
    display.stage("dataset", f"{dataset.uri}: {counts}, {classes}, {len(done.bad)} left out")


def ingest_key(config: Config) -> str:
    """Digest of everything that decides what an ingest writes."""
    data = config.data
    if data.source is None:
        raise ConfigError("data.source has no value: set it to `digits` or to a folder of class folders")
    settings = [source_digest(data.source), data.image_size, data.channels, data.shard_samples, data.test_fraction]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def train_stage(config: Config, storage: Storage, lineage: dict[str, Any], display: Display) -> TrainingResult:
    """Train, or resume, or find that there is nothing left to do."""
    plan = driver.make_plan(config, storage, lineage)
    if plan.complete:
        display.stage("train", f"skipped: run '{config.name}' has seen its {plan.resumes_at:,} images already")
    elif plan.resumes_at:
        display.stage("train", f"resuming run '{config.name}' at {plan.resumes_at:,} of {config.images:,} images")
    else:
        display.stage(
            "train", f"new run '{config.name}', {config.images:,} images, {config.cluster.num_workers} workers"
        )
    if not plan.complete:
        display.stage("train", f"follow it at {plan.job.tracker.url}")
    report = (lambda values: None) if plan.complete else display.training(config.images, plan.resumes_at)
    result = driver.train(plan, report, lambda text: display.stage("train", text))
    if result.status == "stopped":
        display.stage("train", f"stopped with a checkpoint at {result.images_seen:,} images")
    return result


def evaluate_stage(
    resolved: Resolved,
    published: Published | None,
    settings: SamplingSettings,
    config: Config,
    storage: Storage,
    display: Display,
) -> tuple[Scores, bool]:
    """Scores of a model and whether they are fresh; a run remembers those of the same model, settings and evaluator."""
    model, tracker = resolved.model, resolved.tracker
    uri = model.spec.lineage.get("dataset_uri", config.data.uri)
    dataset = read_dataset(uri, storage)
    splits = evaluation.open_splits(dataset, storage, config.data.cache_dir, config.data.cache_gib)
    evaluator = evaluation.get_evaluator(dataset, splits, storage, lambda text: display.stage("evaluate", text))
    images_seen = int(model.spec.lineage.get("images_seen", published.images_seen if published else 0))
    model_digest = published.digest if published else json.dumps(model.spec.lineage, sort_keys=True)
    key_parts = [model_digest, evaluator.digest, dataset.digest, config.evaluation.seed, asdict(settings)]
    key = hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()[:16]
    artifact = f"evaluation/{images_seen:012d}-{key}.json"
    if tracker and artifact in tracker.names("evaluation"):
        plain = json.loads(tracker.read_text(artifact))
        display.stage("evaluate", "skipped: this model was scored with these settings already")
        return Scores(**{f.name: plain[f.name] for f in fields(Scores)}), False
    display.stage("evaluate", f"{len(splits['test'].images)} samples at guidance scale {settings.scale:g}")
    driver.connect_ray(config, storage)
    done = evaluation.evaluate(
        model,
        settings,
        dataset,
        splits,
        evaluator,
        seed=config.evaluation.seed,
        batch_size=config.evaluation.batch_size,
        use_gpu=config.cluster.gpus_per_worker > 0,
        progress=display.counter("evaluate", "images"),
    )
    if tracker:
        tracker.metrics(done.scores.metrics(), images_seen)
        classes = max(len(model.spec.classes), 1)
        order = [i for row in range(8) for c in range(classes) for i in (done.labels == c).nonzero()[0][row : row + 1]]
        tracker.image("evaluation", label_grid(done.samples[order], classes, model.spec.classes), images_seen)
        tracker.text(tracking.to_json(asdict(done.scores)), artifact)
    return done.scores, True


def register_stage(
    resolved: Resolved, published: Published, scores: Scores, config: Config, display: Display
) -> tuple[ModelVersion, Verdict, bool]:
    """A version for this checkpoint with these scores, and the alias moved if the gate allows; fresh or found."""
    assert resolved.tracker is not None
    tracker, name, alias = resolved.tracker, config.registry.model, config.registry.alias
    for found in tracking.versions(tracker.uri, name):
        if found.tags.get("model_digest") == published.digest and registry.scores_of(found) == scores:
            display.stage("register", f"skipped: this model is {name} version {found.version} already")
            return found, registry.promote(tracker.uri, found, alias), False
    display.stage("register", f"as {name}")
    settings = scores.sampling | {"interval": tuple(scores.sampling["interval"])}
    spec = replace(resolved.model.spec, sampling=SamplingSettings(**settings))
    model_id = registry.package(tracker, replace(resolved.model, spec=spec))
    version = registry.register(tracker, name, model_id, scores, spec.lineage, published.digest)
    verdict = registry.promote(tracker.uri, version, alias)
    return version, verdict, True
