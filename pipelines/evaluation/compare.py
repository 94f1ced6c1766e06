"""Compare the features of samples with those of real images: every score with its interval, floor and ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.quality import (
    FeatureMoments,
    FrechetInfluence,
    Measured,
    density_coverage,
    frechet_distance,
    measured_diversity,
    measured_inception_score,
    measured_kid,
    measured_precision_recall,
)
from pipelines.environment.scratch import temporary_folder
from pipelines.evaluation.evaluators.base import Evaluator
from pipelines.evaluation.real import Real, RealRows
from pipelines.evaluation.rows import Rows
from pipelines.evaluation.samples import DrawnRows, SamplePlan
from pipelines.evaluation.scores import Estimate

NEIGHBOURS = 10_000
"""Images of each side, at most, that are compared one by one."""
NEAREST = 6
"""Images of each side, at least: precision and density need the five nearest neighbours of an image."""
FRECHET_FEATURES = 256
"""Features above which two models are compared by the kernel distance: of so many, a covariance needs more samples."""


@dataclass(frozen=True, eq=False)
class Distance:
    """The distance of samples to real images by which models and settings are compared with each other.

    Attributes:
        moments: of the features of the real images.
        real: features of real images [N, D] for the kernel distance; None where the Frechet distance decides.
    """

    moments: FeatureMoments
    real: Tensor | None

    @classmethod
    def of(cls, real: Real) -> Distance:
        """Return the distance to the reference images: the kernel distance above `FRECHET_FEATURES` features."""
        if real.width <= FRECHET_FEATURES:
            return cls(real.train.moments, None)
        with temporary_folder("real") as scratch:
            return cls(real.train.moments, real.reference(scratch, NEIGHBOURS))

    @property
    def measure(self) -> Literal["frechet_distance", "kid"]:
        """Name of the score."""
        return "frechet_distance" if self.real is None else "kid"

    def __call__(self, features: Tensor) -> Measured:
        """Return the distance of samples with features [N, D]."""
        return measured_frechet(self.moments, features) if self.real is None else measured_kid(self.real, features)


@dataclass(frozen=True)
class Comparison:
    """Samples, real images and images of noise, as an evaluator sees them.

    Attributes:
        plan: which samples were drawn.
        drawn: their rows, one noise seed after another.
        real: moments of the real splits.
        train, test: rows of the real splits.
        reference: features of train images that models are compared with, [N, D], N <= `NEIGHBOURS`.
        noise: features of images of noise [M, D].
    """

    plan: SamplePlan
    drawn: DrawnRows
    real: Real
    train: RealRows
    test: RealRows
    reference: Tensor
    noise: Tensor

    @classmethod
    def of(cls, plan: SamplePlan, drawn: DrawnRows, real: Real, noise: NDArray[np.float32], folder: Path) -> Comparison:
        """Return the comparison; the rows of the real splits are loaded into files below `folder`."""
        train, test = (real.load(split, folder) for split in ("train", "test"))
        return cls(plan, drawn, real, train, test, real.reference(folder, NEIGHBOURS), torch.tensor(noise))

    def estimates(self, evaluator: Evaluator) -> dict[str, Estimate]:
        """Return every score that the features allow."""
        by_seed = [self._of_samples(place, evaluator) for place in range(len(self.plan.seeds))]
        floors, ceilings = self._of_test(evaluator), self._of_noise()
        return {
            name: _over_seeds([found[name] for found in by_seed], floors.get(name), ceilings.get(name))
            for name in by_seed[0]
        }

    def _of_samples(self, place: int, evaluator: Evaluator) -> dict[str, Measured]:
        """Return each score of one noise seed, by its place among them."""
        start, stop = place * self.plan.n, (place + 1) * self.plan.n
        moments = moments_of(self.drawn.features, start, stop)
        found: dict[str, Measured] = {}
        for name, split in (("frechet_distance", self.real.train), ("frechet_distance_test", self.real.test)):
            found[name] = frechet_of_rows(split.moments, moments, self.drawn.features, start, stop)
        finite = float(self.drawn.finite.read(start, stop).mean())
        found["finite"] = Measured(finite, torch.zeros(stop - start, dtype=torch.float64))  # counted, not estimated
        features = _tensor(self.drawn.features, start, min(stop, start + NEIGHBOURS))
        found |= self._one_by_one(features)
        labels = self.plan.labels(self.plan.seeds[place])
        within = None if labels is None else torch.from_numpy(labels[: len(features)])
        found |= _diversity(features, within)
        probabilities = self.drawn.probabilities
        if probabilities is None:
            return found
        found["inception_score"] = measured_inception_score(_tensor(probabilities, start, stop))
        if labels is not None and evaluator.labels:
            found["class_accuracy"] = measured_accuracy(probabilities, labels, start)
        return found

    def _one_by_one(self, features: Tensor) -> dict[str, Measured]:
        """Return the scores of features [N, D] that compare each image with each real train image."""
        reference = self.reference
        found = {"kid": measured_kid(reference, features)}
        count = min(len(features), len(reference))  # those below depend on the sizes of the sets
        if count < NEAREST:
            return found
        real, fake = reference[:count], features[:count]
        precision, recall = measured_precision_recall(real, fake)
        density, coverage = density_coverage(real, fake)
        return found | {"precision": precision, "recall": recall, "density": density, "coverage": coverage}

    def _of_test(self, evaluator: Evaluator) -> dict[str, float]:
        """Return the scores of real test images, as many as there are samples where there are so many."""
        count = min(len(self.test.features), self.plan.n)
        moments = moments_of(self.test.features, 0, count)
        found = {"frechet_distance": frechet_distance(self.real.train.moments, moments)}
        features = _tensor(self.test.features, 0, min(count, NEIGHBOURS))
        found |= {name: measured.value for name, measured in self._one_by_one(features).items()}
        reference = self.reference[:count]
        labels = torch.from_numpy(self.test.labels.read(0, len(features))) if self.plan.class_counts else None
        found |= {name: measured.value for name, measured in _diversity(features, labels).items()} | {"finite": 1.0}
        if evaluator.accuracy is not None:
            found["class_accuracy"] = evaluator.accuracy
        if len(reference) > 1:
            found["frechet_distance_test"] = frechet_distance(self.real.test.moments, FeatureMoments.of(reference))
        return found

    def _of_noise(self) -> dict[str, float]:
        """Return the scores of images of noise, and the accuracy of always guessing the most frequent class."""
        moments, counts = FeatureMoments.of(self.noise), self.plan.class_counts
        return {
            **({"class_accuracy": max(counts) / sum(counts)} if counts else {}),
            "frechet_distance": frechet_distance(self.real.train.moments, moments),
            "frechet_distance_test": frechet_distance(self.real.test.moments, moments),
            "kid": measured_kid(self.reference, self.noise).value,
        }


def _over_seeds(measured: Sequence[Measured], floor: float | None, ceiling: float | None) -> Estimate:
    """Return the estimate of a score from that of each noise seed.

    Seeds draw new samples, so that their errors are independent. Recall and coverage are shares of real images, which
    are the same ones for every seed: more seeds say more of each image, and there are no more images.
    """
    values, errors = ([getattr(each, name) for each in measured] for name in ("value", "standard_error"))
    error = None
    if measured[0].over == "real":
        mean = torch.stack([each.influence for each in measured]).mean(0)
        error = Measured(values[0], mean, "real").standard_error
    return Estimate.of(values, errors, error=error, floor=floor, ceiling=ceiling)


def _diversity(features: Tensor, labels: Tensor | None) -> dict[str, Measured]:
    """Return the diversity within classes; nothing where no class has two images."""
    groups = torch.zeros(len(features), dtype=torch.long) if labels is None else labels
    return {"diversity": measured_diversity(features, groups)} if int(groups.bincount().max()) > 1 else {}


def _tensor(rows: Rows, start: int, stop: int) -> Tensor:
    return torch.from_numpy(rows.read(start, stop))


def moments_of(rows: Rows, start: int, stop: int) -> FeatureMoments:
    """Return the moments of feature rows, in memory for a few of them."""
    total: FeatureMoments | None = None
    for chunk in rows.chunks(start, stop):
        part = FeatureMoments.of(torch.from_numpy(chunk))
        total = part if total is None else total + part
    assert total is not None
    return total


def measured_frechet(reference: FeatureMoments, features: Tensor) -> Measured:
    """Return the Frechet distance of samples' features [N, D] to the reference, with the influence of each sample."""
    parts = FrechetInfluence.of(reference, FeatureMoments.of(features))
    return Measured(parts.distance, parts(features))


def frechet_of_rows(reference: FeatureMoments, moments: FeatureMoments, rows: Rows, start: int, stop: int) -> Measured:
    """Return the Frechet distance of feature rows [start, stop), whose moments these are, to the reference."""
    influence = FrechetInfluence.of(reference, moments)
    parts = [influence(torch.from_numpy(chunk)) for chunk in rows.chunks(start, stop)]
    return Measured(influence.distance, torch.cat(parts))


def measured_accuracy(probabilities: Rows, labels: NDArray[np.int64], start: int) -> Measured:
    """Return the share of samples to which an evaluator gives the class that was asked for.

    Args:
        probabilities: rows [N, C].
        labels: of the samples [n].
        start: place of the first of them among the rows.
    """
    chunks = probabilities.chunks(start, start + len(labels))
    predicted = np.concatenate([chunk.argmax(1) for chunk in chunks])
    return Measured.mean(torch.from_numpy(predicted == labels))
