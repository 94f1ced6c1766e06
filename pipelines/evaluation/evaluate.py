"""Score a model: draw samples on a Ray cluster, encode them, and compare them with the real images of its dataset."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.environment.scratch import temporary_folder
from pipelines.evaluation.actors import SamplingActors
from pipelines.evaluation.compare import Comparison
from pipelines.evaluation.copies import Copies, look_for_copies
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.likelihoods import Likelihood
from pipelines.evaluation.samples import SampledModel, SampleFiles, SampleSpec
from pipelines.evaluation.scores import Estimate, Scores
from pipelines.presentation.progress import Notice, Progress, no_notice, no_progress
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
    subject: SampledModel,
    request: SampleSpec,
    data: EvaluationData,
    *,
    authority: Authority | None = None,
    progress: Progress = no_progress,
    notice: Notice = no_notice,
) -> Evaluation:
    """Draw samples of a model on the Ray cluster and score them.

    Neither memory of this process nor that of an actor grows with the number of samples: features lie in files.

    Args:
        data: what judges the samples.
        authority: says whose stored samples are believed, and signs the new ones; None to draw all of them.
    """
    real, evaluator, prompts = data.real, data.evaluator, subject.prompts
    with temporary_folder("evaluation") as folder:
        with SamplingActors(data, request, authority, notice) as actors:
            sampled = actors.draw(subject, folder, progress)
            plan, drawn = sampled.plan, sampled.rows
            noise = actors.noise(subject, min(plan.n, NOISE_IMAGES), plan.seeds[0])
            likelihoods = None
            if most := request.likelihood_images:
                images, labels = real.held_out()
                labels = None if labels is None else labels[:most]
                likelihoods = actors.likelihood(subject, images[:most], labels, plan.seeds[0])
        comparison = Comparison.of(plan, drawn, real, noise, folder)
        estimates = comparison.estimates(evaluator)
        copies = look_for_copies(comparison.train, comparison.test, drawn, plan.n)
        if likelihoods is not None:
            estimates["bits_per_dim"] = _mean(likelihoods.bounds.totals[likelihoods.bounds.tighter])
            estimates["bits_per_dim_ode"] = _mean(likelihoods.ode)
        if copies is not None:
            estimates |= copies.estimates()
        if prompts is not None and (found := sampled.prompt_accuracies(prompts)):
            estimates["prompt_accuracy"] = prompts.estimate(found)
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
        sampling=subject.sampling.to_json(),
        memorisation=None if copies is None else copies.to_plain(),
        samples=plan.folder,
        prompts=None if prompts is None else prompts.record(),
        bound_variance=None if likelihoods is None else likelihoods.bounds.tighter,
    )
    return Evaluation(scores, sampled.files, likelihoods, copies)


def _mean(values: NDArray[np.float64]) -> Estimate:
    """Return the estimate of a mean over images."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate.of([float(values.mean())], [error])
