"""The contrastive network: trained without labels to know an image again, for data that have no classes.

SimCLR (Chen et al. 2020) at the size of this package's classifier: two random views of an image are drawn together, and
away from those of the other images of the batch, by the NT-Xent loss of a projection of the features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.image_size import of_sides
from pipelines.evaluation.evaluators.classifier import FEATURES, Trunk, fit, scaled

BATCH = 128
TEMPERATURE = 0.3
PROJECTION = 64
CROP = 0.6
"""Smallest share of height and width that a view shows."""
ASPECT = 0.15
"""Largest logarithm of the factor by which a view is stretched."""
ROTATION = 0.3
"""Largest angle by which a view is turned, in radians."""
SHIFT = 1.0
"""Largest shift of a view, in pixels for each 8 of the image."""
BRIGHTNESS = 0.2
"""Largest change of brightness and contrast, in units of [-1, 1]."""
NOISE = 0.05


class Contrastive(Trunk):
    """A trunk that is trained without labels: the evaluator of data without classes."""


def train_contrastive(
    images: Tensor, *, seed: int, passes: int = 20, device: torch.device | None = None
) -> Contrastive:
    """Train a network to know images again in another view; the same for a seed, on one thread of a CPU.

    Args:
        images: uint8 [N, C, H, W], of the size at which the network looks at them.
        seed: of the first weights, the images of each step and their views.
        passes: over the images, while that takes at most `MAX_STEPS` steps.
        device: on which it is trained; the CPU by default, where the images are and it is returned.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Contrastive(images.shape[1], of_sides(*images.shape[2:])).to(device)
        head = nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, PROJECTION)).to(device)
    generator = torch.Generator().manual_seed(seed)

    def loss(_: int) -> Tensor:
        # An image that is in a batch twice would be its own opposite.
        chosen = torch.randperm(len(images), generator=generator)[:BATCH]
        batch = scaled(images[chosen].to(device))
        one, other = (head(network.features(view(batch, generator))) for _ in range(2))
        return nt_xent(one, other, TEMPERATURE)

    fit([network, head], len(images), BATCH, passes, loss)
    return network


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random view of each image [N, C, H, W] in [-1, 1]: cropped, turned, shifted, brighter, noisy.

    None is mirrored: a network that took an image for its mirror image could not tell a model that mixes them up.

    Args:
        generator: of the CPU, so that views are the same on every device.
    """
    count, device = len(images), images.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * 2 - 1

    scale = 1 - (1 - CROP) * torch.rand(count, generator=generator)
    stretch = (ASPECT * uniform()).exp()
    window = torch.zeros(count, 2, 3)
    angle = ROTATION * uniform()
    window[:, 0, 0], window[:, 0, 1] = scale * stretch * angle.cos(), -scale * angle.sin()
    window[:, 1, 0], window[:, 1, 1] = scale * angle.sin(), scale / stretch * angle.cos()
    window[:, :, 2] = uniform(2) * (SHIFT / 4)
    contrast, brightness = BRIGHTNESS * uniform(1, 1, 1), BRIGHTNESS * uniform(1, 1, 1)
    noise = NOISE * torch.randn(images.shape, generator=generator)
    grid = F.affine_grid(window.to(device), list(images.shape), align_corners=False)
    # What a view shows beyond the edge is black.
    seen = F.grid_sample(images + 1, grid, align_corners=False) - 1
    return seen * (1 + contrast.to(device)) + brightness.to(device) + noise.to(device)


def nt_xent(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Return the loss of two views' projections [N, D]: each has to find its partner among 2N - 1 (SimCLR, eq. 1)."""
    both = F.normalize(torch.cat([one, other]), dim=1)
    alike = both @ both.T / temperature
    alike = alike.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), -math.inf)
    partner = torch.arange(len(both), device=both.device).roll(len(one))
    return F.cross_entropy(alike, partner)
