"""Compare two models on samples of the same labels and noise, drawn for this comparison alone."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ddpm.generate import Sampling
from ddpm.model import Model
from ddpm.quality import Measured
from pipelines.config import Config
from pipelines.display import Display
from pipelines.evaluation.actors import draw, sampling_actors
from pipelines.evaluation.compare import Distance, measured_accuracy
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.evaluators import Evaluator
from pipelines.evaluation.prompts import Prompts
from pipelines.evaluation.samples import Drawn, Plan, Request, SampleFiles
from pipelines.evaluation.scores import IMAGES_PER_FEATURE
from pipelines.scratch import scratch_folder
from pipelines.signing import Authority

LEAST = 5_000
"""Samples of each model, by default, where the evaluator has few features."""


@dataclass(frozen=True)
class Subject:
    """A model that is compared.

    Attributes:
        model: with the guiding networks that its settings need.
        digest: of its weights, under which its samples are kept.
        sampling: the settings that it serves.
    """

    model: Model
    digest: str
    sampling: Sampling


@dataclass(frozen=True)
class Compared:
    """Scores of two models on the same noise, with the influence of every sample.

    Attributes:
        measure: "frechet_distance" or "kid", of which less is better.
        candidate, champion: the score of each.
        candidate_accuracy, champion_accuracy: share of samples of the class asked for, else of those that match their
            prompt best; None without classes and prompts.
    """

    measure: str
    candidate: Measured
    champion: Measured
    candidate_accuracy: Measured | None = None
    champion_accuracy: Measured | None = None


def gate_seed(model: str, alias: str, champion_digest: str, dry_run: bool = False) -> int:
    """Return the seed of all comparisons with one champion: no study or evaluation uses it, and the next one another.

    The samples of the champion are drawn once and kept, for every version that is compared with it.

    Args:
        dry_run: whether the comparison decides nothing, which has noise of its own.
    """
    text = f"{'dry run of the gate' if dry_run else 'gate'}|{model}|{alias}|{champion_digest}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def request_of(config: Config, features: int, seed: int) -> Request:
    """Return which samples the configuration asks for to compare two versions, by an evaluator of so many features."""
    n = config.registry.n or max(LEAST, IMAGES_PER_FEATURE * features)
    return replace(Request.of(config, Sampling()), n=n, seeds=(seed,), likelihood_images=0)


def compare(
    candidate: Subject,
    champion: Subject,
    request: Request,
    data: EvaluationData,
    prompts: Prompts | None,
    display: Display,
    authority: Authority,
) -> Compared:
    """Draw the samples of both models on the Ray cluster, and measure them against the real train images.

    Samples that are stored are not drawn again, so an interrupted comparison goes on where it was.

    Args:
        request: with one seed; each model is drawn with the settings that it serves.
        data: what judges the samples.
        prompts: captions that samples of models on text are drawn from.
        authority: says whose stored samples are believed, and signs the new ones.
    """
    with tempfile.TemporaryDirectory(prefix="comparison-", dir=scratch_folder()) as scratch:
        found, distance = [], Distance.of(data.real)
        for name, subject in (("champion", champion), ("candidate", candidate)):
            folder = Path(scratch) / name
            folder.mkdir()
            asked = replace(request, sampling=subject.sampling)
            plan, say = (
                Plan.of(subject.model, subject.digest, asked, data.real, prompts),
                partial(display.stage, "gate"),
            )
            pool = sampling_actors(
                subject.model, data.evaluator, data.storage, asked, len(plan.units()), prompts=prompts, notice=say
            )
            with pool as actors:
                progress = display.counter("gate", f"{name} images")
                files = SampleFiles(plan, data.storage, authority, say)
                drawn = draw(actors, files, data.evaluator, subject.model, folder, progress)
            found.append(_measure(drawn, plan, distance, data.evaluator, prompts))
    (theirs, their_accuracy), (ours, our_accuracy) = found
    return Compared(distance.measure, ours, theirs, our_accuracy, their_accuracy)


def _measure(
    drawn: Drawn, plan: Plan, distance: Distance, evaluator: Evaluator, prompts: Prompts | None
) -> tuple[Measured, Measured | None]:
    """Return the distance that decides, and the accuracy of the samples of one model."""
    accuracy, labels = None, plan.labels(plan.seeds[0])
    if labels is not None and evaluator.labels and drawn.probabilities is not None:
        accuracy = measured_accuracy(drawn.probabilities, labels, 0)
    elif prompts is not None and drawn.vectors is not None:
        rows = plan.rows(plan.seeds[0])
        assert rows is not None
        accuracy = prompts.accuracy(drawn.vectors, 0, rows, plan.seeds[0])
    return distance(torch.from_numpy(drawn.features.read(0, plan.n))), accuracy
