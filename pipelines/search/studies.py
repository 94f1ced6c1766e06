"""Run a whole study: from a model or a configuration to records, an MLflow run with a page, and the best settings."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import ray

from pipelines import references, registry, tracking
from pipelines.config import Config, ConfigError, changed_sampling, sampling_overrides
from pipelines.display import Notice, StageNotice
from pipelines.evaluation.compare import Distance
from pipelines.evaluation.evaluators import Evaluator, open_evaluator
from pipelines.evaluation.prompts import open_captions
from pipelines.evaluation.real import HELD_OUT, Real, open_real
from pipelines.references import Resolved
from pipelines.search import guidance_search, training_confirmation, training_search
from pipelines.search.confirmation import Confirmed, winner_of
from pipelines.search.guidance_search import GuidanceResult, base_of, guides_of
from pipelines.search.judge import Subject
from pipelines.search.observer import Observer, OnChange
from pipelines.search.page import Page, png
from pipelines.search.rung_judge import held_out_images
from pipelines.search.seeds import NoiseSeeds
from pipelines.search.space import check_space
from pipelines.search.study import StudyStore, TrialRecord, best, count_states, done, earlier_points, ended
from pipelines.search.study_config import StudyConfig
from pipelines.search.training_confirmation import fresh_images
from pipelines.search.training_trial import Shared, rungs
from pipelines.search.trial_seconds import median_seconds
from pipelines.search.winner import register_winner, show_winner, write_best
from pipelines.shards.index import Dataset, read_dataset
from pipelines.storage import Storage, join
from pipelines.tracking import ModelVersion, Tracker
from pipelines.training.driver import check_dataset
from pipelines.training.ray_train.resources import connect_ray

# A study shows a failed trial in one line of its own; Tune would add the stack traces of all actors.
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class StudyResult:
    """The result of a study.

    Attributes:
        tracker: the MLflow run of the study.
        records: all trials.
        best: the trial that is best in the first objective; None where no trial finished.
        page: address of the HTML page, beside the records.
        answer: the result as JSON types, for `--json`.
    """

    tracker: Tracker
    records: list[TrialRecord]
    best: TrialRecord | None
    page: str
    answer: dict[str, Any]


def guidance_study(
    config: Config,
    overrides: Sequence[str],
    reference: str,
    name: str,
    study: StudyConfig,
    *,
    resume: bool,
    after: Sequence[str],
    on_change: OnChange,
    notice: StageNotice,
) -> StudyResult:
    """Run the study of `ddpm search guidance`; see `guidance_search`.

    Args:
        config: configuration; the model's own sampling settings replace those in it, but for what overrides change.
        overrides: of the configuration.
        reference: the model, such as `models:/NAME@alias`.
        name: of the study.
        study: its settings.
        resume: whether it may exist already.
        after: names of earlier studies whose best trials are tried first.
        on_change: called after every change of a trial.
        notice: called with "study" and a line of text.

    Raises:
        ConfigError, StudyError, ModelError, DatasetError: the study cannot start.
    """
    began, say = time.monotonic(), partial(notice, "study")
    store, storage = StudyStore.of(config, name), Storage.of(config)
    resolved = references.resolve(reference, tracking_uri=config.tracking.uri, storage=storage)
    if resolved.version is not None:
        registry.check_signing(config.registry)  # the winner becomes a version
    base = base_of(config, changed_sampling(resolved.model.spec.sampling, overrides))
    check_space(study, base)
    first = earlier_points(study, base, [StudyStore.of(config, other) for other in after], notice=say)
    dataset = read_dataset(resolved.model.spec.lineage.get("dataset_uri", config.data.uri), storage)
    real, evaluator = _open_evaluation(dataset, config, storage, say)
    guides = guides_of(resolved.model, study, base, storage)
    model, seed = resolved.model, NoiseSeeds.of(base, name).trials
    captions, _ = open_captions(model.spec.network.text_dim, dataset, config, storage, say) or (None, None)
    subject = Subject.of(model, evaluator, real, guides, seed, captions)
    records = store.open(study, base, _identity(resolved), resume=resume)
    with _opened_run(config, name, study, reference) as tracker:
        observer = Observer(store, study, tracker, config.tracking.experiment, study.samples, on_change)
        distance = Distance.of(real)
        found = guidance_search.search(subject, study, base, store, observer, records, distance, say, first)
        observer.settle()
        version = register_winner(found.winner, resolved, name, config, storage, notice)
        return _publish_guidance(found, resolved, version, study, base, store, tracker, time.monotonic() - began)


def _publish_guidance(
    found: GuidanceResult,
    resolved: Resolved,
    version: ModelVersion | None,
    study: StudyConfig,
    base: Config,
    store: StudyStore,
    tracker: Tracker,
    seconds: float,
) -> StudyResult:
    """Write the page and the best settings of a guidance study that took so many seconds, and return its result.

    Args:
        version: the version that was made of the winner, if any.
    """
    name, reference = store.name, resolved.reference
    page = Page(
        name,
        study,
        reference,
        found.records,
        found.confirmed,
        found.pictures,
        seeds=_seeds(base, name, found.confirmation_seed),
        command=f"ddpm search guidance --model {reference} --study {name}",
        notes=_cost(found, resolved, study, seconds),
    )
    where = _publish(page, store, tracker)
    winner = found.winner
    answer = {
        "study": name,
        "run_id": tracker.run_id,
        "trials": count_states(found.records),
        "front": [asdict(record) for record in found.front],
        **_confirmation(page, winner, store),
        "version": None if version is None else version.uri,
        "page": where,
        "seconds": seconds,
    }
    if winner is not None:
        with tracking.recording("has not got the best settings"):
            tracker.text(tracking.to_json(winner.settings.to_json()), "best/sampling.json")
            tracker.text("\n".join(sampling_overrides(winner.settings)), "best/overrides.txt")
    return StudyResult(tracker, found.records, best(found.records, study.objectives[0]), where, answer)


def training_study(
    config: Config,
    name: str,
    study: StudyConfig,
    lineage: dict[str, Any],
    *,
    resume: bool,
    after: Sequence[str],
    on_change: OnChange,
    notice: StageNotice,
) -> StudyResult:
    """Run the study of `ddpm search training`; see `training_search`.

    Args:
        config: the configuration that the trials vary.
        lineage: which code runs, see `pipelines.lineage`.
        name, study, resume, after, on_change, notice: as for `guidance_study`.

    Raises:
        ConfigError, StudyError, DatasetError: the study cannot start.
    """
    began, say = time.monotonic(), partial(notice, "study")
    store, storage = StudyStore.of(config, name), Storage.of(config)
    if config.training_s is not None:
        raise ConfigError(
            f"training_s = {config.training_s:g}: trials are compared after as many images each, so set images, and "
            "leave training_s at null"
        )
    check_space(study, config)
    rungs(config.images, config.batch_size, study)
    seeds = NoiseSeeds.of(config, name)
    first = earlier_points(study, config, [StudyStore.of(config, other) for other in after], notice=say)
    dataset = read_dataset(config.data.uri, storage)
    check_dataset(dataset, config)
    real, evaluator = _open_evaluation(dataset, config, storage, say)
    width = training_search.text_width(study, config)
    captions, held = open_captions(width, dataset, config, storage, say, held_out=HELD_OUT) or (None, None)
    held_out = held_out_images(real, held)
    fresh = fresh_images(study, *held_out)
    training_search.concurrency(study, config, ray.cluster_resources())
    records = store.open(study, config, dataset.digest, resume=resume)
    with _opened_run(config, name, study, dataset.uri) as tracker:
        observer = Observer(store, study, tracker, config.tracking.experiment, config.images, on_change)
        observer.begin(records)
        shared = Shared.of(study, config, name, lineage, tracker.run_id, evaluator.encoder, real, captions, held_out)
        training_search.run_all(shared, records, observer, first)
        observer.settle()
        records = store.records()
        seed = seeds.confirmation(ended(records))
        confirmed = training_confirmation.confirm(
            study,
            config,
            evaluator,
            real,
            records,
            storage,
            captions,
            fresh,
            trials_seed=seeds.trials,
            seed=seed,
            notice=say,
        )
        show_winner(winner_of(confirmed), notice)
        return _publish_training(config, study, dataset.uri, records, confirmed, seed, store, tracker, began)


def _publish_training(
    config: Config,
    study: StudyConfig,
    dataset_uri: str,
    records: list[TrialRecord],
    confirmed: list[Confirmed],
    seed: int,
    store: StudyStore,
    tracker: Tracker,
    began: float,
) -> StudyResult:
    """Write the page and the best configuration of a training study, and return its result.

    Args:
        seed: of the noise of `confirmed`.
    """
    name = store.name
    seen = sum(r.scores.get("images_seen", 0) for r in records)
    spent = median_seconds(records, config, name, store.storage)
    notes = [
        f"Each trial trains on up to {config.images:,} images; together they saw {seen:,.0f}, where training each to "
        f"its end would have taken {config.images * len(records):,}.",
        *([f"Median seconds of a trial: {_listed(spent)}."] if spent else []),
        f"{time.monotonic() - began:,.0f} s for this call.",
    ]
    page = Page(
        name,
        study,
        dataset_uri,
        records,
        confirmed,
        seeds=_seeds(config, name, seed),
        command=f"ddpm search training --study {name} …",
        notes=notes,
    )
    where = _publish(page, store, tracker)
    top, winner = best(records, study.objectives[0]), winner_of(confirmed)
    answer = {
        "study": name,
        "run_id": tracker.run_id,
        "trials": count_states(records),
        "best": None if top is None else asdict(top),
        **_confirmation(page, winner, store),
        "config": write_best(config, top, winner, store, tracker),
        "failed": {r.trial: r.error for r in records if r.state == "failed"},
        "trial_seconds": spent,
        "page": where,
        "seconds": time.monotonic() - began,
    }
    return StudyResult(tracker, records, top, where, answer)


def _open_evaluation(dataset: Dataset, config: Config, storage: Storage, notice: Notice) -> tuple[Real, Evaluator]:
    """Connect to Ray, and return the evaluator of a dataset, and what it says of the real images."""
    connect_ray(config, storage)
    evaluator = open_evaluator(config, dataset, storage, notice)
    return open_real(dataset, evaluator, config, storage, notice=notice), evaluator


@contextmanager
def _opened_run(config: Config, name: str, study: StudyConfig, subject: str) -> Iterator[Tracker]:
    """Open the study's MLflow run, the parent of its trials' runs; what breaks the study off makes it FAILED or KILLED.

    Ray ends the trials that run with this process. Their records say that they run, so that `--resume` runs them again.
    """
    assert config.tracking.uri is not None
    note = f"{study.kind} study of {subject}; its trials are the runs below it, its page is the artifact `study.html`."
    tags = {"ddpm.study": name, "ddpm.study.kind": study.kind, "mlflow.note.content": note}
    tracker, _ = tracking.open_run(config.tracking.uri, config.tracking.experiment, f"study-{name}", tags)
    try:
        tracker.status("RUNNING")  # a study that goes on has the status with which it stopped
        tracker.text(tracking.to_json(study.model_dump(mode="json", by_alias=True)), "study.json")
        yield tracker
    except BaseException as error:
        # Ctrl-C, and SIGTERM, by which a job on a cluster is stopped: Ray makes it a SystemExit.
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        with tracking.recording(f"does not know that the study is {status}"):
            replace(tracker, patience_s=0).status(status)
        raise


def _publish(page: Page, store: StudyStore, tracker: Tracker) -> str:
    """Write the study's page beside the records and into its MLflow run, and return its address.

    Figures are logged as well, as PNG where plotly can render them.
    """
    text = page.html()
    where = join(store.uri, "study.html")
    store.storage.write(where, text.encode())
    with tracking.recording(f"has not got all of the study's page, which is {where}"):
        tracker.text(text, "study.html")
        for name, figure in page.figures().items():
            tracker.text(figure.to_json(), f"figures/{name}.json")
            picture = png(figure)
            if picture is not None:
                tracker.file(picture, f"figures/{name}.png")
        top = best(page.records, page.study.objectives[0])
        if top is not None:
            tracker.metrics({"search/frechet_distance": top.scores["frechet_distance"]}, len(page.records))
            tracker.tags({"ddpm.best": top.trial})
        tracker.status("FINISHED")
    return where


def _seeds(config: Config, name: str, confirmation: int) -> dict[str, int]:
    """Return the noise seeds that a study has used, by what they were for."""
    return {"trials": NoiseSeeds.of(config, name).trials, "confirmation": confirmation}


def _confirmation(page: Page, winner: Confirmed | None, store: StudyStore) -> dict[str, Any]:
    """Write what the confirmation found beside the records, and return it as JSON types."""
    found = {
        "confirmed": [asdict(c) | {"settings": c.settings.to_json()} for c in page.confirmed],
        "winner": None if winner is None else winner.trial,
        "seeds": dict(page.seeds),
    }
    store.record_confirmation({**found, "after": ended(page.records)})
    return found


def _identity(resolved: Resolved) -> str:
    """Return a text that is equal for equal weights, whichever reference names them."""
    lineage = resolved.model.spec.lineage
    known = ("run_id", "images_seen", "dataset_digest", "sigma_rel")
    return json.dumps({key: lineage[key] for key in known if key in lineage}, sort_keys=True)


def _cost(found: GuidanceResult, resolved: Resolved, study: StudyConfig, seconds: float) -> list[str]:
    """Return notes on the cost of a study in network evaluations, compared with that of the model's training."""
    trials = sum(r.scores.get("evaluations", 0) * r.scores.get("samples", 0) for r in done(found.records))
    confirming = sum(c.scores["evaluations"] * study.confirm_samples for c in found.confirmed)
    spent = trials + confirming
    # A training step costs about three evaluations per image: a forward pass, and a backward pass that costs two.
    seen = int(resolved.model.spec.lineage.get("images_seen") or 0)
    beside = f"; the training of the model took about {3 * seen:,} (3 for each of {seen:,} images)" if seen else ""
    shares = f"{trials:,.0f} in trials, {confirming:,.0f} to confirm"
    return [f"{spent:,.0f} network evaluations ({shares}){beside}.", f"{seconds:,.0f} s for this call."]


def _listed(seconds: Mapping[str, float]) -> str:
    """Return seconds by name in words."""
    return ", ".join(f"{part} {value:.1f}" for part, value in seconds.items())
