"""scikit-learn's scanned digits as a folder of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digits(folder: Path, which: Iterable[int], class_of: Callable[[int], str] = str) -> None:
    """Write some of the 1,797 digits, by their number, into a folder for each class.

    Args:
        class_of: digit -> name of its class.
    """
    digits = load_digits()
    for i in which:
        path = folder / class_of(int(digits.target[i])) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(digits.images[i]).save(path)


def picture(pixels: np.ndarray) -> Image.Image:
    """Return the picture of a digit, whose pixels are 0 to 16."""
    return Image.fromarray(np.uint8(pixels * 255 / 16))
