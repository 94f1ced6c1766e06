"""The classifier: a small network that is trained on the classes of a dataset, and whose features judge samples of it.

It is never used for guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.image_size import ImageSize, height_width, of_sides
from ddpm.noise import Purpose, integers, words
from pipelines.evaluation.evaluators.base import Encoded, in_parts

FEATURES = 64
MAX_STEPS = 5_000
"""Upper bound of optimizer steps, for large datasets."""
BATCH = 64
MAX_SIDE = 64
"""Longer side to which larger images are reduced, so that training takes no longer and needs no more memory."""


class Trunk(nn.Module):
    """Convolutions that halve the image down to at most 4 pixels, and `FEATURES` features of what is left.

    Args:
        in_channels: of the images.
        image_size: height and width, in pixels, to which larger images are reduced; one number for square images.

    Attributes:
        width: number of features that `encode` returns.
    """

    width = FEATURES

    def __init__(self, in_channels: int, image_size: ImageSize) -> None:
        super().__init__()
        self.image_size = image_size
        layers: list[nn.Module] = []
        width, out, sides = in_channels, 32, height_width(image_size)
        while True:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.GroupNorm(8, out), nn.ReLU()]
            layers += [nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(8, out), nn.ReLU()]
            width, out = out, min(2 * out, 256)
            if max(sides) <= 4:
                break
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            sides = (sides[0] + 1) // 2, (sides[1] + 1) // 2
        self.convolutions = nn.Sequential(*layers)
        self.to_features = nn.Linear(width * math.prod(sides), FEATURES)

    def features(self, images: Tensor) -> Tensor:
        """Return features [B, 64] of images in [-1, 1], [B, C, H, W]."""
        return F.relu(self.to_features(self.convolutions(images).flatten(1)))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return features [B, width] and class probabilities, if any, of images in [-1, 1], [B, C, H, W]."""
        return self.features(images), None

    def forward(self, images: Tensor) -> Encoded:
        """Return what `encode` does of images uint8 [N, C, H, W]."""
        device = self.to_features.weight.device
        return in_parts(images, device, lambda part: self.encode(scaled(reduced(part, self.image_size))))


class Classifier(Trunk):
    """A trunk with class logits: the evaluator of labelled data."""

    def __init__(self, in_channels: int, image_size: ImageSize, num_classes: int) -> None:
        super().__init__(in_channels, image_size)
        self.to_logits = nn.Linear(FEATURES, num_classes)

    def logits(self, images: Tensor) -> Tensor:
        """Return class logits [B, num_classes] of images in [-1, 1], [B, C, H, W]."""
        return self.to_logits(self.features(images))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return features [B, 64] and class probabilities [B, num_classes] of images in [-1, 1], [B, C, H, W]."""
        features = self.features(images)
        return features, self.to_logits(features).softmax(1)


def reduced_size(size: ImageSize) -> ImageSize:
    """Return the size at which an evaluator looks at images: theirs, or `MAX_SIDE` for the longer side."""
    height, width = height_width(size)
    times = min(1.0, MAX_SIDE / max(height, width))
    return of_sides(max(1, round(height * times)), max(1, round(width * times)))


def reduced(images: Tensor, size: ImageSize) -> Tensor:
    """Return images uint8 [N, C, H, W] at a size where they are larger, averaged and rounded."""
    sides = height_width(size)
    if images.shape[-2] <= sides[0] and images.shape[-1] <= sides[1]:
        return images
    smaller = F.interpolate(images.float(), size=sides, mode="bilinear", antialias=True)
    return smaller.round().clamp(0, 255).to(torch.uint8)


def scaled(images: Tensor) -> Tensor:
    """Return images of 0..255 as float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def fit(networks: Sequence[nn.Module], images: int, batch: int, passes: int, loss: Callable[[int], Tensor]) -> None:
    """Train networks together, then freeze them on the CPU: AdamW with a rate that rises and falls once.

    Args:
        images: number of images of a pass.
        batch: number of images of a step.
        passes: over the images, while that takes at most `MAX_STEPS` steps.
        loss: returns the loss of a step by its number.
    """
    steps = min(passes * -(-images // batch), MAX_STEPS)
    optimizer = torch.optim.AdamW([p for network in networks for p in network.parameters()], lr=2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        rate.step()
    for network in networks:
        network.eval().requires_grad_(False).cpu()


def train_classifier(
    images: Tensor, labels: Tensor, num_classes: int, *, seed: int, passes: int = 40, device: torch.device | None = None
) -> Classifier:
    """Train a classifier on real images, augmented by shifts of one pixel; the same for a seed, on one thread of a CPU.

    Args:
        images: uint8 [N, C, H, W], of the size at which the network looks at them.
        labels: int64 [N].
        num_classes: number of classes.
        seed: of the first weights and of what each step is given.
        passes: over the images, while that takes at most `MAX_STEPS` steps.
        device: on which it is trained; the CPU by default, where the images are and it is returned.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(images.shape[1], of_sides(*images.shape[2:]), num_classes).to(device)

    def loss(step: int) -> Tensor:
        n = torch.arange(step * BATCH, (step + 1) * BATCH)
        chosen = integers(seed, n, Purpose.TIMESTEP, len(images))
        shift = words(seed, n, Purpose.FLIP, 1)[0, 0]
        dy, dx = int(shift % 3) - 1, int(shift // 3 % 3) - 1
        padded = F.pad(scaled(images[chosen].to(device)), (1, 1, 1, 1), value=-1.0)
        height, width = images.shape[2:]
        shifted = padded[:, :, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        return F.cross_entropy(network.logits(shifted), labels[chosen].to(device), label_smoothing=0.05)

    fit([network], len(images), BATCH, passes, loss)
    return network
