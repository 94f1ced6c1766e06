"""The stages from images to a registered model: ingest, train, evaluate, register; finished stages are skipped.

There is no record of finished stages beside their results: each stage looks for its earlier result (the dataset's
ingest key, the run's checkpoints and scores, the tags of model versions) and compares digests.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from pipelines import references, registry, tracking
from pipelines.config import Config, ConfigError, sampling
from pipelines.display import Display, TimeBreakdown, no_report
from pipelines.evaluation.evaluators import check_evaluator
from pipelines.evaluation.scores import Scores
from pipelines.evaluation.scoring import score_and_record
from pipelines.references import Resolved
from pipelines.registry import Gate, Verdict, check_signing
from pipelines.shards.index import DatasetError, read_dataset
from pipelines.shards.ingest.encode import CaptionEncoder
from pipelines.shards.ingest.write import Ingested, ingest, source_digest
from pipelines.storage import NotFoundError, Storage, join
from pipelines.tracking import ModelVersion, Tracker, links
from pipelines.training import driver
from pipelines.training.describe import workers_text
from pipelines.training.driver import TrainingResult
from pipelines.training.errors import TrainingError
from pipelines.training.ray_train.resources import connect_ray

INGEST_KEY = "ingest-key"
"""Name of the file beside a dataset that holds the digest of its input and settings."""
INGEST_SETTINGS = (
    "image_size",
    "channels",
    "geometry",
    "encoding",
    "shard_samples",
    "shard_bytes",
    "test_fraction",
    "text_encoder",
)
SHOWN = 20
"""Lines of a list that are shown; the report has all of them."""


@dataclass(frozen=True)
class FlowResult:
    """The result of the whole flow.

    Attributes:
        tracker: the MLflow run.
        verdict: whether the alias was allowed to move to `version`.
        skipped: names of the stages that were finished before.
    """

    tracker: Tracker
    scores: Scores
    version: ModelVersion
    verdict: Verdict
    skipped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types, for `--json`."""
        return {
            "scores": self.scores.to_plain(),
            "model": self.version.uri,
            "gate": asdict(self.verdict),
            "skipped": self.skipped,
            "run_id": self.tracker.run_id,
            "mlflow": self.tracker.url,
        }


def run(config: Config, lineage: dict[str, Any], display: Display) -> FlowResult:
    """Run every stage in order.

    Args:
        lineage: which code runs, see `pipelines.lineage`.

    Raises:
        TrainingError: training was stopped before it saw all its images.
    """
    storage = Storage.of(config)
    storage.require(config.storage.root)
    check_signing(config.registry)
    skipped = []
    if ingest_stage(config, storage, display) is None:
        skipped.append("ingest")
    check_evaluator(config, read_dataset(config.data.uri, storage))  # before hours of training
    if config.model.text_dim:
        registry.bundled_encoder(driver.encoder_lineage(config, storage)["text_encoder"])
    result = train_stage(config, storage, lineage, display)
    if result.status == "complete":
        skipped.append("train")
    if result.status == "stopped":
        raise TrainingError(f"stopped at {result.images_seen} images; the same command goes on from there")
    if result.published is None:
        raise TrainingError(
            "MLflow does not name the run's published checkpoint yet; the same command goes on from here"
        )
    resolved = references.resolve(
        f"runs:/{result.tracker.run_id}/{result.published.images_seen}",
        tracking_uri=result.tracker.uri,
        storage=storage,
    )
    scores, fresh = score_and_record(
        resolved, sampling(config), config, storage, display, lambda: connect_ray(config, storage)
    )
    if not fresh:
        skipped.append("evaluate")
    version, fresh = register_stage(resolved, scores, config, storage, display)
    if not fresh:
        skipped.append("register")
    name, alias = config.registry.model, config.registry.alias
    gate = Gate(config, storage, display, lambda: connect_ray(config, storage), name, alias)
    return FlowResult(result.tracker, scores, version, gate.promote(version), tuple(skipped))


def ingest_stage(config: Config, storage: Storage, display: Display) -> Ingested | None:
    """Ingest `data.source`, or return None where the same input was ingested with the same settings before."""
    data = config.data
    if data.source is None:
        read_dataset(data.uri, storage)
        display.stage("ingest", f"skipped: data.source is not set, {data.uri} is used as it is")
        return None
    try:
        if storage.read(join(data.uri, INGEST_KEY)).decode() == ingest_key(config, storage):
            dataset = read_dataset(data.uri, storage)
            driver.check_dataset(dataset, config)
            display.stage("ingest", f"skipped: {data.uri} holds this input already (digest {dataset.digest[:12]})")
            return None
    except (NotFoundError, DatasetError):
        pass
    if not config.storage.local_stack:  # its Ray has no more cores than this process has threads
        connect_ray(config, storage)
    done = write_dataset(config, storage, display)
    driver.check_dataset(done.dataset, config)
    return done


def write_dataset(config: Config, storage: Storage, display: Display) -> Ingested:
    """Ingest `data.source` with the settings of the configuration, and record the ingest key.

    The work runs on Ray where this process is connected to a cluster that can read the source and write the dataset.

    Raises:
        ConfigError: there is no such text encoder.
    """
    data = config.data
    assert data.source is not None
    key, encoder = ingest_key(config, storage), _text_encoder(data.text_encoder)
    storage.delete(join(data.uri, INGEST_KEY))  # an interrupted ingest must not look finished
    display.stage("ingest", f"{data.source} -> {data.uri}")
    done = ingest(
        data.source,
        data.uri,
        storage,
        image_size=data.image_size,
        channels=data.channels,
        shard_samples=data.shard_samples,
        shard_bytes=data.shard_bytes,
        test_fraction=data.test_fraction,
        geometry=data.geometry,
        encoding=data.encoding,
        text_encoder=encoder,
        progress=display.counter("ingest", "images"),
        notice=lambda text: display.stage("ingest", text),
    )
    storage.write(join(data.uri, INGEST_KEY), key.encode())
    show_ingested(done, display)
    return done


def show_ingested(done: Ingested, display: Display) -> None:
    """Show what was written, how images were changed, and the names of those that were left out."""
    dataset = done.dataset
    _show_some(display, "left out", [f"{bad.origin}: {bad.reason}" for bad in done.bad])
    _show_some(display, "empty", [f"class {name} has no readable image" for name in done.empty_classes])
    for line in done.report.lines():
        display.stage("note", line)
    if done.reused_shards:
        shards = sum(map(len, dataset.splits.values()))
        display.stage("ingest", f"{done.reused_shards:,} of {shards:,} shards were finished before and are whole")
    counts = ", ".join(f"{dataset.samples(split):,} {split}" for split in dataset.splits)
    classes = f"{len(dataset.classes)} classes, digest {dataset.digest[:12]}"
    display.stage("dataset", f"{dataset.uri}: {counts}, {classes}, {len(done.bad)} left out")
    display.stage("report", join(dataset.uri, "ingest-report.json"))


def _show_some(display: Display, name: str, lines: list[str]) -> None:
    """Show the first lines of a list, and how many more there are."""
    for line in lines[:SHOWN]:
        display.stage(name, line)
    if len(lines) > SHOWN:
        display.stage(name, f"… and {len(lines) - SHOWN:,} more; ingest-report.json has all {len(lines):,}")


def _text_encoder(name: str | None) -> CaptionEncoder | None:
    """Load the text encoder of this name or path.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if name is None:
        return None
    from pipelines.text import TextEncoder

    try:
        return TextEncoder(name)
    except ValueError as error:
        raise ConfigError(f"data.text_encoder: {error}") from error


def ingest_key(config: Config, storage: Storage) -> str:
    """Return the digest of the input and of every setting that decides what an ingest writes.

    The versions of this code and of Pillow are left out: an upgrade must not rewrite a dataset that runs train on.
    """
    data = config.data
    assert data.source is not None
    settings = data.model_dump(mode="json", include=set(INGEST_SETTINGS))
    content = [source_digest(data.source, storage), settings]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def train_stage(config: Config, storage: Storage, lineage: dict[str, Any], display: Display) -> TrainingResult:
    """Train a new run, resume it, or return its result where it has seen all its images."""
    plan = driver.make_plan(config, storage, lineage)
    if plan.complete:
        display.stage("train", f"skipped: run '{config.name}' has seen its {plan.resumes_at:,} images already")
    elif plan.resumes_at:
        display.stage("train", f"resuming run '{config.name}' at {plan.resumes_at:,} of {config.images:,} images")
    else:
        display.stage("train", f"new run '{config.name}', {config.images:,} images, {workers_text(config)}")
    if not plan.complete:
        display.stage("train", f"follow it at {plan.job.tracker.url}")
    report = no_report if plan.complete else display.training(config.images, plan.resumes_at)
    result = driver.train(plan, report, lambda text: display.stage("train", text))
    if result.status == "stopped":
        display.stage("train", f"stopped with a checkpoint at {result.images_seen:,} images")
    if result.goodput is not None and result.status != "complete":
        goodput = result.goodput
        title = f"{goodput.fraction:.1%} of the time was training that lasts"
        display.breakdown(TimeBreakdown("goodput", title, goodput.parts(), goodput.wall_s, goodput.lines()))
    return result


def register_stage(
    resolved: Resolved, scores: Scores, config: Config, storage: Storage, display: Display
) -> tuple[ModelVersion, bool]:
    """Register a checkpoint with its scores as a model version, unless it is one, and say so on the page of its run.

    Returns:
        The version, and whether it was registered now.
    """
    assert resolved.tracker is not None
    uri = resolved.model.spec.lineage["dataset_uri"]
    version, fresh = registry.register_once(resolved, scores, config, storage, display, uri)
    if fresh:
        page = links.version_page(version.name, version.version)
        where = f"as [{version.name} version {version.version}]({page}), which has the gate's verdict and its evidence."
        tracking.describe(resolved.tracker, {"Registered": where})
    return version, fresh
