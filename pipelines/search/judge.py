"""Judges of the trials of a study, which all use the same noise, labels and captions.

Trials of sampling settings are drawn from one model, those of trainings from the average of their weights, at given
numbers of images and within the training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling
from ddpm.model import Model, ModelSpec
from ddpm.models.classifier import NoisyClassifier
from ddpm.quality import FeatureMoments, Measured, precision_recall
from pipelines.evaluation.compare import NEIGHBOURS, measured_frechet
from pipelines.evaluation.drawing import JudgedModel, counted
from pipelines.evaluation.evaluators import Evaluator, FeatureEncoder
from pipelines.evaluation.real import Real
from pipelines.evaluation.samples import balanced_labels
from pipelines.shards.captions import Captions
from pipelines.storage import Storage, join, layout
from pipelines.training.loop.collectives import all_gather_items, rank_indices, this_rank
from pipelines.training.loop.state import TrainingState, ema_weights


@dataclass(frozen=True)
class Reference:
    """Features of the real images with which trials are compared.

    Attributes:
        moments: of the features of the train images.
        test: features of test images [N, D], for precision and recall.
    """

    moments: FeatureMoments
    test: Tensor

    @classmethod
    def of(cls, real: Real) -> Reference:
        """Return it from what is stored of the real images."""
        return cls(real.train.moments, real.test_features(NEIGHBOURS))

    def scores(
        self, features: Tensor, class_accuracy: Measured | None, evaluations: float
    ) -> tuple[dict[str, float], Tensor]:
        """Return the scores of samples [N, D], and the influence of each on the distance, for `hopeless`."""
        distance = measured_frechet(self.moments, features)
        values = {"frechet_distance": distance.value, "standard_error": distance.standard_error}
        values |= {"samples": float(len(features)), "evaluations": evaluations}
        if class_accuracy is not None:
            values["class_accuracy"] = class_accuracy.value
        if min(len(self.test), len(features)) > 3:
            both = precision_recall(self.test, features)
            values |= {"precision": both.precision, "recall": both.recall}
        return values, distance.influence


@dataclass(frozen=True)
class TrialSubject:
    """The model of a study and the data that score it; picklable, put into Ray's object store once for all trials.

    Attributes:
        model: the model that is sampled, on the CPU.
        evaluator: the network whose features are compared, with its record.
        reference: the real images.
        cond: classes and captions that images are drawn from; see `asked_for`.
        guides: reference -> classifier or weaker model that a setting may name.
    """

    model: Model
    evaluator: Evaluator
    reference: Reference
    cond: Conditioning | None
    guides: Mapping[str, NoisyClassifier | Model] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Model,
        evaluator: Evaluator,
        real: Real,
        guides: Mapping[str, NoisyClassifier | Model],
        cond: Conditioning | None,
    ) -> TrialSubject:
        """Return a model with what the evaluator says of the real images that score it."""
        alone = replace(model, classifier=None, weak=None).to("cpu")
        return cls(alone, evaluator, Reference.of(real), cond, guides)

    def guided(self, settings: Sampling) -> Model:
        """Return the model with the guides that settings name."""
        found: Any = {name: self.guides.get(reference) for name, reference in settings.guides.items()}
        return replace(self.model, **found)

    def draw(self, settings: Sampling, image_ids: Tensor, seed: int) -> TrialSamples:
        """Draw the images of these numbers in this process, and judge them; its networks stay on the device.

        Image i of a seed does not depend on the other images.

        Args:
            settings: sampling settings; `classifier` and `weak` name guides of the subject.
            image_ids: numbers of the images, int64 [N].
            seed: of the noise.
        """
        judged, correct = JudgedModel.here(self.guided(settings), self.evaluator.encoder), None
        cond = judged.condition(self.cond, image_ids)
        with counted(judged.model) as evaluations:
            found = judged.encoded(cond, image_ids, settings, seed)
        labels = None if cond is None or not self.evaluator.labels else cond.label
        if labels is not None and found.probabilities is not None:
            correct = found.probabilities.argmax(1) == labels.cpu()
        return TrialSamples(found.features, correct, evaluations() / len(image_ids))


@dataclass(frozen=True)
class TrialSamples:
    """Samples that were drawn with one setting.

    Attributes:
        features: features of the samples [N, D].
        correct: whether the evaluator assigns a sample to the requested class, bool [N]; None where the model or the
            evaluator has no classes.
        evaluations: network evaluations per image.
    """

    features: Tensor
    correct: Tensor | None
    evaluations: float

    @property
    def accuracy(self) -> Measured | None:
        """Share of samples of the requested class; None where the model or the evaluator has no classes."""
        return None if self.correct is None else Measured.mean(self.correct)

    def __add__(self, other: TrialSamples) -> TrialSamples:
        """Return the samples of both."""
        n, m = len(self.features), len(other.features)
        correct = None
        if self.correct is not None and other.correct is not None:
            correct = torch.cat([self.correct, other.correct])
        evaluations = (n * self.evaluations + m * other.evaluations) / (n + m)
        return TrialSamples(torch.cat([self.features, other.features]), correct, evaluations)


def asked_for(real: Real, captions: Captions | None, samples: int, seed: int) -> Conditioning | None:
    """Return the classes and captions that the images of all trials are drawn from, up to `samples` of them.

    Of N, image i has that of number i modulo N, or what a trial's network takes of it.

    Args:
        captions: of test images; None for data without captions, whose classes have the proportions of the train split.
        seed: of their order.
    """
    if captions is not None:
        return captions.shuffled(seed).condition(torch.arange(min(samples, len(captions))), labels=True)
    if counts := real.train.class_counts:
        return Conditioning(label=torch.from_numpy(balanced_labels(real.test.count, counts, seed)))
    return None


def hopeless(mine: Mapping[str, Any], others: Iterable[Mapping[str, Any]], level: float = 2.33) -> bool:
    """Return whether a setting is significantly worse than another one that needs no more network evaluations.

    A one-sided z-test of the difference of the Frechet distances at equal numbers of samples, at 1 % (z > 2.33). The
    noise is the same in both, so the standard error is that of the paired difference, from the influence of each
    sample. At equal numbers the distances' bias is nearly the same. This saves time and is no finding, so it is not
    corrected for the number of other settings.

    Args:
        mine: `frechet_distance`, `evaluations`, `samples`, and the `influence` of each sample of the setting.
        others: the same of the other settings.
        level: of z above which a difference is significant.
    """
    for other in others:
        if other["evaluations"] <= mine["evaluations"] and other["samples"] == mine["samples"]:
            worse = _measured(mine) - _measured(other)
            if worse.value > level * worse.standard_error:
                return True
    return False


def _measured(reported: Mapping[str, Any]) -> Measured:
    """Return the Frechet distance that a trial reported; what came through Ray is read-only, and copied."""
    return Measured(reported["frechet_distance"], torch.tensor(reported["influence"], dtype=torch.float64))


def rungs(samples: int, count: int) -> list[int]:
    """Return the growing numbers of samples at which a trial is judged: each is twice the one before, up to `samples`.

    None is below 4, which a covariance needs.
    """
    return sorted({max(samples >> (count - 1 - i), min(4, samples)) for i in range(count)})


@dataclass(frozen=True)
class RungJudge:
    """Scores the averaged weights of a training at given numbers of images; see `pipelines.training.shell.Judge`.

    The scores are written as files beside the run's checkpoints, so that a resumed trial keeps its earlier scores.

    Attributes:
        rungs: images seen at which the weights are scored.
        samples: number of images that are drawn at each rung.
        cond: classes and captions that images are drawn from; see `asked_for`.
        encoder: the network whose features are compared.
        reference: moments of the features of the real images that are the reference.
        held_out: real test images for the bound, [B, C, H, W] in [-1, 1], with their classes and captions, if any;
            B = 0 for no bound.
        seed: seed of the noise.
        storage: where the scores are written.
        uri: the folder of the scores.
    """

    rungs: tuple[int, ...]
    samples: int
    cond: Conditioning | None
    encoder: FeatureEncoder
    reference: FeatureMoments
    held_out: tuple[Tensor, Conditioning | None]
    seed: int
    storage: Storage
    uri: str

    def due(self, before: int, seen: int) -> bool:
        """Return whether a rung lies in (before, seen]."""
        return any(before < rung <= seen for rung in self.rungs)

    def __call__(self, state: TrainingState, spec: ModelSpec, device: torch.device) -> None:
        """Draw images and compute scores, with the work divided among the ranks; rank 0 writes the scores."""
        rank = this_rank()
        real, of_real = self.held_out
        with ema_weights(state) as network, torch.no_grad():
            judged = JudgedModel(Model(spec, network), self.encoder.to(device), device)
            image_ids = rank_indices(self.samples, rank)
            own = judged.encoded(judged.condition(self.cond, image_ids), image_ids, spec.sampling, self.seed).features
            features = all_gather_items(own.to(device), self.samples).cpu()
            distance = measured_frechet(self.reference, features)
            scores = {"frechet_distance": distance.value, "standard_error": distance.standard_error}
            if len(real):
                bound = judged.bound(real, of_real, rank_indices(len(real), rank), self.seed)
                scores["bits_per_dim"] = all_gather_items(bound, len(real)).mean().item()
        if rank == 0:
            scores |= {"images_seen": float(state.images_seen), "samples": float(self.samples)}
            uri = join(self.uri, layout.numbered(state.images_seen))
            self.storage.write(uri, json.dumps(scores).encode())
