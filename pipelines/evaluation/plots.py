"""Grids of samples with their class names."""

from __future__ import annotations

import itertools
import math
import textwrap

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MIN_TILE = 48  # pixels; smaller images are enlarged
MAX_COLUMNS = 16
LETTER, LINE, LINES = 7, 13, 3
"""Width of a letter and height of a line of a column's name, in pixels, and the most lines that it has."""


def grid_classes(num_classes: int, limit: int, seed: int = 0) -> tuple[int, ...]:
    """Return the classes that are the columns of a grid of at most `limit` images, in order.

    Where there are more classes than columns, they are spread over the list: it is cut into parts of equal length, of
    which each gives one class by the seed. All processes, and all grids of a run, have the same.
    """
    columns = min(num_classes, limit, MAX_COLUMNS)
    edges = [num_classes * part // max(columns, 1) for part in range(columns + 1)]
    rng = np.random.default_rng(seed)
    return tuple(int(rng.integers(low, high)) for low, high in itertools.pairwise(edges))


def grid_shape(num_classes: int, limit: int) -> tuple[int, int]:
    """Return (rows, columns) of a grid of at most `limit` images; a column is a class where there are several."""
    columns = min(num_classes if num_classes > 1 else math.isqrt(limit), limit, MAX_COLUMNS)
    return limit // columns, columns


def grid_choice(labels: NDArray[np.int64], num_classes: int, limit: int) -> NDArray[np.int64]:
    """Return which of some labelled images a grid of at most `limit` shows: int64 [rows, columns].

    The columns are the classes of `grid_classes`, of those that have an image, with equally many images of each; with
    one class, or none, the first images row by row. `label_grid(images[choice.ravel()], choice.shape[1], names)` draws
    it.

    Args:
        labels: of the images, int64 [N]; not looked at where `num_classes` is at most 1.
    """
    if num_classes <= 1:
        rows, columns = grid_shape(1, min(limit, len(labels)))
        return np.arange(rows * columns).reshape(rows, columns)
    present = np.unique(labels)
    chosen = present[list(grid_classes(len(present), limit))]
    of_class = [(labels == label).nonzero()[0] for label in chosen]
    rows = min(limit // len(chosen), *(len(found) for found in of_class))
    return np.stack([found[:rows] for found in of_class], axis=1)


def label_grid(images: NDArray[np.uint8], columns: int, names: tuple[str, ...] = (), gap: int = 4) -> NDArray[np.uint8]:
    """Return a grid of images [N, H, W, C], enlarged by a whole factor where they are small.

    Args:
        columns: images in a row.
        names: shown above the columns, long ones in several lines.
        gap: pixels between images.

    Returns:
        uint8 [height, width, 3].
    """
    count, height, width, _ = images.shape
    zoom = max(1, -(-MIN_TILE // max(height, width)))
    tile_h, tile_w = height * zoom, width * zoom
    rows = -(-count // columns)
    titles = [textwrap.wrap(name, max(tile_w // LETTER, 1))[:LINES] for name in names[:columns]]
    header = 18 + LINE * (max(1, *map(len, titles)) - 1) if names else 0
    canvas = Image.new("RGB", (columns * (tile_w + gap) + gap, header + rows * (tile_h + gap) + gap), "white")
    for i, image in enumerate(images):
        pixels = image.repeat(zoom, 0).repeat(zoom, 1)
        tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        canvas.paste(tile, (gap + i % columns * (tile_w + gap), header + gap + i // columns * (tile_h + gap)))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for column, lines in enumerate(titles):
        middle = gap + column * (tile_w + gap) + tile_w // 2
        for i, line in enumerate(lines):
            draw.text((middle, 11 + LINE * i), line, fill="black", font=font, anchor="mm")
    return np.asarray(canvas)
