"""Score the model of a MODEL reference, and record the scores in its MLflow run; what was scored before is read."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ddpm.generate import Sampling
from ddpm.model import Model, ModelSpec
from ddpm.tensor_files import tensors_digest
from pipelines import tracking
from pipelines.checkpoints import list_published, lookup, record_scores, references
from pipelines.checkpoints.references import Resolved
from pipelines.config import Config
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.likelihoods import Likelihood
from pipelines.evaluation.measure import Evaluation, evaluate
from pipelines.evaluation.plots import MAX_COLUMNS, class_grid, grid_choice
from pipelines.evaluation.recorded import Scored, recorded
from pipelines.evaluation.samples import SampledModel, SampleSpec, read_images
from pipelines.evaluation.scores import Scores
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Display, Notice, no_notice
from pipelines.signing import Authority, Trust
from pipelines.storage import Storage, layout
from pipelines.tracking import Tracker

BOUND = "the tighter bound"
"""The settings that decide the bound of scores, beside the request."""


class _NotMadeError(PipelineError):
    """Nothing was judged on the dataset yet."""


@dataclass(frozen=True)
class _Asked:
    """The scores that are asked for: of everything that draws, judged by everything that judges."""

    subject: SampledModel
    request: SampleSpec
    data: EvaluationData

    @classmethod
    def of(cls, model: Model, digest: str, settings: Sampling, data: EvaluationData) -> _Asked:
        """Return the scores of a model with the networks that guide it.

        Args:
            digest: of the model alone.

        Raises:
            DatasetError, ConfigError: the data cannot be used to score the model.
        """
        data.check(model.spec)
        return cls(subject_of(model, digest, settings, data), SampleSpec.of(data.config), data)

    @property
    def images_seen(self) -> int:
        """Images that the model has seen in its training."""
        return int(self.subject.model.spec.lineage.get("images_seen", 0))

    def artifact(self, *, earlier: bool = False) -> str:
        """Return the name of the artifact of a run that has them.

        Args:
            earlier: whether it is that of an earlier release, whose bound was always of the smaller variance.
        """
        asked, subject = self.request, self.subject
        prompts = subject.prompts
        decisive: list[Any] = [subject.digest, self.data.evaluator.digest, self.data.stream]
        decisive += [asked.n, asked.seeds, asked.likelihood_images]
        decisive += [] if prompts is None else [list(prompts.record().values())]
        decisive += [BOUND] if asked.likelihood_images and not earlier else []
        key = hashlib.sha256(json.dumps([*decisive, subject.sampling.key()]).encode()).hexdigest()[:16]
        return f"{layout.SCORES_RECORDED}/{self.images_seen:012d}-{key}.json"

    def found(self, tracker: Tracker, trust: Trust, notice: Notice = no_notice) -> Scores | None:
        """Return the scores where a run has them, signed by somebody who is trusted; else None, and say why."""
        scores = recorded(tracker, self.artifact(), trust, notice)
        before = self.artifact(earlier=True)
        if scores is None and before != self.artifact() and before in tracker.names(layout.SCORES_RECORDED):
            notice(
                "scored again: the bound of an earlier release was that of the smaller variance, not of the tighter one"
            )
        return scores


def score_and_record(
    resolved: Resolved,
    settings: Sampling,
    config: Config,
    display: Display,
    connect: Callable[[], None],
    dataset_uri: str | None = None,
) -> tuple[Scores, bool]:
    """Score a model, and record the scores in its run; errors are those of `score`.

    Args:
        settings: with which the samples are drawn.
        connect: connects this process to the Ray cluster; called only where something has to be computed.
        dataset_uri: of the data to compare with; by default, those that the model was trained on.

    Returns:
        The scores, and whether they were computed now.
    """
    authority = Authority.of(config.registry)
    uri = dataset_uri or resolved.model.spec.lineage.get("dataset_uri", config.data.uri)
    say = partial(display.stage, "evaluate")
    data = EvaluationData.of(uri, config, connect, say, display.counter("evaluate", "real images"))
    scored = score(resolved, settings, data, display, authority)
    tracker, published, spec = resolved.tracker, resolved.published, resolved.model.spec
    if tracker is None:
        return scored.scores, scored.fresh
    # Scores of other settings, data or judges stand beside its own, by which the best checkpoint is chosen.
    own = (
        published is not None
        and settings == spec.sampling
        and dataset_uri is None
        and scored.scores.stream_digest == judging_digest(spec, scored.scores.stream_digest)
        and lookup.scored_alike(config, tracker)
    )
    if own and published is not None:
        if scored.fresh or not scored.scores.metrics().items() <= published.scores.items():
            # They may be there, and not in the record: of an evaluation that was interrupted, or asked for otherwise.
            logged = tracking.checkpoint_models(tracker).get(scored.images_seen)
            scored.record(tracker, logged, authority)
            record_scores(tracker, published.images_seen, scored.scores.metrics())
    elif scored.fresh:
        of_run = [published] if published is not None else list_published(tracker, deleted=True)
        has_own = any(one.scores for one in of_run if one.images_seen == scored.images_seen)
        scored.record(tracker, None, authority, own=False, shown=not has_own)
    return scored.scores, scored.fresh


def score(
    resolved: Resolved, settings: Sampling, data: EvaluationData, display: Display, authority: Authority | None
) -> Scored:
    """Score a model, or read the scores that its run has for the same model, settings, data and evaluator.

    Args:
        settings: with which the samples are drawn.
        data: what judges the samples.
        authority: says whose stored scores and samples are believed, and signs samples; None to believe none.

    Raises:
        DatasetError, ConfigError: the data cannot be used to score the model.
    """
    config, storage, notice = data.config, data.storage, partial(display.stage, "evaluate")
    model = references.guided(resolved.model, settings, config.tracking.uri, storage)
    asked = _Asked.of(model, digest_of(resolved), settings, data)
    of_data = data.dataset.uri.rstrip("/").rsplit("/", 1)[-1], data.dataset.digest
    tracker = resolved.tracker
    scores = asked.found(tracker, authority.trust, notice) if tracker and authority else None
    if scores is not None:
        notice("skipped: this model was scored with these settings already")
        return Scored(scores, asked.artifact(), asked.images_seen, of_data, {}, None, None)
    request = asked.request
    n = request.n or data.real.test.count
    drawn = f"{n:,} samples" if len(request.seeds) == 1 else f"{len(request.seeds)} x {n:,} samples"
    notice(f"{drawn} at guidance scale {settings.guidance.scale:g}, judged by the {data.evaluator.kind}")
    images = display.counter("evaluate", "images")
    done = evaluate(asked.subject, request, data, authority=authority, progress=images, notice=notice)
    return Scored(
        done.scores,
        asked.artifact(),
        asked.images_seen,
        of_data,
        _pictures(done, asked.subject, config.tracking.grid_images),
        _terms(done.likelihoods),
        int(time.time() * 1000),
        done.files,
    )


def find_scores(
    tracker: Tracker, spec: ModelSpec, model_digest: str, settings: Sampling, config: Config
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

    def nothing_is_made() -> None:
        raise _NotMadeError("the evaluator of the dataset was not trained yet")

    uri = spec.lineage.get("dataset_uri", config.data.uri)
    data = EvaluationData.of(uri, config, connect=nothing_is_made)
    guides = references.guided(Model(spec, nn.Module()), settings, config.tracking.uri, Storage.of(config))
    try:
        return _Asked.of(guides, model_digest, settings, data).found(tracker, Trust.of(config.registry))
    except _NotMadeError:
        return None


def judging_digest(spec: ModelSpec, unknown: str) -> str:
    """Return the digest of the stream by which a model's own scores are made: of its data, or of what judges a mixture.

    Args:
        unknown: what to return for a model of an earlier release, which does not say.
    """
    lineage = spec.lineage
    return str(lineage.get("reference_digest", lineage.get("stream_digest", unknown)))


def subject_of(model: Model, model_digest: str, settings: Sampling, data: EvaluationData) -> SampledModel:
    """Return a model as what draws samples, under the digest of all networks that its settings name.

    Args:
        model: with these networks.
        model_digest: of the model alone, see `digest_of`.
    """
    decisive: list[str] = []
    for name in settings.guides:
        guide = getattr(model, name)
        decisive += [name, weights_digest(guide) if isinstance(guide, Model) else tensors_digest(guide.state_dict())]
    if decisive:
        model_digest = hashlib.sha256(json.dumps([model_digest, *decisive]).encode()).hexdigest()
    return SampledModel(model, model_digest, settings, data.prompts(model.spec))


def digest_of(resolved: Resolved) -> str:
    """Return the SHA-256 under which the weights of a model are known: of the published checkpoint where it is one."""
    return resolved.published.digest if resolved.published else weights_digest(resolved.model)


def weights_digest(model: Model) -> str:
    """Return the SHA-256 over the weights of a model that was not published by a run."""
    return tensors_digest(model.network.state_dict(), model.spec.to_json())


def _pictures(done: Evaluation, subject: SampledModel, most: int) -> dict[str, NDArray[np.uint8]]:
    """Return pictures by their keys: some samples, and those nearest to a training image.

    The samples stand by class, or by caption where there are few different ones.
    """
    kinds, numbers = _kinds(done, subject)
    shown = grid_choice(numbers, len(kinds), most)
    names = tuple(kinds[number] for number in numbers[shown[0]]) if kinds else ()
    images = read_images(done.files, subject.model.spec.shape[0], shown.ravel())
    pictures = {layout.SCORES_RECORDED: class_grid(images, shown.shape[1], names)}
    return pictures if done.copies is None else pictures | {"nearest-training-images": done.copies.picture()}


def _kinds(done: Evaluation, subject: SampledModel) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the kinds of samples of the first seed by their names, and the kind of each sample, int64 [n]."""
    plan, prompts = done.files.plan, subject.prompts
    seed = plan.seeds[0]
    rows = plan.rows(seed)
    if prompts is not None and rows is not None:
        first, numbers = prompts.captions.different
        if len(first) <= MAX_COLUMNS:
            return tuple(prompts.captions.texts[place] for place in first), numbers.numpy()[rows]
    labels = plan.labels(seed)
    return ((), np.zeros(plan.n, np.int64)) if labels is None else (subject.model.spec.classes, labels)


def _terms(likelihoods: Likelihood | None) -> str | None:
    """Return the terms of the bound by timestep, as the JSON of an artifact."""
    if likelihoods is None:
        return None
    bounds = likelihoods.bounds
    terms = bounds.terms[bounds.tighter].mean(0).tolist()
    return tracking.to_json({"timesteps": bounds.timesteps.tolist(), "bits_per_dim": terms, "variance": bounds.tighter})
