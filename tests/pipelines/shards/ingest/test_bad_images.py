"""Odd image files come out as a person sees them, and what is no image is refused in a line that says why."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.shards.ingest.encode import ImageFormat, decode_grey, encode_image
from pipelines.shards.ingest.readers import UnreadableError

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)
FRAMES = [Image.new("RGB", (8, 8), (value, value, value)) for value in (10, 100, 200)]
FIRST = np.full((8, 8, 3), 10, np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    pixels: bytes,
    width: int = 8,
    height: int = 8,
    *,
    bits: int = 8,
    colour: int = 2,
    interlaced: bool = False,
    more: bytes = b"",
) -> bytes:
    """A PNG whose rows are given as they are in the file, each behind the number of its filter."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def rows(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)


def interlaced(pixels: np.ndarray) -> bytes:
    """The seven passes of Adam7, by which a picture is seen roughly before it is there."""
    steps = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    return b"".join(rows(pixels[top::down, left::right]) for left, top, right, down in steps)


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(RGB, kind, exif=exif, **({"lossless": True} if kind == "webp" else {}))


def sixteen(channels: int, opaque: slice) -> np.ndarray:
    """Sixteen bits a channel, of which the last is the transparency."""
    pixels = np.full((8, 8, channels), 0x8000, np.uint16)
    pixels[..., -1] = 0
    pixels[:, opaque, -1] = 0xFFFF
    return pixels


def palette(kind: str, **options: Any) -> bytes:
    """The upper half red by the first colour of a palette, the lower one green by the second."""
    image = Image.new("P", (8, 8))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0] * 32 + [1] * 32)
    return saved(image, kind, **options)


def halves(upper: tuple[int, ...], lower: tuple[int, ...]) -> np.ndarray:
    return np.array([[upper] * 8] * 4 + [[lower] * 8] * 4, np.uint8)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY = np.full((8, 8, 3), 128, np.uint8)
LEFT = np.where((np.arange(8) < 4)[None, :, None], GREY, np.uint8(255))
SEEN: dict[str, tuple[bytes, np.ndarray, tuple[str, ...]]] = {
    "an interlaced PNG": (png(interlaced(PIXELS), interlaced=True), PIXELS, ()),
    "a PNG of 16 bits": (png(rows(PIXELS.astype(np.uint16) * 257), bits=16), PIXELS, ()),
    "a grey PNG of 16 bits": (
        png(rows(np.full((8, 8), 0x8080, np.uint16)), bits=16, colour=0),
        GREY,
        ("I;16 made RGB",),
    ),
    "a PNG of 16 bits with alpha": (
        png(rows(sixteen(4, slice(4))), bits=16, colour=6),
        LEFT,
        ("transparent pixels made white", "RGBA made RGB"),
    ),
    "a grey PNG of 16 bits with alpha": (
        png(rows(sixteen(2, slice(4))), bits=16, colour=4),
        LEFT,
        ("transparent pixels made white", "RGBA made RGB"),
    ),
    "a PNG of one bit": (saved(Image.new("1", (8, 8), 1), "png"), np.full((8, 8, 3), 255, np.uint8), ("1 made RGB",)),
    "an animated PNG": (
        saved(FRAMES[0], "png", save_all=True, append_images=FRAMES[1:]),
        FIRST,
        ("the first of several pictures in a file",),
    ),
    "an animated GIF": (
        saved(FRAMES[0], "gif", save_all=True, append_images=FRAMES[1:]),
        FIRST,
        ("the first of several pictures in a file", "P made RGB"),
    ),
    "an animated WebP": (
        saved(FRAMES[0], "webp", save_all=True, append_images=FRAMES[1:], lossless=True),
        FIRST,
        ("the first of several pictures in a file",),
    ),
    "a TIFF of several pages": (
        saved(FRAMES[0], "tiff", save_all=True, append_images=FRAMES[1:]),
        FIRST,
        ("the first of several pictures in a file",),
    ),
    "a GIF of one picture": (saved(FRAMES[0], "gif"), FIRST, ("P made RGB",)),
    "a picture with another one behind it": (saved(RGB, "png") + saved(FRAMES[0], "png"), PIXELS, ()),
    "a colour profile": (saved(RGB, "png", icc_profile=SRGB), PIXELS, ()),
    "a colour profile that is none": (saved(RGB, "png", icc_profile=b"none"), PIXELS, ()),
    "a TIFF in CMYK": (saved(RGB.convert("CMYK"), "tiff"), PIXELS, ("CMYK made RGB",)),
    "a JPEG in CMYK": (
        saved(Image.new("RGB", (8, 8), (200, 100, 50)).convert("CMYK"), "jpeg", quality=100),
        np.full((8, 8, 3), (200, 100, 50), np.uint8),
        ("CMYK made RGB",),
    ),
    "a palette": (palette("png"), halves((255, 0, 0), (0, 255, 0)), ("P made RGB",)),
    "a palette with a transparent colour": (
        palette("png", transparency=0),
        halves((255, 255, 255), (0, 255, 0)),
        ("transparent pixels made white", "P made RGB"),
    ),
    "a palette with a colour that is half transparent": (
        palette("png", transparency=bytes([128, 255])),
        halves((255, 127, 127), (0, 255, 0)),
        ("transparent pixels made white", "P made RGB"),
    ),
    "a GIF with a transparent colour": (
        palette("gif", transparency=1),
        halves((255, 0, 0), (255, 255, 255)),
        ("transparent pixels made white", "P made RGB"),
    ),
    "a picture on its side": (
        turned("png", 6),
        np.rot90(PIXELS, -1),
        ("turned as their EXIF orientation says",),
    ),
    "a mirrored picture": (turned("webp", 2), PIXELS[:, ::-1], ("turned as their EXIF orientation says",)),
    "an orientation that is none": (turned("png", 99), PIXELS, ()),
    "a single pixel": (
        saved(Image.new("RGB", (1, 1), (9, 8, 7)), "png"),
        np.full((8, 8, 3), (9, 8, 7), np.uint8),
        ("smaller than 8 pixels, enlarged",),
    ),
    "a line of 100,000 pixels": (
        saved(Image.new("RGB", (100_000, 1), (9, 8, 7)), "png"),
        np.full((8, 8, 3), (9, 8, 7), np.uint8),
        ("smaller than 8 pixels, enlarged",),
    ),
    "a column of 100,000 pixels": (
        saved(Image.new("RGB", (1, 100_000), (9, 8, 7)), "png"),
        np.full((8, 8, 3), (9, 8, 7), np.uint8),
        ("smaller than 8 pixels, enlarged",),
    ),
    "more rows than the header says": (png(rows(PIXELS) + bytes(1_000_000)), PIXELS, ()),
}
UNKNOWN = "is not an image of a known kind (PNG, JPEG, WEBP, BMP, TIFF, GIF, AVIF, HEIF), or its beginning is damaged"
REFUSED: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", UNKNOWN),
    "a text": (b"hello", UNKNOWN),
    "a drawing of lines": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UNKNOWN),
    "a page of PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", UNKNOWN),
    "the first bytes of a PNG": (saved(RGB, "png")[:8], UNKNOWN),
    "no width": (png(b"", width=0), UNKNOWN),
    "a PNG that was cut short": (saved(RGB, "png")[:-30], "is damaged: Truncated File Read"),
    "a PNG without its end": (saved(RGB, "png")[:-12], "is damaged: truncated PNG file"),
    "a JPEG that was cut short": (saved(RGB, "jpeg")[:-30], "is damaged: image file is truncated"),
    "less than a row": (png(bytes(10)), "is damaged: image file is truncated"),
    "more pixels than fit any memory": (png(b"\0", 60_000, 60_000), "is damaged: Image size (3600000000 pixels)"),
    "a text of 80 MB within a PNG": (
        png(rows(PIXELS), more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20)))),
        "is damaged: Decompressed data too large",
    ),
    "pixels that are floats": (
        saved(Image.fromarray(np.ones((8, 8), np.float32)), "tiff"),
        "has pixels of mode F, whose range is open: save it with 8 or 16 bits",
    ),
    "pixels of 32 bits": (
        saved(Image.fromarray(np.ones((8, 8), np.int32)), "tiff"),
        "has pixels of mode I, whose range is open: save it with 8 or 16 bits",
    ),
}


@pytest.mark.parametrize("kind", SEEN)
def test_an_odd_image_is_taken_as_it_appears_and_its_changes_are_reported(kind):
    data, pixels, changes = SEEN[kind]
    encoded = encode_image(data, ImageFormat(8, 3))
    assert encoded.changes == changes
    np.testing.assert_allclose(encoded.pixels, pixels, atol=1)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded.data)).convert("RGB")), encoded.pixels)


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_of_an_animation_that_has_the_encoding_one_picture_is_kept(encoding):
    data = saved(FRAMES[0], encoding, save_all=True, append_images=FRAMES[1:], lossless=True)
    encoded = encode_image(data, ImageFormat(8, 3, "keep", encoding))
    assert not getattr(Image.open(io.BytesIO(encoded.data)), "is_animated", False)
    assert np.array_equal(encoded.pixels, FIRST)


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_not_images_are_refused_with_the_reason(kind):
    data, reason = REFUSED[kind]
    for read in (lambda: encode_image(data, ImageFormat(8, 3)), lambda: decode_grey(data)):
        with pytest.raises(UnreadableError) as raised:
            read()
        assert str(raised.value).startswith(reason)
        assert "\n" not in str(raised.value)
