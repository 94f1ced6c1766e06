"""The judge of both sides: a classifier of its own, trained on the real pictures by plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.time_to_quality.pictures import Pictures
from ddpm.quality import FeatureMoments, FrechetInfluence, measured_precision_recall

WIDTHS = (32, 64, 128)
BATCH = 128


class Network(nn.Module):
    """Convolutions with batch norm, 128 features and a linear head."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((channels, *WIDTHS), WIDTHS, strict=False):
            for first, second in ((before, width), (width, width)):
                layers += [nn.Conv2d(first, second, 3, padding=1, bias=False), nn.BatchNorm2d(second), nn.ReLU()]
            layers.append(nn.AvgPool2d(2))
        self.body, self.head = nn.Sequential(*layers), nn.Linear(WIDTHS[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        """Return [N, 128] of images in [-1, 1]."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.features(images))


@dataclass(frozen=True)
class Judge:
    """Scores of pictures against those that both sides were given.

    Attributes:
        network: the classifier.
        reference: moments of the features of the given pictures.
        real: some of these features, for precision and recall.
        floor: distance of the held-out pictures, drawn with repetition to the number of samples.
        accuracy: of the classifier on the held-out pictures.
    """

    network: Network
    reference: FeatureMoments
    real: Tensor
    floor: float
    accuracy: float

    @classmethod
    def of(cls, pictures: Pictures, work: Path, passes: int) -> Judge:
        """Return the judge of a data set, trained where it is not there yet."""
        path = work / "judges" / f"{pictures.name}-{passes}.safetensors"
        images, labels = pictures.read(pictures.given)
        network = Network(pictures.channels, len(pictures.classes))
        if path.exists():
            network.load_state_dict(load_file(path))
        else:
            _train(network, images, labels, passes)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(network.state_dict(), path)
        network.eval().requires_grad_(False)
        held_out, truth = pictures.read(pictures.held_out)
        features = _features(network, images)
        reference = FeatureMoments.of(features)
        others = _features(network, held_out)
        floor = FrechetInfluence.of(reference, FeatureMoments.of(others)).distance
        right = (network.head(others.float()).argmax(1) == truth).double().mean().item()
        some = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:2_000]
        return cls(network, reference, features[some], float(floor), right)

    def scores(self, samples: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the scores of samples in [-1, 1] [N, C, H, W] that were asked for with these classes [N]."""
        features = _features(self.network, samples)
        parts = FrechetInfluence.of(self.reference, FeatureMoments.of(features))
        right = self.network.head(features.float()).argmax(1) == labels
        precision, recall = measured_precision_recall(self.real, features)
        return {
            "distance": float(parts.distance),
            "standard_error": float(parts(features).std() / len(features) ** 0.5),
            "accuracy": right.double().mean().item(),
            "precision": precision.value,
            "recall": recall.value,
        }


def _train(network: Network, images: Tensor, labels: Tensor, passes: int) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    steps = passes * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(passes):
        for picked in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            batch = _shifted(images[picked])
            loss = F.cross_entropy(network(batch), labels[picked], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _shifted(images: Tensor, by: int = 2) -> Tensor:
    """Return a batch moved by up to some pixels, all the same way."""
    size = images.shape[-1]
    padded = F.pad(images, (by, by, by, by), mode="replicate")
    y, x = torch.randint(0, 2 * by + 1, (2,)).tolist()
    return padded[..., y : y + size, x : x + size]


@torch.no_grad()
def _features(network: Network, images: Tensor) -> Tensor:
    parts: list[Any] = [network.features(part) for part in images.split(500)]
    return torch.cat(parts).double()
