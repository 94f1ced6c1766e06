"""The evaluator: a small classifier, trained once per dataset on its real train split, whose features judge samples.

It is never used for guidance. Its digest is part of every score, because distances between features of different
evaluators are not comparable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.noise import Purpose, integers, words

FEATURES = 64
MAX_STEPS = 5_000
"""Upper bound of optimizer steps, for large datasets."""


class EvaluatorNetwork(nn.Module):
    """Convolutions that halve the image down to at most 4 pixels, then `FEATURES` features and class logits."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width, size = in_channels, image_size
        out = 32
        while True:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.GroupNorm(8, out), nn.ReLU()]
            layers += [nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(8, out), nn.ReLU()]
            width, out = out, min(2 * out, 256)
            if size <= 4:
                break
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            size = (size + 1) // 2
        self.convolutions = nn.Sequential(*layers)
        self.to_features = nn.Linear(width * size * size, FEATURES)
        self.to_logits = nn.Linear(FEATURES, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, 64] and logits [B, num_classes] of images in [-1, 1], [B, C, H, W]."""
        features = F.relu(self.to_features(self.convolutions(images).flatten(1)))
        return features, self.to_logits(features)


@dataclass(frozen=True)
class Features:
    """Features [N, D] and predicted classes [N] of a set of images."""

    features: Tensor
    predicted: Tensor


def train_evaluator(
    images: Tensor, labels: Tensor, num_classes: int, *, seed: int = 0, passes: int = 40
) -> EvaluatorNetwork:
    """Train an evaluator on real images [N, C, S, S] in [-1, 1] with labels [N], augmented by shifts of one pixel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = EvaluatorNetwork(images.shape[1], images.shape[2], num_classes)
    batch = 64
    steps = min(passes * ((len(images) + batch - 1) // batch), MAX_STEPS)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for step in range(steps):
        n = torch.arange(step * batch, (step + 1) * batch)
        chosen = integers(seed, n, Purpose.TIMESTEP, len(images))
        shift = words(seed, n, Purpose.FLIP, 1)[0, 0]
        dy, dx = int(shift % 3) - 1, int(shift // 3 % 3) - 1
        padded = F.pad(images[chosen], (1, 1, 1, 1), value=-1.0)
        height, width = images.shape[2:]
        batch_images = padded[:, :, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        loss = F.cross_entropy(network(batch_images)[1], labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return network.eval()


@torch.no_grad()
def extract(network: EvaluatorNetwork, images: Tensor, batch_size: int = 256) -> Features:
    """Return features and predicted classes of images [N, C, S, S] in [-1, 1]."""
    parts = [network(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    return Features(torch.cat([f for f, _ in parts]), torch.cat([logits.argmax(1) for _, logits in parts]))
