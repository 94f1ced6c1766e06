"""Measure models, or settings of one, on samples of the same numbers and noise, so that they can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.quality import Measured
from pipelines.environment.scratch import temporary_folder
from pipelines.evaluation.actors import SamplingActors
from pipelines.evaluation.compare import Distance, measured_accuracy
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.samples import SampledModel, SampleFiles, SampleSpec
from pipelines.presentation.progress import Display
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
        SamplingActors(data, request, authority, partial(display.stage, stage)) as actors,
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
