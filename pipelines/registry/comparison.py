"""Compare two versions on samples of the same labels and noise, drawn for this comparison alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ddpm.model import load_model
from pipelines.checkpoints.references import guided
from pipelines.config import Config
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.measure import Measures, measure
from pipelines.evaluation.samples import SampledModel, SampleSpec
from pipelines.evaluation.scores import IMAGES_PER_FEATURE
from pipelines.presentation.progress import Display
from pipelines.registry.evidence import Evidence
from pipelines.registry.package import RegistryError

LEAST = 5_000
"""Samples of each model, by default, where the evaluator has few features."""


def gate_seed(model: str, alias: str, champion_digest: str, dry_run: bool = False) -> int:
    """Return the seed of all comparisons with one champion: no study or evaluation uses it, and the next one another.

    The samples of the champion are drawn once and kept, for every version that is compared with it.

    Args:
        dry_run: whether the comparison decides nothing, which has noise of its own.
    """
    text = f"{'dry run of the gate' if dry_run else 'gate'}|{model}|{alias}|{champion_digest}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def request_of(config: Config, features: int, seed: int) -> SampleSpec:
    """Return which samples the configuration asks for to compare two versions, by an evaluator of so many features."""
    n = config.registry.n or max(LEAST, IMAGES_PER_FEATURE * features)
    return replace(SampleSpec.of(config), n=n, seeds=(seed,), likelihood_images=0)


def open_data(evidence: Evidence, config: Config, display: Display, connect: Callable[[], None]) -> EvaluationData:
    """Return what judges samples of a version: its dataset, and the evaluator that scored it.

    Raises:
        RegistryError: the evaluator is another one now.
    """
    say, progress = partial(display.stage, "gate"), display.counter("gate", "real images")
    data = EvaluationData.of(evidence.dataset_uri, config, connect, say, progress)
    connect()
    if data.evaluator.digest != evidence.scores.evaluator_digest:
        raise RegistryError(
            f"the version was scored by the evaluator {evidence.scores.evaluator_digest[:12]} "
            f"({evidence.scores.evaluator}), and that of this configuration is {data.evaluator.digest[:12]} "
            f"({data.evaluator.kind}): set evaluation.evaluator and evaluation.weights to what scored it, or register "
            "the version again"
        )
    return data


def subject_of(folder: Path, evidence: Evidence, data: EvaluationData) -> SampledModel:
    """Return the model in the folder of a version, with its guiding networks and the settings that it serves."""
    model = load_model(folder)
    data.check(model.spec)
    settings = model.spec.sampling
    return SampledModel(
        guided(model, settings, data.config.tracking.uri, data.storage), evidence.served_digest, settings
    )


def compare(
    candidate: SampledModel, champion: SampledModel, request: SampleSpec, data: EvaluationData, display: Display
) -> tuple[Measures, Measures]:
    """Draw the samples of both models on the Ray cluster, and return what they say, in this order.

    Args:
        request: with one seed; each model is drawn with the settings that it serves.
        data: what judges the samples.
    """
    specs, prompts = [candidate.model.spec, champion.model.spec], None
    if specs[0].network.text_dim == specs[1].network.text_dim:  # both are on the same kind of text
        prompts = data.prompts(specs[0])
    both = {"champion": replace(champion, prompts=prompts), "candidate": replace(candidate, prompts=prompts)}
    found = measure(both, request, data, display, "gate")
    return found["candidate"], found["champion"]
