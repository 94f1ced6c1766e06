"""Score a model: draw samples on a Ray cluster, encode them, and compare them with the real images of its dataset."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm.model import Model
from ddpm.quality import Measured
from pipelines.environment.scratch import scratch_folder
from pipelines.evaluation.actors import draw, sampling_actors
from pipelines.evaluation.compare import Comparison
from pipelines.evaluation.copies import Copies, look_for_copies
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.likelihoods import BATCH as LIKELIHOOD_BATCH
from pipelines.evaluation.likelihoods import Bounds, Likelihood
from pipelines.evaluation.prompts import Prompts
from pipelines.evaluation.real import Real
from pipelines.evaluation.rows import Rows
from pipelines.evaluation.samples import Plan, Request, SampleFiles
from pipelines.evaluation.scores import Estimate, Scores
from pipelines.presentation.progress import Notice, Progress, no_notice, no_progress
from pipelines.remote.actors import ActorPool
from pipelines.signing import Authority

NOISE_IMAGES = 1_024
"""Images of noise, at most, of which the ceilings are."""


@dataclass(frozen=True)
class Evaluation:
    """Scores, and what they are of.

    Attributes:
        files: the samples that were drawn.
        likelihoods: of some test images; None where none was asked for.
        copies: what was found of copies of training images; None where there are too few images to say.
    """

    scores: Scores
    files: SampleFiles
    likelihoods: Likelihood | None
    copies: Copies | None


def evaluate(
    model: Model,
    model_digest: str,
    request: Request,
    data: EvaluationData,
    *,
    authority: Authority | None = None,
    prompts: Prompts | None = None,
    progress: Progress = no_progress,
    notice: Notice = no_notice,
) -> Evaluation:
    """Draw samples of a model on the Ray cluster and score them.

    Neither memory of this process nor that of an actor grows with the number of samples: features lie in files.

    Args:
        model: with the guiding networks that the settings need.
        model_digest: SHA-256 of its weights, under which its samples are kept.
        data: what judges the samples.
        authority: says whose stored samples are believed, and signs the new ones; None to draw all of them.
        prompts: captions that samples are drawn from; None for a model that is not on text, or data without captions.
    """
    real, evaluator = data.real, data.evaluator
    plan = Plan.of(model, model_digest, request, real, prompts)
    with tempfile.TemporaryDirectory(prefix="evaluation-", dir=scratch_folder()) as scratch:
        folder, units = Path(scratch), len(plan.units())
        with sampling_actors(model, evaluator, data.storage, request, units, prompts=prompts, notice=notice) as actors:
            files = SampleFiles(plan, data.storage, authority, notice)
            drawn = draw(actors, files, evaluator, model, folder, progress)
            ((_, noise),) = actors.map("noise", [(min(plan.n, NOISE_IMAGES), plan.seeds[0])])
            likelihoods = _likelihoods(actors, model, real, request)
        comparison = Comparison.of(plan, drawn, real, noise, folder)
        estimates = comparison.estimates(evaluator)
        copies = look_for_copies(comparison.train, comparison.test, drawn, plan.n)
        if likelihoods is not None:
            estimates["bits_per_dim"] = _mean(likelihoods.bounds.totals[likelihoods.bounds.tighter])
            estimates["bits_per_dim_ode"] = _mean(likelihoods.ode)
        if copies is not None:
            estimates |= copies.estimates()
        if prompts is not None and drawn.vectors is not None:
            estimates["prompt_accuracy"] = prompts.estimate(_prompt_accuracies(prompts, plan, drawn.vectors))
    scores = Scores(
        estimates=estimates,
        n=plan.n,
        seeds=plan.seeds,
        evaluator=evaluator.kind,
        evaluator_digest=evaluator.digest,
        features=evaluator.encoder.width,
        real_accuracy=evaluator.accuracy,
        dataset_digest=data.dataset.digest,
        stream_digest=real.stream_digest,
        real={"train": real.train.moments.count, "test": real.test.moments.count},
        sampling=request.sampling.to_json(),
        memorisation=None if copies is None else copies.to_plain(),
        samples=plan.folder,
        prompts=None if prompts is None else prompts.record(),
        bound_variance=None if likelihoods is None else likelihoods.bounds.tighter,
    )
    return Evaluation(scores, files, likelihoods, copies)


def _likelihoods(actors: ActorPool, model: Model, real: Real, request: Request) -> Likelihood | None:
    """Return the likelihood of test images."""
    if not request.likelihood_images:
        return None
    images, labels = real.held_out()
    images = images[: request.likelihood_images]
    labels = None if labels is None else labels[: len(images)]
    calls = []
    for first in range(0, len(images), LIKELIHOOD_BATCH):
        span = slice(first, first + LIKELIHOOD_BATCH)
        calls.append((images[span], None if labels is None else labels[span], first, request.seeds[0]))
    found = dict(actors.map("likelihood", calls))
    parts = [found[i] for i in range(len(calls))]
    return Likelihood(Bounds.joined([part.bounds for part in parts]), np.concatenate([part.ode for part in parts]))


def _prompt_accuracies(prompts: Prompts, plan: Plan, vectors: Rows) -> list[Measured]:
    """Return the share of samples whose caption matches best, of each noise seed."""
    found = []
    for place, seed in enumerate(plan.seeds):
        rows = plan.rows(seed)
        assert rows is not None
        share = prompts.accuracy(vectors, place * plan.n, rows, seed)
        assert share is not None
        found.append(share)
    return found


def _mean(values: NDArray[np.float64]) -> Estimate:
    """Return the estimate of a mean over images."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate.of([float(values.mean())], [error])
