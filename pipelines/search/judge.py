"""What judges a sampling setting: one model, one evaluator, one set of noise seeds, shared by all trials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm.generate import SamplingSettings, to_uint8
from ddpm.interop import Model
from ddpm.models.classifier import NoisyClassifier
from ddpm.quality import FeatureMoments, Interval, bootstrap, frechet_distance, halves, precision_recall
from pipelines.evaluation.features import EvaluatorNetwork, Features, extract

DRAWS = 40


@dataclass(frozen=True)
class Subject:
    """A model and what it is held against; picklable, and put into Ray's object store once for all trials.

    Attributes:
        model: that is sampled, on the CPU.
        guides: classifiers and weaker models that a setting may name, by reference.
        evaluator: whose features judge.
        reference: moments of the real train split's features.
        real: features of the real test split [N, D], for precision and recall.
        labels: of the images that are drawn, in turn [N]; None for a model without classes.
    """

    model: Model
    evaluator: EvaluatorNetwork
    reference: FeatureMoments
    real: Tensor
    labels: Tensor | None
    guides: Mapping[str, NoisyClassifier | Model] = field(default_factory=dict)


class Meter:
    """Counts what networks are evaluated on, in evaluations of one of them: what sampling costs, whatever the sampler.

    A network that guides counts as its share of the floating-point operations of one evaluation of the model's own, a
    classifier's way back included.
    """

    def __init__(self, model: Model) -> None:
        self.count = 0.0
        self._shape = model.spec.shape
        self._unit = self._flops(model.network)
        self._watch(model.network, 1.0)

    def guide(self, guide: NoisyClassifier | Model) -> None:
        """Count one that guides, too."""
        network = guide.network if isinstance(guide, Model) else guide
        self._watch(network, self._flops(network, backward=isinstance(guide, NoisyClassifier)) / self._unit)

    def _watch(self, network: nn.Module, cost: float) -> None:
        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.count += cost * len(inputs[0])

        network.register_forward_pre_hook(count)

    def _flops(self, network: nn.Module, backward: bool = False) -> int:
        """Floating-point operations of one evaluation of one image."""
        device = next(network.parameters()).device
        x = torch.zeros(1, *self._shape, device=device, requires_grad=backward)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            output = network(x, torch.zeros(1, device=device))
            if backward:
                output.sum().backward()
        return counter.get_total_flops()


class Painter:
    """Draws images of a subject under any setting, in one process that has loaded it once; counts what that costs."""

    def __init__(self, subject: Subject) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.subject, self.device = subject, device
        self.model = subject.model.to(device)
        self.guides = {name: guide.to(device) for name, guide in subject.guides.items()}
        self.meter = Meter(self.model)
        for guide in self.guides.values():
            self.meter.guide(guide)

    def draw(
        self, settings: SamplingSettings, numbers: Tensor, *, seed: int, keep: int = 0, batch_size: int = 64
    ) -> Drawn:
        """The images of these numbers, judged; image i of a seed is the same beside any others.

        Args:
            settings: whose `classifier` and `weak` name guides of the subject.
            numbers: of the images, int64 [N].
            seed: of the noise.
            keep: images whose pixels are kept.
            batch_size: images at once.
        """
        subject, before = self.subject, self.meter.count
        model: Any = replace(
            self.model,
            classifier=self.guides.get(settings.classifier or ""),  # type: ignore[arg-type]
            weak=self.guides.get(settings.weak or ""),  # type: ignore[arg-type]
        )
        labels = None if subject.labels is None else subject.labels[numbers % len(subject.labels)]
        images = model.generate(
            None if labels is None else labels.to(self.device),
            seed=seed,
            settings=settings,
            images=numbers.to(self.device),
            batch_size=batch_size,
        )
        pixels = to_uint8(images).cpu()
        # Rounded to the 256 levels of a picture, because that is what a user of the model receives.
        found: Features = extract(subject.evaluator, pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
        correct = None if labels is None else found.predicted == labels
        evaluations = (self.meter.count - before) / len(numbers)
        return Drawn(found.features, correct, pixels[:keep].numpy(), evaluations)


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


def distance_and_error(reference: FeatureMoments, features: Tensor) -> tuple[dict[str, float], Tensor]:
    """Frechet distance of samples' features [N, D] to the reference, and its standard error; the distances of halves.

    The halves, [DRAWS], are the same for any features of the same N: what two settings differ by in them is paired.
    """
    distance = partial(_distance, reference)
    drawn = halves(distance, features, draws=DRAWS, seed=0)
    return {"frechet_distance": distance(features), "standard_error": drawn.std().item()}, drawn


def interval(reference: FeatureMoments, features: Tensor, *, draws: int, seed: int = 0) -> Interval:
    """The distance with its confidence interval."""
    return bootstrap(partial(_distance, reference), features, draws=draws, seed=seed)


def gain(reference: FeatureMoments, before: Tensor, after: Tensor, *, draws: int, seed: int = 0) -> Interval:
    """By how much the distance of features [N, D] falls from one setting to another, on the same noise."""

    def fall(both: Tensor) -> float:
        return _distance(reference, both[:, 0]) - _distance(reference, both[:, 1])

    return bootstrap(fall, torch.stack([before, after], dim=1), draws=draws, seed=seed)


def _distance(reference: FeatureMoments, features: Tensor) -> float:
    return frechet_distance(reference, FeatureMoments.of(features))


def scores(subject: Subject, drawn: Drawn) -> tuple[dict[str, float], Tensor]:
    """What a trial reports, and the distances of halves that `hopeless` compares."""
    values, distances = distance_and_error(subject.reference, drawn.features)
    values |= {"samples": float(len(drawn.features)), "evaluations": drawn.evaluations}
    if drawn.correct is not None:
        values["class_accuracy"] = drawn.correct.double().mean().item()
    if min(len(subject.real), len(drawn.features)) > 3:
        both = precision_recall(subject.real, drawn.features)
        values |= {"precision": both.precision, "recall": both.recall}
    return values, distances


def hopeless(mine: Mapping[str, Any], others: Iterable[Mapping[str, Any]], level: float = 2.33) -> bool:
    """Whether a setting is worse than another that costs no more, beyond chance.

    A one-sided z-test of the difference of the Frechet distances at equal numbers of samples, at 1 % (z > 2.33). The
    noise is the same in both, so the difference's standard error is that of paired halves. At equal numbers the
    distances' bias is nearly the same.

    Args:
        mine: its `frechet_distance`, `evaluations`, `samples`, and the distances of its `halves`.
        others: those of the others.
    """
    for other in others:
        if other["evaluations"] <= mine["evaluations"] and other["samples"] == mine["samples"]:
            error = (torch.as_tensor(mine["halves"]) - torch.as_tensor(other["halves"])).std().item()
            if mine["frechet_distance"] - other["frechet_distance"] > level * error:
                return True
    return False


def rungs(samples: int, count: int) -> list[int]:
    """Growing numbers of samples at which a trial is judged: each twice the last, up to `samples`.

    Never fewer than 4, of which a covariance can be taken.
    """
    return sorted({max(samples >> (count - 1 - i), min(4, samples)) for i in range(count)})
