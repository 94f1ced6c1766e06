"""The size of images: one number of pixels for square ones, else height and width."""

from __future__ import annotations

import re

ImageSize = int | tuple[int, int]
"""Height and width in pixels; one number where they are equal, so that square images are described as ever."""

LARGEST = 4096
"""Largest height or width in pixels."""

_SETTING = re.compile(r"\s*(\d+)(?:\s*x\s*(\d+))?\s*\Z")


def height_width(size: ImageSize) -> tuple[int, int]:
    """Return (height, width) in pixels.

    Examples:
        >>> height_width(32), height_width((48, 64))
        ((32, 32), (48, 64))
    """
    return (size, size) if isinstance(size, int) else size


def of_sides(height: int, width: int) -> ImageSize:
    """Return the size of images of a height and width in pixels.

    Examples:
        >>> of_sides(32, 32), of_sides(48, 64)
        (32, (48, 64))
    """
    return height if height == width else (height, width)


def parse_image_size(value: object) -> ImageSize:
    """Return a size as a setting or a file gives it: a number, `HEIGHTxWIDTH`, or two numbers.

    Raises:
        ValueError: it is neither, or a side is not in 1..4096.

    Examples:
        >>> parse_image_size("48x64"), parse_image_size([48, 64]), parse_image_size("32x32")
        ((48, 64), (48, 64), 32)
    """
    sides: list[object] = list(value) if isinstance(value, list | tuple) else [value]
    if isinstance(value, str) and (found := _SETTING.match(value)):
        sides = [int(side) for side in found.groups() if side is not None]
    whole = [side for side in sides if isinstance(side, int) and not isinstance(side, bool)]
    if len(whole) != len(sides) or len(sides) not in (1, 2) or not all(1 <= side <= LARGEST for side in whole):
        raise ValueError(
            f"an image size is a number of pixels, such as 64, or HEIGHTxWIDTH, such as 48x64, each in 1..{LARGEST}"
        )
    return of_sides(whole[0], whole[-1])


def as_setting(size: ImageSize) -> str:
    """Return a size as settings are given it.

    Examples:
        >>> as_setting(32), as_setting((48, 64))
        ('32', '48x64')
    """
    return str(size) if isinstance(size, int) else in_words(size)


def in_words(size: ImageSize) -> str:
    """Return height and width for a person to read.

    Examples:
        >>> in_words(32), in_words((48, 64))
        ('32x32', '48x64')
    """
    height, width = height_width(size)
    return f"{height}x{width}"


def central_part(height: int, width: int, size: ImageSize) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the largest central part of an image that has the proportions of a size.

    Examples:
        >>> central_part(100, 300, 32), central_part(100, 300, (48, 64)), central_part(100, 80, (48, 64))
        ((0, 100, 100, 100), (0, 83, 100, 133), (20, 0, 60, 80))
    """
    h, w = height_width(size)
    if width * h > height * w:
        part = height, max(1, (2 * height * w + h) // (2 * h))
    else:
        part = max(1, (2 * width * h + w) // (2 * w)), width
    return (height - part[0]) // 2, (width - part[1]) // 2, *part
