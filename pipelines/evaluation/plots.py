"""Grids of samples with their class names."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MIN_TILE = 48  # pixels; smaller images are enlarged


def label_grid(images: NDArray[np.uint8], columns: int, names: tuple[str, ...] = (), gap: int = 4) -> NDArray[np.uint8]:
    """Return a grid of images [N, H, W, C], enlarged by a whole factor where they are small.

    Args:
        columns: images in a row.
        names: shown above the columns.
        gap: pixels between images.

    Returns:
        uint8 [height, width, 3].
    """
    count, height, width, _ = images.shape
    zoom = max(1, -(-MIN_TILE // max(height, width)))
    tile_h, tile_w = height * zoom, width * zoom
    rows = -(-count // columns)
    header = 18 if names else 0
    canvas = Image.new("RGB", (columns * (tile_w + gap) + gap, header + rows * (tile_h + gap) + gap), "white")
    for i, image in enumerate(images):
        pixels = image.repeat(zoom, 0).repeat(zoom, 1)
        tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        canvas.paste(tile, (gap + i % columns * (tile_w + gap), header + gap + i // columns * (tile_h + gap)))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for column, name in enumerate(names[:columns]):
        middle = gap + column * (tile_w + gap) + tile_w // 2
        draw.text((middle, header // 2 + 2), name[: max(tile_w // 7, 1)], fill="black", font=font, anchor="mm")
    return np.asarray(canvas)
