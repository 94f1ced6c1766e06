"""Score a model against the real images of its dataset, or measure several on the same numbers and noise.

Samples are drawn on a Ray cluster in both cases, and encoded there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.quality import Measured
from pipelines.environment.scratch import temporary_folder
from pipelines.evaluation.actors import SamplingActors
from pipelines.evaluation.compare import Comparison, Distance, measured_accuracy
from pipelines.evaluation.copies import Copies, look_for_copies
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.likelihoods import Likelihood, held_out_images
from pipelines.evaluation.samples import SampledModel, SampleFiles, SampleSpec
from pipelines.evaluation.scores import Estimate, Scores
from pipelines.presentation.progress import Display, Notice, Progress, no_notice, no_progress
from pipelines.signing import Authority


@dataclass(frozen=True)
class Measures:
    """Scores of samples of a model, with the influence of every sample.

    Attributes:
        measure: "frechet_distance" or "kid".
        distance: by that measure, of which less is better, see `Distance`.
        class_accuracy: share of samples of the class asked for; None without classes that the evaluator knows.
        prompt_accuracy: share of samples that match their prompt best; None without prompts.
    """

    measure: Literal["frechet_distance", "kid"]
    distance: Measured
    class_accuracy: Measured | None = None
    prompt_accuracy: Measured | None = None

    @property
    def accuracy(self) -> Measured | None:
        """Share of samples that are what was asked for: of the class, else by the prompt; None without either."""
        return self.prompt_accuracy if self.class_accuracy is None else self.class_accuracy


@dataclass(frozen=True, kw_only=True)
class MeasuredSamples(Measures):
    """Scores of samples of a model, and the samples.

    Attributes:
        features: of the samples [N, D].
        evaluations: network evaluations of an image.
        files: that hold the samples.
        bound: of real images, in bits per dimension; None where none was asked for.
    """

    features: Tensor
    evaluations: float
    files: SampleFiles
    bound: Measured | None


def measure(
    subjects: Mapping[str, SampledModel],
    request: SampleSpec,
    data: EvaluationData,
    display: Display,
    stage: str,
    held_out: tuple[Tensor, Conditioning | None] | None = None,
) -> dict[str, MeasuredSamples]:
    """Draw samples of each subject on the Ray cluster, and measure them against the real train images.

    Samples that are stored are not drawn again, so what was interrupted goes on where it was.

    Args:
        subjects: by their names, which progress is shown under.
        request: with one seed.
        data: what judges the samples; its configuration says whose stored samples are believed.
        stage: that shows what is done.
        held_out: real images [N, C, H, W] in [-1, 1] and what they are of, for the bound; None for no bound.
    """
    found, distance, authority = {}, Distance.of(data.real), Authority.of(data.config.registry)
    with (
        temporary_folder("measures") as scratch,
        SamplingActors(data, request, authority, partial(display.stage, stage), subjects.values()) as actors,
    ):
        for number, (name, subject) in enumerate(subjects.items()):
            (folder := scratch / str(number)).mkdir()
            sampled = actors.draw(subject, folder, display.counter(stage, f"{name} images"))
            plan, drawn, by_class = sampled.plan, sampled.rows, None
            features, labels = torch.from_numpy(drawn.features.read(0, plan.n)), plan.labels(plan.seeds[0])
            if labels is not None and data.evaluator.labels and drawn.probabilities is not None:
                by_class = measured_accuracy(drawn.probabilities, labels, 0)
            found[name] = MeasuredSamples(
                distance.measure,
                distance(features),
                by_class,
                next(iter(sampled.prompt_accuracies(subject.prompts)), None),
                features=features,
                evaluations=actors.evaluations(subject, plan),
                files=sampled.files,
                bound=held_out and Measured.mean(actors.bound(subject, *held_out, request.seeds[0])),
            )
    return found


NOISE_IMAGES = 1_024
"""Images of noise, at most, that the ceilings are computed from."""


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
        with SamplingActors(data, request, authority, notice, [subject]) as actors:
            sampled = actors.draw(subject, folder, progress)
            plan, drawn = sampled.plan, sampled.rows
            noise = actors.noise(subject, min(plan.n, NOISE_IMAGES), plan.seeds[0])
            likelihoods = None
            if most := request.likelihood_images:
                held_out = held_out_images(real, None if prompts is None else prompts.held_out, most)
                likelihoods = actors.likelihood(subject, *held_out, plan.seeds[0])
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
