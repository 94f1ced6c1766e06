"""What the evaluators of digits notice, and whether images that trained them score better for it.

Each evaluator is trained by the project's own functions on all train images or on half of them, with several seeds, and
compares changed images with its reference: the train images that it was not trained on, or all where it saw all. A
distance is given as a multiple of the floor, the distance of the unchanged test split.

    python -m benchmarks.evaluators            # some minutes on one core; evaluators.json
"""

from __future__ import annotations

import io
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from benchmarks.results import Size, commit, make_parser, mean, publish
from ddpm.quality import FeatureMoments
from pipelines.environment.scratch import temporary_folder
from pipelines.evaluation.compare import measured_frechet
from pipelines.evaluation.evaluators.base import Encoded, FeatureEncoder
from pipelines.evaluation.evaluators.classifier import train_classifier
from pipelines.evaluation.evaluators.contrastive import Contrastive, train_contrastive
from pipelines.shards.ingest.sources import open_source
from pipelines.storage import Storage

SEEDS, DRAWS, GROUP, NEIGHBOURS = 5, 10, 350, 5
BLUR, NOISE = 0.6, 0.3


@dataclass(frozen=True)
class Digits:
    """The digits of scikit-learn as the experiment splits them, uint8 [N, 1, 8, 8], with labels int64 [N]."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @classmethod
    def read(cls) -> Digits:
        """Return the pictures that `ddpm ingest digits` reads, in its splits."""
        storage, parts = Storage(), {}
        with temporary_folder("digits") as folder:
            found = list(open_source("digits", storage, f"file://{folder}").images)
        for split in ("train", "test"):
            chosen = [each for each in found if each.split == split]
            pictures = [np.array(Image.open(io.BytesIO(each.read(storage)))) for each in chosen]
            parts[split] = torch.from_numpy(np.stack(pictures))[:, None], torch.tensor([each.label for each in chosen])
        return cls(*parts["train"], *parts["test"])


Train = Callable[[Tensor, Tensor, int, int], FeatureEncoder]


def _classifier(images: Tensor, labels: Tensor, seed: int, passes: int) -> FeatureEncoder:
    return train_classifier(images, labels, 10, seed=seed, passes=passes)


def _contrastive(images: Tensor, labels: Tensor, seed: int, passes: int) -> FeatureEncoder:
    return train_contrastive(images, seed=seed, passes=passes)


def _untrained(images: Tensor, labels: Tensor, seed: int, passes: int) -> FeatureEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Contrastive(images.shape[1], images.shape[2]).eval().requires_grad_(False)


@dataclass(frozen=True)
class Row:
    """An evaluator.

    Attributes:
        train: makes it of images, labels, a seed and passes.
        half: whether half of the train images train it, and the other half are its reference.
        passes: over its images.
    """

    train: Train
    half: bool
    passes: int


ROWS = {
    "classifier, all": Row(_classifier, half=False, passes=40),
    "classifier, half": Row(_classifier, half=True, passes=40),
    "contrastive, all": Row(_contrastive, half=False, passes=20),
    "contrastive, half": Row(_contrastive, half=True, passes=20),
    "contrastive, half, 40 passes": Row(_contrastive, half=True, passes=40),
    "random weights": Row(_untrained, half=True, passes=0),
}
"""As many passes as the project's evaluators have by default, and twice as many."""


def main(arguments: list[str] | None = None) -> None:
    """Train and measure every evaluator, and publish the table."""
    options = make_parser("evaluators", __doc__, quick="one seed and one pass").parse_args(arguments)
    size = options.size
    torch.set_num_threads(1)
    digits, seeds, rows = Digits.read(), range(size.of(SEEDS, 1, 1)), {}
    for name, row in ROWS.items():
        found = [measure(digits, row, seed, size.of(row.passes, 1, 1)) for seed in seeds]
        rows[name] = summary(found)
        print(f"{name}: {rows[name]}", flush=True)
    result = {
        "benchmark": "evaluators",
        "quick": size is not Size.FULL,
        "commit": commit(),
        "machine": f"CPU ({platform.machine()}), one thread, torch {torch.__version__.split('+')[0]}",
        "train_images": len(digits.train),
        "test_images": len(digits.test),
        "seeds": len(seeds),
        "group": GROUP,
        "evaluators": rows,
    }
    publish(result, "evaluators", options)


def measure(digits: Digits, row: Row, seed: int, passes: int) -> dict[str, float]:
    """Return what one evaluator knows, its floor, and the distances of changed images as multiples of it."""
    order = torch.randperm(len(digits.train), generator=_generator(seed))
    shown = order[: len(order) // 2] if row.half else order
    unseen = order[len(order) // 2 :] if row.half else order
    encoder = row.train(digits.train[shown], digits.train_labels[shown], seed, passes)
    features = encoder(digits.train).features
    reference = FeatureMoments.of(features[unseen])
    test = encoder(digits.test)
    floor = _distance(reference, test.features)
    found = {"known": _known(test, features, digits), "floor": floor}
    draws = [torch.randperm(len(order), generator=_generator(i)) for i in range(DRAWS)]
    copies = [_distance(reference, features[draw[: len(digits.test)]]) for draw in draws]
    found["copies"] = statistics.fmean(copies) / floor
    for name, images in changed(digits, seed).items():
        found[name] = _distance(reference, encoder(images).features) / floor
    if row.half:
        # What it is worth to have been shown: such images, and unseen ones, against others that are unseen as well.
        pairs = [_shown_and_unseen(features[shown], features[unseen], i) for i in range(DRAWS)]
        found["shown_to_unseen"], found["unseen_to_unseen"] = (
            statistics.fmean(each) for each in zip(*pairs, strict=True)
        )
        found["gain_of_shown"] = found["unseen_to_unseen"] - found["shown_to_unseen"]
    return found


def _shown_and_unseen(shown: Tensor, unseen: Tensor, draw: int) -> tuple[float, float]:
    """Return the distances of a group of shown images, and of unseen ones, from a group of other unseen images."""
    order = torch.randperm(len(unseen), generator=_generator(draw))
    others = FeatureMoments.of(unseen[order[:GROUP]])
    chosen = torch.randperm(len(shown), generator=_generator(draw))[:GROUP]
    return _distance(others, shown[chosen]), _distance(others, unseen[order[GROUP : 2 * GROUP]])


def changed(digits: Digits, seed: int) -> dict[str, Tensor]:
    """Return the test split with what an evaluator should notice, uint8 [N, 1, 8, 8] each."""
    test, labels, generator = digits.test, digits.test_labels, _generator(seed)
    noise = torch.randn(test.shape, generator=generator) * NOISE * 127.5
    return {
        "blurred": torch.from_numpy(gaussian_filter(test.double().numpy(), (0, 0, BLUR, BLUR))).round().to(torch.uint8),
        "noisy": (test.float() + noise).round().clamp(0, 255).to(torch.uint8),
        "no_3": test[labels != 3],
        "no_3_no_5": test[(labels != 3) & (labels != 5)],
        "noise_alone": torch.randint(0, 256, test.shape, generator=generator, dtype=torch.uint8),
    }


def _known(test: Encoded, features: Tensor, digits: Digits) -> float:
    """Return the accuracy on the test split: of the classifier, or of the nearest train images of any other network."""
    if test.probabilities is not None:
        predicted = test.probabilities.argmax(1)
    else:
        nearest = torch.cdist(test.features.double(), features.double()).topk(NEIGHBOURS, largest=False).indices
        predicted = digits.train_labels[nearest].mode(1).values
    return (predicted == digits.test_labels).double().mean().item()


def _distance(reference: FeatureMoments, features: Tensor) -> float:
    return float(measured_frechet(reference, features).value)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def summary(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every figure over the seeds, and the standard error of the mean where there are several."""
    rows = [mean(name, [each[name] for each in found]) for name in found[0]]
    return {name: round(value, 4) for row in rows for name, value in row.items()}


if __name__ == "__main__":
    main()
