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
    one class, or none, the first images row by row. `class_grid(images[choice.ravel()], choice.shape[1], names)` draws
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


def side_by_side(lines: int, columns: int) -> int:
    """Return how many of some lines stand side by side in a grid that is about as wide as high, or rather wider.

    Args:
        columns: images of a line.
    """

    def longer_by(beside: int) -> float:
        width, height = beside * columns, -(-lines // beside)
        return max(width / height, height / width)

    return min(range(math.isqrt(lines) + 1, 0, -1), key=longer_by)


def class_grid(images: NDArray[np.uint8], columns: int, names: tuple[str, ...] = ()) -> NDArray[np.uint8]:
    """Return a grid of images whose columns are classes; of few classes each has several columns, side by side.

    Args:
        images: uint8 [N, H, W, C], one of each class, then another one of each, and so on.
        columns: classes.
        names: of the classes, shown above.

    Returns:
        uint8 [height, width, 3], about as wide as high, unless the classes alone make it wider.
    """
    rows = -(-len(images) // columns)
    across = side_by_side(rows, columns)
    tiles = np.full((-(-rows // across), columns, across, *images.shape[1:]), 255, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tiles[row // across, column, row % across] = image
    return label_grid(tiles.reshape(-1, *images.shape[1:]), columns * across, names, across=across)


def label_grid(
    images: NDArray[np.uint8], columns: int, names: tuple[str, ...] = (), gap: int = 4, *, across: int = 1
) -> NDArray[np.uint8]:
    """Return a grid of images [N, H, W, C], enlarged by a whole factor where they are small.

    Args:
        columns: images in a row.
        names: shown above the columns, long ones in several lines.
        gap: pixels between images.
        across: columns that belong together and share a name, a little apart from the next ones.

    Returns:
        uint8 [height, width, 3].
    """
    count, height, width, _ = images.shape
    zoom = max(1, -(-MIN_TILE // max(height, width)))
    tile_h, tile_w = height * zoom, width * zoom
    rows = -(-count // columns)
    block_w = across * (tile_w + gap) - gap
    titles = [textwrap.wrap(name, max(block_w // LETTER, 1))[:LINES] for name in names[: columns // across]]
    header = 18 + LINE * (max(1, *map(len, titles)) - 1) if names else 0
    apart = 2 * gap if across > 1 else 0

    def left(column: int) -> int:
        return gap + column * (tile_w + gap) + column // across * apart

    size = (left(columns - 1) + tile_w + gap, header + rows * (tile_h + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        pixels = image.repeat(zoom, 0).repeat(zoom, 1)
        tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        canvas.paste(tile, (left(i % columns), header + gap + i // columns * (tile_h + gap)))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for number, lines in enumerate(titles):
        middle = left(number * across) + block_w // 2
        for i, line in enumerate(lines):
            draw.text((middle, 11 + LINE * i), line, fill="black", font=font, anchor="mm")
    return np.asarray(canvas)
