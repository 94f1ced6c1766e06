"""Test whether images look like their mirror images: a small network is trained to recognize which one is the original.

If it cannot do so on unseen images, training on mirrored images too doubles the data for free. If it can, as with
digits and letters, a model trained on mirrored images would draw mirrored ones. The test is conditional on the class:
arrows to the left are mirrored arrows to the right, but of another class.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipelines.evaluation.devices import one_thread
from pipelines.plan.facts import Mirror

STEPS, BATCH = 200, 64


class Handed(nn.Module):
    """A score per class that is trained to be higher for an image than for its mirror image.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 32),
            nn.ReLU(),
            nn.Linear(32, classes),
        )

    def margin(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the score of each image minus that of its mirror image, [B]."""
        scores = self.layers(torch.cat([images, images.flip(-1)])).gather(1, torch.cat([labels, labels])[:, None])
        original, mirrored = scores[:, 0].chunk(2)
        return original - mirrored


def tell_mirrored(images: NDArray[np.uint8], labels: NDArray[np.int64], *, seed: int = 0) -> Mirror:
    """Return the accuracy of a network in recognizing mirror images, on the half that it was not trained on.

    Args:
        images: uint8 [N, 16, 16, 3] in random order.
        labels: class indices, int64 [N].
        seed: seed of the network and its batches.
    """
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _trained(images, labels)


def _trained(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Mirror:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    y = torch.from_numpy(labels)
    half = len(x) // 2
    network = Handed(int(y.max()) + 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / STEPS)
        chosen = torch.randint(half, (BATCH,))
        loss = F.softplus(-network.margin(x[chosen], y[chosen])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        margins = network.margin(x[half:], y[half:])
    # A symmetric picture has margin 0: it counts as half right.
    accuracy = ((margins > 0).double() + 0.5 * (margins == 0).double()).mean()
    return Mirror(float(accuracy), len(margins))
