"""What judges a sampling setting: one model, one evaluator, one set of noise seeds, shared by all trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.generate import SamplingSettings, to_uint8
from ddpm.interop import Model, ModelSpec, build_network
from ddpm.prediction import Conditioning
from ddpm.quality import FeatureMoments, Interval, bootstrap, frechet_distance, precision_recall
from pipelines.evaluation.features import EvaluatorNetwork, Features, extract

DRAWS = 40


@dataclass(frozen=True)
class Subject:
    """A model and what it is held against; picklable, and put into Ray's object store once for all trials.

    Attributes:
        spec: of the model.
        weights: of its network.
        evaluator: whose features judge.
        reference: moments of the real train split's features.
        real: features of the real test split [N, D], for precision and recall.
        labels: of the images that are drawn, in turn [N]; None for a model without classes.
    """

    spec: ModelSpec
    weights: Mapping[str, Tensor]
    evaluator: EvaluatorNetwork
    reference: FeatureMoments
    real: Tensor
    labels: Tensor | None

    def model(self, device: str = "cpu") -> Model:
        """The model with a network that counts."""
        network = build_network(self.spec.network, self.weights, device)
        return Model(self.spec, Counting(network))  # type: ignore[arg-type]


class Counting(nn.Module):
    """A network that counts the images it was evaluated on: what sampling costs, whatever the sampler."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.count = network, 0

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        """As the network's."""
        self.count += len(x_t)
        return self.network(x_t, t, cond)


@dataclass(frozen=True)
class Drawn:
    """Samples of a setting.

    Attributes:
        features: of them [N, D].
        correct: share that the evaluator takes for the class asked for, per sample, bool [N]; None without classes.
        pixels: the first of them, uint8 [M, H, W, C].
        evaluations: of the network, per image.
    """

    features: Tensor
    correct: Tensor | None
    pixels: Any
    evaluations: float

    def __add__(self, other: Drawn) -> Drawn:
        """Both together."""
        n, m = len(self.features), len(other.features)
        correct = None
        if self.correct is not None and other.correct is not None:
            correct = torch.cat([self.correct, other.correct])
        evaluations = (n * self.evaluations + m * other.evaluations) / (n + m)
        return Drawn(torch.cat([self.features, other.features]), correct, self.pixels, evaluations)


def draw(
    subject: Subject,
    model: Model,
    settings: SamplingSettings,
    numbers: Tensor,
    *,
    seed: int,
    keep: int = 0,
    batch_size: int = 64,
) -> Drawn:
    """The images of these numbers under a setting, judged; image i of a seed is the same beside any others."""
    network: Any = model.network
    before = network.count
    labels = None if subject.labels is None else subject.labels[numbers % len(subject.labels)]
    images = model.generate(labels, seed=seed, settings=settings, images=numbers, batch_size=batch_size)
    pixels = to_uint8(images)
    # Rounded to the 256 levels of a picture, because that is what a user of the model receives.
    rounded = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    found: Features = extract(subject.evaluator, rounded.cpu())
    correct = None if labels is None else found.predicted == labels
    return Drawn(found.features, correct, pixels[:keep].cpu().numpy(), (network.count - before) / len(numbers))


def distance_and_error(reference: FeatureMoments, features: Tensor) -> dict[str, float]:
    """Frechet distance of samples' features [N, D] to the reference, and its standard error by the bootstrap."""
    spread = interval(reference, features)
    return {
        "frechet_distance": spread.value,
        "standard_error": (spread.high - spread.low) / (2 * 1.96),
    }


def interval(reference: FeatureMoments, features: Tensor, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The distance with its confidence interval."""

    def distance(part: Tensor) -> float:
        return frechet_distance(reference, FeatureMoments.of(part))

    return bootstrap(distance, features, draws=draws, seed=seed)


def scores(subject: Subject, drawn: Drawn, *, full: bool) -> dict[str, float]:
    """What a trial reports.

    Args:
        full: whether precision and recall are taken too, which compare all pairs.
    """
    values = distance_and_error(subject.reference, drawn.features)
    values |= {"samples": float(len(drawn.features)), "evaluations": drawn.evaluations}
    if drawn.correct is not None:
        values["class_accuracy"] = drawn.correct.double().mean().item()
    if full and min(len(subject.real), len(drawn.features)) > 3:
        both = precision_recall(subject.real, drawn.features)
        values |= {"precision": both.precision, "recall": both.recall}
    return values


def hopeless(mine: Mapping[str, float], others: list[Mapping[str, float]], level: float = 2.33) -> bool:
    """Whether a setting is worse than another that costs no more, beyond chance.

    A one-sided z-test of the Frechet distances at equal numbers of samples of equal noise seeds, with the bootstrap's
    standard errors taken as independent, at 1 % (z > 2.33). At equal numbers the distances' bias is nearly the same.
    """
    for other in others:
        cheaper = other["evaluations"] <= mine["evaluations"] and other["samples"] == mine["samples"]
        error = math.hypot(mine["standard_error"], other["standard_error"])
        if cheaper and mine["frechet_distance"] - other["frechet_distance"] > level * error:
            return True
    return False


def rungs(samples: int, count: int) -> list[int]:
    """Growing numbers of samples at which a trial is judged: each twice the last, up to `samples`.

    Never fewer than 4, of which a covariance can be taken.
    """
    return sorted({max(samples >> (count - 1 - i), min(4, samples)) for i in range(count)})
