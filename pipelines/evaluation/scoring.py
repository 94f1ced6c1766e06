"""Score the model of a MODEL reference, and record the scores in its MLflow run; what was scored before is read."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ddpm.generate import Sampling
from ddpm.model import Model, ModelSpec, tensors_digest
from ddpm.settings import settings_of
from pipelines import references, tracking
from pipelines.checkpoints import list_published, record_scores
from pipelines.config import Config
from pipelines.display import Display, Notice, no_notice
from pipelines.evaluation.evaluate import Evaluation, evaluate
from pipelines.evaluation.evaluators import Evaluator, find_evaluator, open_evaluator
from pipelines.evaluation.likelihoods import Likelihood
from pipelines.evaluation.plots import MAX_COLUMNS, class_grid, grid_choice
from pipelines.evaluation.prompts import Prompts, find_prompts, open_prompts
from pipelines.evaluation.real import open_real
from pipelines.evaluation.samples import Request, read_images
from pipelines.evaluation.scores import Scores
from pipelines.references import Resolved
from pipelines.shards.index import Dataset, DatasetError, read_dataset
from pipelines.shards.quarantine import read_quarantine, stream_digest
from pipelines.signing import Authority, SignatureError, Signer, Trust, seal, unseal
from pipelines.storage import Storage
from pipelines.tracking import CheckpointModel, Tracker

FOLDER = "evaluation"
"""Of the scores among the artifacts of a run."""
SIGNATURES = "signatures"
"""Folder of the signatures of scores, under their names, among the artifacts of a run."""
BOUND = "the tighter bound"
"""What decides the bound of scores, beside the request."""


@dataclass(frozen=True)
class Scored:
    """The result of an evaluation, as a run records it.

    Attributes:
        artifact: name of the file of the scores among the artifacts of the run.
        images_seen: by the model in its training.
        dataset: (name, digest) of the data that it was compared with.
        pictures: by their keys, uint8 [H, W, 3]; none where the scores were read.
        terms: of the variational bound by timestep, as JSON; None where there are none.
        at_ms: when it was made, in milliseconds since the epoch; None where the scores were read.
    """

    scores: Scores
    artifact: str
    images_seen: int
    dataset: tuple[str, str]
    pictures: Mapping[str, NDArray[np.uint8]]
    terms: str | None
    at_ms: int | None

    @property
    def fresh(self) -> bool:
        """Whether the scores were computed now."""
        return self.at_ms is not None

    def record(
        self,
        tracker: Tracker,
        model: CheckpointModel | None,
        signer: Signer | None,
        *,
        own: bool = True,
        shown: bool = True,
    ) -> None:
        """Record scores and pictures in a run; the file last, by which a later evaluation finds the scores.

        Done again after an interruption, everything is there once.

        Args:
            signer: signs the scores; None where nobody can, and then the next who needs them scores the model again.
            model: the logged model of the checkpoint, which gets the scores too; None where it has none.
            own: whether the run scores its checkpoints so; pictures of another evaluation have keys of their own.
            shown: whether the curves of the run and its Score line get them; no others take the place of its own.
        """
        at_ms = int(time.time() * 1000) if self.at_ms is None else self.at_ms
        if shown and model is None:
            tracker.metrics(self.scores.metrics(), self.images_seen, at_ms)
        elif shown and model is not None:
            tracking.log_scores(tracker, model, self.scores.metrics(), self.dataset, at_ms)
        for kind, picture in self.pictures.items():
            key = kind if own else f"{kind}{_suffix(self.artifact)}"
            if model is None or not tracker.has_picture(key, self.images_seen):
                tracker.image(key, picture, self.images_seen)
        if self.terms is not None:
            tracker.text(self.terms, self.artifact.replace(FOLDER, "bound", 1))
        text = tracking.to_json(self.scores.to_plain())
        if signer is not None:
            tracker.text(seal({"sha256": _sha256(text)}, self.artifact, signer).decode(), _signature(self.artifact))
        tracker.text(text, self.artifact)
        if shown:
            scored = "; ".join(f"{name} {text}" for name, text in self.scores.lines())
            tracking.describe(tracker, {"Score": f"at {self.images_seen:,} images: {scored}."})


def score_and_record(
    resolved: Resolved,
    settings: Sampling,
    config: Config,
    storage: Storage,
    display: Display,
    connect: Callable[[], None],
    dataset_uri: str | None = None,
) -> tuple[Scores, bool]:
    """Score a model, and record the scores in its run; arguments and errors are those of `score`.

    Returns:
        The scores, and whether they were computed now.
    """
    authority = Authority.of(config.registry)
    scored = score(resolved, settings, config, storage, display, connect, dataset_uri, authority)
    tracker, published, spec = resolved.tracker, resolved.published, resolved.model.spec
    if tracker is None:
        return scored.scores, scored.fresh
    # Scores of other settings, data or judges stand beside its own, by which the best checkpoint is chosen.
    own = (
        published is not None
        and settings == spec.sampling
        and dataset_uri is None
        and scored.scores.stream_digest == spec.lineage.get("stream_digest", scored.scores.stream_digest)
        and references.scored_alike(config, tracker)
    )
    if own and published is not None:
        if scored.fresh or not scored.scores.metrics().items() <= published.scores.items():
            # They may be there, and not in the record: of an evaluation that was interrupted, or asked for otherwise.
            logged = tracking.checkpoint_models(tracker).get(scored.images_seen)
            scored.record(tracker, logged, authority.signer)
            record_scores(tracker, published.images_seen, scored.scores.metrics())
    elif scored.fresh:
        of_run = [published] if published is not None else list_published(tracker, deleted=True)
        has_own = any(one.scores for one in of_run if one.images_seen == scored.images_seen)
        scored.record(tracker, None, authority.signer, own=False, shown=not has_own)
    return scored.scores, scored.fresh


def score(
    resolved: Resolved,
    settings: Sampling,
    config: Config,
    storage: Storage,
    display: Display,
    connect: Callable[[], None],
    dataset_uri: str | None = None,
    authority: Authority | None = None,
) -> Scored:
    """Score a model, or read the scores that its run has for the same model, settings, data and evaluator.

    Args:
        settings: with which the samples are drawn.
        connect: connects this process to the Ray cluster; called only where something has to be computed.
        dataset_uri: of the data to compare with; by default, those that the model was trained on.
        authority: says whose stored scores and samples are believed, and signs samples; None to believe none.

    Raises:
        DatasetError, ConfigError: the data cannot be used to score a model.
    """

    def notice(text: str) -> None:
        display.stage("evaluate", text)

    model, tracker = resolved.model, resolved.tracker
    dataset = read_dataset(dataset_uri or model.spec.lineage.get("dataset_uri", config.data.uri), storage)
    check_fits(model.spec, dataset)
    model = references.guided(model, settings, config.tracking.uri, storage)
    evaluator = open_evaluator(config, dataset, storage, notice, connect=connect)
    prompts = open_prompts(model.spec, dataset, config, storage, notice, connect=connect)
    model_digest = resolved.published.digest if resolved.published else weights_digest(model)
    model_digest = _guided_digest(model_digest, model, settings)
    request = Request.of(config, settings)
    images_seen = int(model.spec.lineage.get("images_seen", 0))
    stream = stream_digest(dataset, read_quarantine(dataset.uri, storage))
    artifact = _artifact(images_seen, model_digest, evaluator, prompts, stream, request)
    name_and_digest = dataset.uri.rstrip("/").rsplit("/", 1)[-1], dataset.digest
    scores = _recorded(tracker, artifact, authority.trust, notice) if tracker and authority else None
    if scores is not None:
        notice("skipped: this model was scored with these settings already")
        return Scored(scores, artifact, images_seen, name_and_digest, {}, None, None)
    before = _artifact(images_seen, model_digest, evaluator, prompts, stream, request, earlier=True)
    if tracker and before != artifact and before in tracker.names(FOLDER):
        notice("scored again: the bound of an earlier release was that of the smaller variance, not of the tighter one")
    connect()
    real = open_real(
        dataset,
        evaluator,
        config,
        storage,
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
        authority=authority,
        prompts=prompts,
        progress=display.counter("evaluate", "images"),
        notice=notice,
    )
    return Scored(
        done.scores,
        artifact,
        images_seen,
        name_and_digest,
        _pictures(done, model, prompts, storage, config.tracking.grid_images),
        _terms(done.likelihoods),
        int(time.time() * 1000),
    )


def find_scores(
    tracker: Tracker, spec: ModelSpec, model_digest: str, settings: Sampling, config: Config, storage: Storage
) -> Scores | None:
    """Return the scores that a run has of a model with the same settings, data and evaluator; None without any.

    Neither is the model loaded, but for networks that the settings name to guide it, nor an evaluator trained, nor
    anything written.

    Args:
        spec: description of the model.
        model_digest: of its published checkpoint.

    Raises:
        DatasetError, ConfigError: the data cannot be used to score the model.
    """
    dataset = read_dataset(spec.lineage.get("dataset_uri", config.data.uri), storage)
    check_fits(spec, dataset)
    evaluator = find_evaluator(config, dataset, storage)
    if evaluator is None:
        return None
    prompts = find_prompts(spec, dataset, config, storage)
    images_seen = int(spec.lineage.get("images_seen", 0))
    stream = stream_digest(dataset, read_quarantine(dataset.uri, storage))
    guides = references.guided(Model(spec, nn.Module()), settings, config.tracking.uri, storage)
    digest = _guided_digest(model_digest, guides, settings)
    artifact = _artifact(images_seen, digest, evaluator, prompts, stream, Request.of(config, settings))
    return _recorded(tracker, artifact, Trust.of(config.registry))


def _artifact(
    images_seen: int,
    model_digest: str,
    evaluator: Evaluator,
    prompts: Prompts | None,
    stream: str,
    request: Request,
    *,
    earlier: bool = False,
) -> str:
    """Return the name of the artifact of a run that has the scores of all this.

    Args:
        stream: digest of the data with their quarantine.
        earlier: whether it is that of an earlier release, whose bound was always of the smaller variance.
    """
    decisive: list[Any] = [model_digest, evaluator.digest, stream, request.n, request.seeds, request.likelihood_images]
    decisive += [] if prompts is None else [list(prompts.record().values())]
    decisive += [BOUND] if request.likelihood_images and not earlier else []
    key = hashlib.sha256(json.dumps([*decisive, request.sampling.key()]).encode()).hexdigest()[:16]
    return f"{FOLDER}/{images_seen:012d}-{key}.json"


def _suffix(artifact: str) -> str:
    """Return what the keys of an evaluation's pictures end with, where its run scores checkpoints otherwise."""
    return f"-{artifact.rpartition('-')[2][:8]}"


def evaluation_pictures(names: Iterable[str], artifact: str | None, images_seen: int) -> dict[str, str]:
    """Return key -> artifact of the pictures at a number of images seen; those of one evaluation, where it has its own.

    Args:
        names: artifacts of a run, its pictures among them.
        artifact: of the scores of the evaluation; None where it is not known, and the run's own pictures are meant.
    """
    found = tracking.pictures_at(names, images_seen)
    if artifact is None:
        return found
    suffix = _suffix(artifact)
    return found | {key.removesuffix(suffix): name for key, name in found.items() if key.endswith(suffix)}


def find_artifact(tracker: Tracker, scores: Scores, images_seen: int) -> str | None:
    """Return the artifact of a run that has these scores of its model; None without one."""
    for name in tracker.names(FOLDER):
        if name.startswith(f"{FOLDER}/{images_seen:012d}-"):
            with suppress(LookupError, TypeError, ValueError):  # those of a newer release may not be understood
                if read_scores(tracker, name) == scores:
                    return name
    return None


def _recorded(tracker: Tracker, artifact: str, trust: Trust, notice: Notice = no_notice) -> Scores | None:
    """Return the scores in an artifact of a run; None where it has none that somebody who is trusted has signed."""
    if artifact not in tracker.names(FOLDER):
        return None
    text = tracker.read_text(artifact)
    try:
        if _signature(artifact) not in tracker.names(SIGNATURES):
            raise SignatureError("they are not signed")
        signed = unseal(tracker.read_text(_signature(artifact)).encode(), artifact, trust)
        if signed["sha256"] != _sha256(text):
            raise SignatureError("they were changed after they were signed")
    except SignatureError as error:
        notice(f"scored again: the scores that the run has, {artifact}, are not believed: {error}")
        return None
    return Scores.from_plain(json.loads(text))


def _signature(artifact: str) -> str:
    """Return the name of the artifact that has the signature of scores."""
    return artifact.replace(FOLDER, SIGNATURES, 1)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_scores(tracker: Tracker, artifact: str) -> Scores:
    """Return the scores in an artifact of a run."""
    return Scores.from_plain(json.loads(tracker.read_text(artifact)))


def check_fits(spec: ModelSpec, dataset: Dataset) -> None:
    """Check that samples of a model can be compared with the images of a dataset.

    Raises:
        DatasetError: they have another shape, or the labels of one mean something else for the other.
    """
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    if spec.shape != shape:
        raise DatasetError(
            f"{dataset.uri} has images of shape {shape} and the model draws {spec.shape}: ingest the data at the "
            "model's size (data.image_size, data.channels), or name other data with data.uri"
        )
    if spec.classes and dataset.classes and spec.classes != dataset.classes:
        differing = [
            f"class {number} is {there!r} there and {here!r} in the model"
            for number, (here, there) in enumerate(zip(spec.classes, dataset.classes, strict=False))
            if here != there
        ] or [f"it has {len(dataset.classes)} classes and the model {len(spec.classes)}"]
        raise DatasetError(
            f"{dataset.uri} has other classes than the model: {differing[0]}; name other data with data.uri"
        )


def _guided_digest(model_digest: str, model: Model, settings: Sampling) -> str:
    """Return the digest of everything that draws: of the model, and of the networks that the settings name to guide it.

    Without any it is that of the model alone.
    """
    decisive: list[str] = []
    for setting in settings_of(type(settings.guidance)):
        if setting.reference and getattr(settings.guidance, setting.name) is not None:
            guide = getattr(model, setting.name)
            digest = weights_digest(guide) if isinstance(guide, Model) else tensors_digest(guide.state_dict())
            decisive += [setting.name, digest]
    return _sha256(json.dumps([model_digest, *decisive])) if decisive else model_digest


def weights_digest(model: Model) -> str:
    """Return the SHA-256 over the weights of a model that was not published by a run."""
    return tensors_digest(model.network.state_dict(), model.spec.to_json())


def _pictures(
    done: Evaluation, model: Model, prompts: Prompts | None, storage: Storage, most: int
) -> dict[str, NDArray[np.uint8]]:
    """Return pictures by their keys: some samples, and those nearest to a training image.

    The samples stand by class, or by caption where there are few different ones.
    """
    kinds, numbers = _kinds(done, model, prompts)
    shown = grid_choice(numbers, len(kinds), most)
    names = tuple(kinds[number] for number in numbers[shown[0]]) if kinds else ()
    images = read_images(done.plan, storage, model.spec.shape[0], shown.ravel())
    pictures = {FOLDER: class_grid(images, shown.shape[1], names)}
    return pictures if done.copies is None else pictures | {"nearest-training-images": done.copies.picture()}


def _kinds(done: Evaluation, model: Model, prompts: Prompts | None) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the kinds of samples of the first seed by their names, and the kind of each sample, int64 [n]."""
    plan, seed = done.plan, done.plan.seeds[0]
    rows = plan.rows(seed)
    if prompts is not None and rows is not None:
        first, numbers = prompts.captions.different
        if len(first) <= MAX_COLUMNS:
            return tuple(prompts.captions.texts[place] for place in first), numbers.numpy()[rows]
    labels = plan.labels(seed)
    return ((), np.zeros(plan.n, np.int64)) if labels is None else (model.spec.classes, labels)


def _terms(likelihoods: Likelihood | None) -> str | None:
    """Return the terms of the bound by timestep, as the JSON of an artifact."""
    if likelihoods is None:
        return None
    bounds = likelihoods.bounds
    terms = bounds.terms[bounds.tighter].mean(0).tolist()
    return tracking.to_json({"timesteps": bounds.timesteps.tolist(), "bits_per_dim": terms, "variance": bounds.tighter})
