"""Images as PNG files, and embedded in a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from pipelines.presentation.blocks import Image, Words

LARGE_BYTES = 64_000
"""Size of a PNG in bytes above which a picture is stored as WebP, so that a page with many can be sent by mail."""
QUALITY = 85
"""Quality of such a WebP, 0 to 100."""


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return an image, uint8 [H, W, C], as a PNG file; one channel is grey."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Picture:
    """A picture embedded in a page.

    Attributes:
        data: the file, PNG or WebP.
        width, height: in pixels.
    """

    data: bytes
    width: int
    height: int

    @classmethod
    def of_file(cls, data: bytes) -> Picture:
        """Return the picture in a file, re-encoded if it is large."""
        with PIL.Image.open(io.BytesIO(data)) as image:
            if len(data) > LARGE_BYTES:
                smaller = io.BytesIO()
                image.convert("RGB").save(smaller, "WEBP", quality=QUALITY)
                data = min(data, smaller.getvalue(), key=len)
            return cls(data, *image.size)

    @classmethod
    def of_pixels(cls, pixels: NDArray[np.uint8]) -> Picture:
        """Return pixels, uint8 [H, W, 3], as a picture."""
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
        return cls.of_file(buffer.getvalue())

    @property
    def url(self) -> str:
        """The picture as a data URL."""
        kind = "webp" if self.data[:4] == b"RIFF" else "png"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"

    def shown(self, alt: str, caption: Words = "") -> Image:
        """Return the picture as a block of a page."""
        return Image(self.url, alt, caption, (self.width, self.height))
