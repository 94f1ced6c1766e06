"""Whether samples are copies of training images, and a picture of the pairs that are nearest to each other."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.memorisation import Memorisation, Pair, feature_neighbours, memorisation, pixel_neighbours
from pipelines.evaluation.plots import label_grid
from pipelines.evaluation.real import RealRows
from pipelines.evaluation.rows import Rows
from pipelines.evaluation.samples import DrawnRows
from pipelines.evaluation.scores import Estimate

SAMPLES = 1_000
"""Samples, and held-out images, that are looked at."""
TRAINING = 50_000
"""Training images that they are compared with."""
PAIRS = 8
"""Pairs in the picture."""
LEAST = 20
"""Images of each kind without which nothing can be said."""


@dataclass(frozen=True)
class Copies:
    """The result of looking for copies of training images.

    Attributes:
        pixels: by the distance of pixels, up to mirroring and a shift by a pixel.
        features: by the distance of the evaluator's features.
        closest: the samples that are nearest to a training image, nearest first.
        pictures: each of them with its training image, uint8 [pairs, 2, h, w, C].
        searched: training images that were looked at: the first ones.
        training: training images that there are.
    """

    pixels: Memorisation
    features: Memorisation
    closest: tuple[Pair, ...]
    pictures: NDArray[np.uint8]
    searched: int
    training: int

    @property
    def named(self) -> bool:
        """Whether samples are named copies."""
        return self.pixels.copies or self.features.copies

    def verdict(self) -> str:
        """Return the finding in words."""
        worse = max((self.pixels, self.features), key=lambda found: found.bound)
        by = "pixels" if worse is self.pixels else "features"
        share = f"{worse.share:.1%} of {worse.n:,} samples are as near to a training image as {worse.level:.1%} of real"
        bound = f"{share} test images are ({worse.ratio:.1f} times, at least {worse.bound:.1f}, by {by})"
        if self.searched < self.training:
            bound += f", in the {self.searched / self.training:.0%} of the training images that were searched"
        return f"COPIES of training images: {bound}" if self.named else f"none found: {bound}"

    def estimates(self) -> dict[str, Estimate]:
        """Return the scores that go with the others."""
        found = {
            "copied": Estimate(self.pixels.share, floor=self.pixels.level),
            "copied_features": Estimate(self.features.share, floor=self.features.level),
        }
        if self.pixels.authenticity is not None:
            found["authenticity"] = Estimate(self.pixels.authenticity)
        return found

    def to_plain(self) -> dict[str, Any]:
        """Return the finding as JSON types."""
        return {
            "copies": self.named,
            "verdict": self.verdict(),
            "pixels": asdict(self.pixels),
            "features": asdict(self.features),
            "closest": [asdict(pair) for pair in self.closest],
            "searched": self.searched,
            "training": self.training,
        }

    def picture(self) -> NDArray[np.uint8]:
        """Return the pairs, uint8 [height, width, 3]: samples above, the training image nearest to each below."""
        tiles = self.pictures.transpose(1, 0, 2, 3, 4).reshape(-1, *self.pictures.shape[2:])
        return label_grid(tiles, len(self.pictures))


def look_for_copies(train: RealRows, test: RealRows, drawn: DrawnRows, n: int) -> Copies | None:
    """Compare the first samples with the training images, and real test images with the same ones.

    Args:
        train: all images that the model was trained on.
        test: held-out images.
        n: number of samples of a noise seed; those of the first one are looked at.

    Returns:
        None where there are too few images to say anything.
    """
    count, held_out = min(n, SAMPLES), min(len(test.labels), SAMPLES)
    training = min(len(train.labels), TRAINING)
    if min(count, held_out, training) < LEAST:
        return None
    pixels = train.pixels.map()[:training]
    samples = pixel_neighbours(drawn.pixels.read(0, count), pixels)
    nearest = samples.index[:, 0]
    own = pixel_neighbours(pixels[nearest.numpy()], pixels, k=1, exclude=nearest)
    by_pixels = memorisation(samples, pixel_neighbours(_spread(test.pixels, held_out), pixels), own=own)
    features = train.features.map()[:training]
    by_features = memorisation(
        feature_neighbours(drawn.features.read(0, count), features),
        feature_neighbours(_spread(test.features, held_out), features),
    )
    closest = tuple(samples.closest(min(PAIRS, count)))
    pictures = np.stack([np.stack([_image(drawn.pixels, p.image), _image(train.pixels, p.training)]) for p in closest])
    return Copies(by_pixels, by_features, closest, pictures, training, len(train.labels))


def _spread(rows: Rows, count: int) -> NDArray[Any]:
    """Return rows that are spread evenly over all of them."""
    chosen = np.linspace(0, len(rows) - 1, count).round().astype(np.int64)
    return np.asarray(rows.map()[chosen])


def _image(rows: Rows, at: int) -> NDArray[np.uint8]:
    """Return the small copy of an image, uint8 [h, w, C]."""
    found: NDArray[np.uint8] = rows.read(at, at + 1)[0].transpose(1, 2, 0)
    return found
