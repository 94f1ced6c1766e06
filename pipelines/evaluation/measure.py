"""Measure several models, or settings of one, on samples of the same labels and noise, so that they can be compared."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from ddpm.generate import Sampling
from ddpm.model import Model
from ddpm.quality import Measured
from pipelines.environment.scratch import scratch_folder
from pipelines.evaluation.actors import draw, sampling_actors
from pipelines.evaluation.compare import Distance, measured_accuracy
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.evaluators import Evaluator
from pipelines.evaluation.prompts import Prompts
from pipelines.evaluation.samples import Drawn, Plan, Request, SampleFiles
from pipelines.presentation.progress import Display
from pipelines.signing import Authority


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        model: with the guiding networks that its settings need.
        digest: of all that draws, under which its samples are kept.
        sampling: the settings that it is drawn with.
    """

    model: Model
    digest: str
    sampling: Sampling


@dataclass(frozen=True)
class Measures:
    """What samples of a model say, with the influence of every sample.

    Attributes:
        measure: "frechet_distance" or "kid".
        distance: by that measure, of which less is better, see `Distance`.
        accuracy: share of samples of the class asked for, else of those that match their prompt best; None without
            classes and prompts.
    """

    measure: Literal["frechet_distance", "kid"]
    distance: Measured
    accuracy: Measured | None


def measure(
    subjects: Mapping[str, Subject],
    request: Request,
    data: EvaluationData,
    prompts: Prompts | None,
    authority: Authority,
    display: Display,
    stage: str,
) -> dict[str, Measures]:
    """Draw samples of each subject on the Ray cluster, and measure them against the real train images.

    Samples that are stored are not drawn again, so what was interrupted goes on where it was.

    Args:
        subjects: by their names, which progress is shown under.
        request: with one seed; each subject is drawn with its own settings.
        data: what judges the samples.
        prompts: captions that samples of models on text are drawn from.
        authority: says whose stored samples are believed, and signs the new ones.
        stage: that shows what is done.
    """
    found, distance, say = {}, Distance.of(data.real), partial(display.stage, stage)
    with tempfile.TemporaryDirectory(prefix="measures-", dir=scratch_folder()) as scratch:
        for number, (name, subject) in enumerate(subjects.items()):
            (folder := Path(scratch) / str(number)).mkdir()
            asked = replace(request, sampling=subject.sampling)
            plan = Plan.of(subject.model, subject.digest, asked, data.real, prompts)
            pool = sampling_actors(
                subject.model, data.evaluator, data.storage, asked, len(plan.units()), prompts=prompts, notice=say
            )
            with pool as actors:
                files = SampleFiles(plan, data.storage, authority, say)
                drawn = draw(
                    actors, files, data.evaluator, subject.model, folder, display.counter(stage, f"{name} images")
                )
            features = torch.from_numpy(drawn.features.read(0, plan.n))
            accuracy = _accuracy(drawn, plan, data.evaluator, prompts)
            found[name] = Measures(distance.measure, distance(features), accuracy)
    return found


def _accuracy(drawn: Drawn, plan: Plan, evaluator: Evaluator, prompts: Prompts | None) -> Measured | None:
    """Return the share of samples of one model that are what was asked for."""
    seed = plan.seeds[0]
    labels = plan.labels(seed)
    if labels is not None and evaluator.labels and drawn.probabilities is not None:
        return measured_accuracy(drawn.probabilities, labels, 0)
    if prompts is not None and drawn.vectors is not None:
        rows = plan.rows(seed)
        assert rows is not None
        return prompts.accuracy(drawn.vectors, 0, rows, seed)
    return None
