"""Images and masks that a user gives, brought to the size and channels of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddpm.image_size import as_setting, central_part, in_words, of_sides
from ddpm.inference import check_mask
from pipelines.inference.request import Request, RequestError, parse_box
from pipelines.presentation.progress import Notice
from pipelines.shards.ingest.encode import ImageFormat, decode_grey, encode_image
from pipelines.shards.ingest.readers import UnreadableError

T = TypeVar("T")
DRAWN = ("box:", "half:")
"""How a mask starts that is no picture."""
MASKS = "; give a picture, box:X,Y,WIDTH,HEIGHT or half:SIDE"
"""The forms of a mask, named at the end of an error about one."""


@dataclass(frozen=True)
class GivenImage:
    """An image that a user gives.

    Attributes:
        path: of its file.
        size: width and height in pixels of the upright image in the file.
        pixels: its largest central part of the model's proportions, resized to the model's size, uint8 [H, W, C].
    """

    path: Path
    size: tuple[int, int]
    pixels: NDArray[np.uint8]


def check_given(request: Request) -> None:
    """Check that the files that a request names are images, before a model is fetched to draw with them.

    Raises:
        RequestError: one is missing, or is no image.
    """
    for image in dict.fromkeys(getattr(request, "images", ())):
        read_file("image", image, decode_grey)
    for mask in dict.fromkeys(getattr(request, "masks", ())):
        if not mask.startswith(DRAWN):
            read_file("mask", Path(mask), decode_grey, MASKS)


def read_images(paths: Sequence[Path], shape: tuple[int, int, int], notice: Notice) -> list[GivenImage]:
    """Return images of a model's shape.

    Args:
        shape: (C, H, W).
        notice: called with a line for each image that had to be changed.

    Raises:
        RequestError: a file is missing or is no image.
    """
    read = {path: _read(path, shape, notice) for path in dict.fromkeys(paths)}
    return [read[path] for path in paths]


def read_mask(mask: str, image: GivenImage, shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Return which pixels of an image are hidden, bool [H, W] of the model's size.

    Args:
        mask: a picture of the size of the given image or of the model's, whose white pixels are hidden; or
            box:X,Y,WIDTH,HEIGHT or half:SIDE.
        image: of which the pixels are hidden.
        shape: (C, H, W) of the model's.

    Raises:
        RequestError: the mask cannot be read, or has another size.
        ValueError: it hides nothing or everything.
    """
    _, height, width = shape
    if mask.startswith(DRAWN):
        x, y, w, h = _box_of_half(mask, width, height) if mask.startswith("half:") else parse_box(mask)
        if x + w > width or y + h > height:
            raise RequestError(
                f"the mask {mask} does not lie within the model's images, {width} pixels wide and {height} high"
            )
        hidden = np.zeros((height, width), bool)
        hidden[y : y + h, x : x + w] = True
    else:
        hidden = _drawn(Path(mask), image, height, width)
    check_mask(f"the mask {mask} of {image.path}", torch.from_numpy(~hidden))  # as the task does, which knows no files
    return hidden


def as_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """Return images uint8 [N, H, W, C] as float32 [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def read_file(what: str, path: Path, decode: Callable[[bytes], T], otherwise: str = "") -> T:
    """Return what a function makes of the bytes of a picture's file.

    Args:
        what: the picture is, for the message.
        otherwise: what else could be given, behind what is wrong.

    Raises:
        RequestError: the file is missing, or is no image.
    """
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise RequestError(f"the {what} {path} cannot be read: {error.strerror or error}{otherwise}") from error
    except UnreadableError as error:
        raise RequestError(f"the {what} {path} {error}{otherwise}") from error


def _read(path: Path, shape: tuple[int, int, int], notice: Notice) -> GivenImage:
    channels, *sides = shape
    size = of_sides(*sides)
    encoded = read_file("image", path, lambda data: encode_image(data, ImageFormat(size, channels)))
    changes, (width, height) = list(encoded.changes), encoded.size
    *_, rows, columns = central_part(height, width, size)
    if (rows, columns) != (height, width):
        part = "square" if rows == columns else f"{in_words((rows, columns))} pixels"
        changes.append(f"cut to the central {part} of {height}x{width} pixels")
    if (rows, columns) != tuple(sides):
        changes.append(f"resized from {as_setting(of_sides(rows, columns))} to the model's {as_setting(size)} pixels")
    if changes:
        notice(f"{path}: {', '.join(changes)}")
    return GivenImage(path, encoded.size, encoded.pixels)


def _box_of_half(mask: str, width: int, height: int) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a mask half:SIDE; of an odd number of pixels the smaller half."""
    w, h = width // 2, height // 2
    return {
        "left": (0, 0, w, height),
        "right": (width - w, 0, w, height),
        "top": (0, 0, width, h),
        "bottom": (0, height - h, width, h),
    }[mask.removeprefix("half:")]


def _drawn(mask: Path, image: GivenImage, height: int, width: int) -> NDArray[np.bool_]:
    """Return a mask from a picture; one of the size of the given image is cut and resized as that is."""
    picture = Image.fromarray(read_file("mask", mask, decode_grey, MASKS))
    if picture.size == image.size and picture.size != (width, height):
        top, left, rows, columns = central_part(picture.height, picture.width, of_sides(height, width))
        picture = picture.crop((left, top, left + columns, top + rows)).resize((width, height), Image.Resampling.BOX)
        return np.asarray(picture) > 0  # a pixel of which any part is hidden
    if picture.size != (width, height):
        raise RequestError(
            f"the mask {mask} is {picture.height}x{picture.width} (height x width): it must have the size of "
            f"{image.path}, {image.size[1]}x{image.size[0]}, or of the model's images, {height}x{width}"
        )
    return np.asarray(picture) >= 128
