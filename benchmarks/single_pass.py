"""Two models that draw a picture in one pass, to compare with: a conditional GAN and a conditional VAE.

They are small and usual: what a page each of plain torch gives. Both are told the class of a picture.

- GAN: hinge losses, a critic with spectral norm (Miyato et al. 2018) that projects onto the class (Miyato & Koyama
  2018), and the generator's average over training for drawing.
- VAE (Kingma & Welling 2014): a Gaussian posterior over 16 numbers, and for every pixel a Gaussian of learned width
  over the 256 levels, so that its bound is in bits per dimension as a diffusion model's is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import spectral_norm

BATCH = 128
NOISE, LATENT, WIDTH = 64, 16, 64
LEVELS = 256


def batches(images: Tensor, labels: Tensor, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of `count` images in all, each pass in another order."""
    generator, left = torch.Generator().manual_seed(seed), count
    while left > 0:
        for picked in torch.randperm(len(images), generator=generator).split(BATCH):
            if left > 0 and len(picked) == BATCH:
                left -= BATCH
                yield images[picked], labels[picked]


def _upward(inputs: int, classes: int, size: int, channels: int) -> nn.ModuleDict:
    """Return the layers from a vector and a class to an image of `size` pixels, by nearest upsampling."""
    return nn.ModuleDict(
        {
            "label": nn.Embedding(classes, WIDTH),
            "first": nn.Linear(inputs + WIDTH, 2 * WIDTH * (size // 2) ** 2),
            "rest": nn.Sequential(
                nn.GroupNorm(8, 2 * WIDTH), nn.SiLU(), nn.Upsample(scale_factor=2),
                nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(8, WIDTH), nn.SiLU(),
                nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(8, WIDTH), nn.SiLU(),
                nn.Conv2d(WIDTH, channels, 3, padding=1),
            ),
        }
    )  # fmt: skip


def _apply_upward(layers: nn.ModuleDict, vector: Tensor, label: Tensor, size: int) -> Tensor:
    first = layers["first"](torch.cat([vector, layers["label"](label)], 1))
    out: Tensor = layers["rest"](first.view(len(vector), 2 * WIDTH, size // 2, size // 2))
    return out


class Generator(nn.Module):
    """Maps noise [B, 64] and a class to an image in [-1, 1]."""

    def __init__(self, classes: int, size: int, channels: int) -> None:
        super().__init__()
        self.size, self.layers = size, _upward(NOISE, classes, size, channels)

    def forward(self, noise: Tensor, label: Tensor) -> Tensor:
        """Return images [B, C, H, W]."""
        return _apply_upward(self.layers, noise, label, self.size).tanh()

    @torch.no_grad()
    def draw(self, labels: Tensor, seed: int) -> Tensor:
        """Return an image in [-1, 1] for each class."""
        return self(torch.randn(len(labels), NOISE, generator=torch.Generator().manual_seed(seed)), labels)


class Critic(nn.Module):
    """Tells real images of a class from drawn ones."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        widths = ((channels, WIDTH, 1), (WIDTH, WIDTH, 2), (WIDTH, 2 * WIDTH, 1), (2 * WIDTH, 2 * WIDTH, 2))
        layers = [(spectral_norm(nn.Conv2d(a, b, 3, s, 1)), nn.LeakyReLU(0.2)) for a, b, s in widths]
        self.body = nn.Sequential(*(layer for pair in layers for layer in pair))
        self.head, self.label = (
            spectral_norm(nn.Linear(2 * WIDTH, 1)),
            spectral_norm(nn.Embedding(classes, 2 * WIDTH)),
        )

    def forward(self, images: Tensor, label: Tensor) -> Tensor:
        """Return a score for each image, [B]; higher is more real."""
        features = self.body(images).sum((2, 3))
        score: Tensor = self.head(features)[:, 0] + (features * self.label(label)).sum(1)
        return score


def train_gan(images: Tensor, labels: Tensor, classes: int, count: int, seed: int = 0) -> Generator:
    """Return a generator, averaged over its training.

    Args:
        images, labels: in [-1, 1] [N, C, H, W], and [N].
        count: real images to see.
    """
    torch.manual_seed(seed)
    generator = Generator(classes, images.shape[-1], images.shape[1])
    critic, average = Critic(classes, images.shape[1]), copy.deepcopy(generator).requires_grad_(False)
    adam = {"betas": (0.0, 0.99), "fused": True}
    of_generator = torch.optim.Adam(generator.parameters(), lr=2e-4, **adam)  # type: ignore[arg-type]
    of_critic = torch.optim.Adam(critic.parameters(), lr=4e-4, **adam)  # type: ignore[arg-type]
    for real, label in batches(images, labels, count, seed):
        drawn = generator(torch.randn(BATCH, NOISE), label)
        loss = F.relu(1 - critic(real, label)).mean() + F.relu(1 + critic(drawn.detach(), label)).mean()
        of_critic.zero_grad()
        loss.backward()
        of_critic.step()
        of_generator.zero_grad()
        (-critic(drawn, label).mean()).backward()
        of_generator.step()
        torch._foreach_lerp_(list(average.parameters()), list(generator.parameters()), 0.005)
    return average.eval()


@dataclass(frozen=True)
class _Posterior:
    mean: Tensor
    log_variance: Tensor

    def draw(self) -> Tensor:
        return self.mean + (self.log_variance / 2).exp() * torch.randn_like(self.mean)

    def divergence(self) -> Tensor:
        """Return the KL divergence to the standard normal, in nats [B]."""
        return 0.5 * (self.mean**2 + self.log_variance.exp() - 1 - self.log_variance).sum(1)


class Vae(nn.Module):
    """A conditional variational autoencoder."""

    def __init__(self, classes: int, size: int, channels: int) -> None:
        super().__init__()
        self.size = size
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, padding=1), nn.SiLU(),
            nn.Conv2d(WIDTH, 2 * WIDTH, 3, 2, padding=1), nn.SiLU(),
            nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1), nn.SiLU(), nn.Flatten(),
        )  # fmt: skip
        self.label = nn.Embedding(classes, WIDTH)
        self.to_posterior = nn.Linear(2 * WIDTH * (size // 2) ** 2 + WIDTH, 2 * LATENT)
        self.layers = _upward(LATENT, classes, size, 2 * channels)

    def posterior(self, images: Tensor, label: Tensor) -> _Posterior:
        """Return q(z | image, class)."""
        both = torch.cat([self.encoder(images), self.label(label)], 1)
        mean, log_variance = self.to_posterior(both).chunk(2, 1)
        return _Posterior(mean, log_variance.clamp(-10, 10))

    def decode(self, latent: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logarithm of the width of each pixel's Gaussian."""
        mean, log_width = _apply_upward(self.layers, latent, label, self.size).chunk(2, 1)
        return mean, log_width.clamp(-6, 2)

    def bound(self, images: Tensor, label: Tensor) -> Tensor:
        """Return the negative evidence bound in nats, [B], with one draw of the latent numbers."""
        posterior = self.posterior(images, label)
        mean, log_width = self.decode(posterior.draw(), label)
        return posterior.divergence() - _log_probability(images, mean, log_width).sum((1, 2, 3))

    @torch.no_grad()
    def bits_per_dim(self, images: Tensor, label: Tensor, draws: int = 16) -> float:
        """Return the bound of the images' mean in bits per dimension."""
        torch.manual_seed(0)
        nats = torch.stack([self.bound(images, label) for _ in range(draws)]).mean()
        return float(nats) / images[0].numel() / math.log(2)

    @torch.no_grad()
    def draw(self, labels: Tensor, seed: int) -> Tensor:
        """Return an image in [-1, 1] for each class: the mean of every pixel, as is usual."""
        latent = torch.randn(len(labels), LATENT, generator=torch.Generator().manual_seed(seed))
        return self.decode(latent, labels)[0].clamp(-1, 1)


def _log_probability(images: Tensor, mean: Tensor, log_width: Tensor) -> Tensor:
    """Return the log-probability of each pixel's level, the outermost ones reaching to infinity (Ho et al. 2020)."""
    half, width = 1 / (LEVELS - 1), log_width.exp()
    above = torch.special.log_ndtr((images - mean + half) / width)
    below = torch.special.log_ndtr((images - mean - half) / width)
    over = torch.special.log_ndtr(-(images - mean - half) / width)
    # log(e^above - e^below), exact where both are near 0 or far below it.
    inner = above + torch.log(-torch.expm1((below - above).clamp(max=-1e-7)))
    return torch.where(images <= -1 + half, above, torch.where(images >= 1 - half, over, inner))


def train_vae(images: Tensor, labels: Tensor, classes: int, count: int, seed: int = 0) -> Vae:
    """Return a variational autoencoder.

    Args:
        images, labels: in [-1, 1] [N, C, H, W], and [N].
        count: images to see.
    """
    torch.manual_seed(seed)
    model = Vae(classes, images.shape[-1], images.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=-(-count // BATCH))
    for real, label in batches(images, labels, count, seed):
        optimizer.zero_grad()
        model.bound(real, label).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    return model.eval()
