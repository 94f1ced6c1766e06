"""The matcher: a small network that is trained to know which caption an image has, for data with captions.

It judges whether samples are what their prompts say. As in CLIP (Radford et al. 2021) an image and a text become unit
vectors of one space, and each has to find the other in its batch, by a symmetric cross-entropy. The texts are the
embeddings that an ingest has stored, so that only two small heads and the convolutions are trained. It is never used
for guidance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.image_size import ImageSize, of_sides
from ddpm.models.classifier import same_text, shared_cross_entropy
from pipelines.evaluation.evaluators.classifier import FEATURES, Trunk, fit, scaled

JOINT = 64
"""Width of the space of images and texts."""
HIDDEN = 128
BATCH = 128
TEMPERATURE = 0.07
"""The first one, as in CLIP; it is learnt."""
COLDEST = 0.01
CHOICES = 10
"""Different captions, at most, among which the one of an image has to match best."""


class Matcher(Trunk):
    """A trunk with heads for images and texts: the judge of prompts.

    Args:
        in_channels, image_size: see `Trunk`.
        text_dim: width of the texts' embeddings.
    """

    width = JOINT

    def __init__(self, in_channels: int, image_size: ImageSize, text_dim: int) -> None:
        super().__init__(in_channels, image_size)
        self.text_dim = text_dim
        self.of_image = nn.Linear(FEATURES, JOINT)
        self.of_text = nn.Sequential(nn.Linear(text_dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, JOINT))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE)))

    def images(self, images: Tensor) -> Tensor:
        """Return unit vectors [B, JOINT] of images in [-1, 1], [B, C, H, W]."""
        return F.normalize(self.of_image(self.features(images)), dim=1)

    def texts(self, pooled: Tensor) -> Tensor:
        """Return unit vectors [M, JOINT] of texts by their embeddings [M, D]."""
        return F.normalize(self.of_text(F.layer_norm(pooled, (self.text_dim,))), dim=1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the vectors of images in [-1, 1], [B, C, H, W], as their features."""
        return self.images(images), None


def train_matcher(
    images: Tensor, pooled: Tensor, *, seed: int, passes: int = 40, device: torch.device | None = None
) -> Matcher:
    """Train a network to match images with their captions; the same for a seed, on one thread of a CPU.

    Images are shifted by up to a pixel. None is mirrored: a caption may say on which side something is.

    Args:
        images: uint8 [N, C, H, W], of the size at which the network looks at them.
        pooled: embeddings of their captions, float32 [N, D].
        seed: of the first weights, and of the images of each step and their shifts.
        passes: over the images, while that takes at most `MAX_STEPS` steps.
        device: on which it is trained; the CPU by default, where the images are and it is returned.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Matcher(images.shape[1], of_sides(*images.shape[2:]), pooled.shape[1]).to(device)
    generator = torch.Generator().manual_seed(seed)

    def loss(_: int) -> Tensor:
        chosen = torch.randperm(len(images), generator=generator)[:BATCH]
        dy, dx = torch.randint(0, 3, (2,), generator=generator).tolist()
        padded = F.pad(scaled(images[chosen].to(device)), (1, 1, 1, 1), mode="replicate")
        height, width = images.shape[2:]
        shifted = padded[:, :, dy : dy + height, dx : dx + width]
        texts = pooled[chosen].to(device)
        return clip_loss(network.images(shifted), network.texts(texts), texts, network.log_temperature)

    fit([network], len(images), BATCH, passes, loss)
    return network


def clip_loss(images: Tensor, texts: Tensor, pooled: Tensor, log_temperature: Tensor) -> Tensor:
    """Return the symmetric cross-entropy of matching (Radford et al. 2021, fig. 3); equal captions share a probability.

    Args:
        images, texts: unit vectors of a batch [B, J].
        pooled: embeddings of the texts [B, D], by which equal ones are known.
    """
    logits = images @ texts.T / log_temperature.clamp(min=math.log(COLDEST)).exp()
    directions = F.normalize(pooled, dim=1)
    same = same_text(directions, directions)
    return (shared_cross_entropy(logits, same).mean() + shared_cross_entropy(logits.T, same).mean()) / 2


def matched(images: Tensor, own: Tensor, texts: Tensor, seed: int) -> Tensor:
    """Return whether its own caption is the best match of each image, of `choices` different ones, bool [N].

    The others are drawn anew for each image. An image to which two captions match alike is not matched.

    Args:
        images: unit vectors [N, J].
        own: number of each one's caption among the texts, int64 [N].
        texts: unit vectors of different captions [U, J], at least two.
        seed: of the other captions.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for part, mine in zip(images.split(BATCH), own.split(BATCH), strict=True):
        lots = torch.rand(len(part), len(texts), generator=generator).scatter_(1, mine[:, None], 2.0)
        asked = lots.topk(choices(len(texts)), dim=1).indices  # the own one first
        scores = (part @ texts.T).gather(1, asked)
        found.append(scores[:, 0] > scores[:, 1:].amax(1))
    return torch.cat(found)


def choices(different: int) -> int:
    """Return among how many captions one has to be found, where there are so many different ones."""
    return min(CHOICES, different)
