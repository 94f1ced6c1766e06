"""Encoding of images and caption embeddings as members of a sample; equal input gives equal bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from ddpm.conditioning import Conditioning
from ddpm.image_size import ImageSize, as_setting, central_part, height_width, in_words
from pipelines.config.sections import Encoding, Geometry
from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.readers import UnreadableError
from pipelines.shards.members import on_white

CaptionEncoder = Callable[[Sequence[str]], Conditioning]
"""Maps captions to their embeddings."""

ORIENTATION = 0x0112  # EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Not all of Pillow's formats, because some of them start other programs. The plugins are imported here, because Pillow
# loads them at first use without a lock, so that threads would refuse good images. JPEG includes MPO; HEIF is HEIC too,
# as telephones write it, whose pixels come upright.
pillow_heif.register_heif_opener()
FORMATS = tuple(
    str(plugin.format)
    for plugin in (
        PngImagePlugin.PngImageFile,
        JpegImagePlugin.JpegImageFile,
        WebPImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
        GifImagePlugin.GifImageFile,
        AvifImagePlugin.AvifImageFile,
        pillow_heif.HeifImageFile,
    )
)
KNOWN = ", ".join(FORMATS)
_PILLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    # Lossless with method 0: 10 % smaller than PNG in a third of the time; the default takes 36 times as long for 5 %.
    "webp": ("WEBP", {"lossless": True, "method": 0}),
}
_IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA")
# Errors of Pillow's decoders on damaged files: OSError, ValueError, SyntaxError, TypeError and struct.error occurred in
# 100,000 files that were damaged at random, EOFError and RuntimeError in some hundred of HEIC and AVIF, the others are
# raised in its source.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageFormat:
    """The format to which every image of a dataset is converted.

    Attributes:
        size: height and width in pixels; one number for square images.
        channels: 1 (grey) or 3 (RGB).
        geometry: "crop" resizes the largest central part that has the format's proportions, "resize" the whole
            image, "keep" accepts only images of this size and changes no pixel.
        encoding: "png" and "webp" are lossless, "jpg" has quality 95 without chroma subsampling, "npy" is the uint8
            array [H, W, channels].
    """

    size: ImageSize
    channels: int
    geometry: Geometry = "crop"
    encoding: Encoding = "png"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            DatasetError: a setting is invalid; names the value and what is allowed.
        """
        if min(height_width(self.size)) < 1:
            raise DatasetError(f"the image size must be at least 1 pixel, got {as_setting(self.size)}")
        if self.channels not in (1, 3):
            raise DatasetError(f"images have 1 channel (grey) or 3 (RGB), got {self.channels}")
        if self.geometry not in get_args(Geometry):
            raise DatasetError(f"unknown geometry {self.geometry!r}: choose crop, resize or keep")
        if self.encoding not in get_args(Encoding):
            raise DatasetError(f"unknown encoding {self.encoding!r}: choose png, jpg, webp or npy")

    @property
    def mode(self) -> str:
        """Return Pillow's name of the pixel format."""
        return "L" if self.channels == 1 else "RGB"


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image.

    Attributes:
        data: bytes of the member.
        pixels: the pixels that a reader decodes from it, uint8 [H, W, C].
        changes: changes to the image beyond crop and resize.
        size: width and height in pixels of the upright image before crop and resize.
    """

    data: bytes
    pixels: NDArray[np.uint8]
    changes: tuple[str, ...]
    size: tuple[int, int]


def encode_image(data: bytes, form: ImageFormat) -> EncodedImage:
    """Decode an image file, give it the format's shape and channels, and encode it.

    The EXIF orientation is applied, transparent pixels become white, and of several pictures in a file the first is
    used. Colour profiles are ignored. With `keep`, a file that already has the encoding is stored unchanged.

    Raises:
        UnreadableError: it is damaged, not an image, or cannot be converted to the format.
    """
    opened, kind, _ = _decode(data)
    image, changes = _turn(opened)
    if _has_frames(opened):
        changes.append("the first of several pictures in a file")
    size, mode = image.size, image.mode
    image, transparent = on_white(image)
    if transparent:
        changes.append("transparent pixels made white")
    unchanged = form.geometry == "keep" and not changes and mode == form.mode
    if mode != form.mode:
        changes.append(f"{mode} made {form.mode}")
        image = _convert(image, form.mode)
    height, width = height_width(form.size)
    if (image.height < height or image.width < width) and form.geometry != "keep":
        changes.append(f"smaller than {as_setting(form.size)} pixels, enlarged")
    image = _reshape(image, form)
    pixels = np.asarray(image, dtype=np.uint8).reshape(height, width, form.channels)
    if form.encoding == "npy":
        return EncodedImage(npy(pixels), pixels, tuple(changes), size)
    pillow, options = _PILLOW[form.encoding]
    if not (unchanged and kind == pillow):
        buffer = io.BytesIO()
        image.save(buffer, pillow, **options)
        data = buffer.getvalue()
        if form.encoding == "jpg":
            pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=np.uint8).reshape(pixels.shape)
    return EncodedImage(data, pixels, tuple(changes), size)


def decode_grey(data: bytes) -> NDArray[np.uint8]:
    """Decode an image file into grey values, uint8 [H, W], upright, ignoring transparency.

    Raises:
        UnreadableError: it is damaged, is no image, or has pixels of an open range.
    """
    image, _, _ = _decode(data)
    return np.array(_convert(_turn(image)[0], "L"))


def as_png(data: bytes) -> bytes:
    """Return an image file as PNG, upright and with its transparency; PNG files are returned unchanged.

    Raises:
        UnreadableError: it is damaged, is no image, or has pixels of an open range.
    """
    image, kind, _ = _decode(data)
    if kind == "PNG":
        return data
    image, _ = _turn(image)
    if image.mode not in _IN_PNG:
        image = _convert(image, "RGBA" if image.has_transparency_data else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image as it appears on screen.

    Attributes:
        image: upright image, on white where transparent; reduced in size if requested.
        size: width and height in pixels of the upright image in the file.
    """

    image: Image.Image
    size: tuple[int, int]


def open_image(data: bytes, *, reduced_to: int | None = None) -> DecodedImage:
    """Decode an image file, upright.

    Args:
        reduced_to: smallest sufficient width and height: large JPEGs are decoded at a fraction of their size, which is
        many times faster.

    Raises:
        UnreadableError: it is damaged, or is no image.
    """
    image, _, size = _decode(data, reduced_to)
    upright, _ = _turn(image)
    if upright.size != image.size and image.size[0] == upright.size[1]:
        size = (size[1], size[0])
    return DecodedImage(on_white(upright)[0], size)


def npy(array: NDArray[np.generic]) -> bytes:
    """Return an array as a `.npy` file, without pickle."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    return buffer.getvalue()


def pack_embeddings(cond: Conditioning) -> list[bytes]:
    """Return the `emb.npy` of each sample of a condition: one record with the fields of the encoder.

    `pooled` is float16 [D], `text` is float16 [L, D'] without padding. `numpy.load` without pickle and WebDataset's
    `decode()` both read it.

    Raises:
        DatasetError: the encoder gives neither, or its values do not fit float16.
    """
    columns: dict[str, list[NDArray[np.float32]]] = {}
    if cond.pooled is not None:
        columns["pooled"] = list(cond.pooled.detach().float().cpu().numpy())
    if cond.text is not None:
        tokens = cond.text.detach().float().cpu().numpy()
        masks = np.ones(tokens.shape[:2], bool) if cond.text_mask is None else cond.text_mask.cpu().numpy()
        columns["text"] = [t[mask] for t, mask in zip(tokens, masks, strict=True)]
    if not columns:
        raise DatasetError("the text encoder gives neither `pooled` nor `text`: it must return a Conditioning with one")
    packed = []
    for values in zip(*columns.values(), strict=True):
        record = np.zeros((), [(name, "<f2", value.shape) for name, value in zip(columns, values, strict=True)])
        for name, value in zip(columns, values, strict=True):
            if np.abs(value).max(initial=0) > np.finfo(np.float16).max or not np.isfinite(value).all():
                raise DatasetError(f"the text encoder's `{name}` holds values that float16 cannot: scale its output")
            record[name] = value
        packed.append(npy(record))
    return packed


def _decode(data: bytes, reduced_to: int | None = None) -> tuple[Image.Image, str | None, tuple[int, int]]:
    """Decode an image file; return the image, Pillow's name of its format, and the size in the file."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "PNG":
            image.verify()  # decoding alone ignores wrong checksums of pixels
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        size = image.size
        if reduced_to is not None:
            image.draft(None, (reduced_to, reduced_to))  # where the format can
        image.load()
        return image, image.format, size
    except UnidentifiedImageError as error:
        raise UnreadableError(
            f"is not an image of a known kind ({', '.join(FORMATS)}), or its beginning is damaged"
        ) from error
    except _DAMAGED as error:
        raise UnreadableError(f"is damaged: {error or type(error).__name__}") from error


def _has_frames(image: Image.Image) -> bool:
    """Return whether an opened file is animated or has several pages; telephones add a thumbnail or a depth map."""
    try:
        return image.format not in ("MPO", "HEIF") and bool(getattr(image, "is_animated", False))
    except _DAMAGED:
        return False


def _turn(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Apply the EXIF orientation, and return the changes; a damaged EXIF is ignored."""
    try:
        method = _UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except _DAMAGED:
        return image, ["EXIF is damaged, taken as upright"]
    if method is None:
        return image, []
    return image.transpose(method), ["turned as their EXIF orientation says"]


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to another pixel format; 16-bit values are scaled to 8 bits."""
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit values at 255, which makes nearly every pixel white.
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnreadableError(f"has pixels of mode {image.mode}, whose range is open: save it with 8 or 16 bits")
    try:
        return image.convert(mode)
    except _DAMAGED as error:
        raise UnreadableError(f"cannot be converted from {image.mode} to {mode}: {error}") from error


def _reshape(image: Image.Image, form: ImageFormat) -> Image.Image:
    height, width = height_width(form.size)
    if form.geometry == "keep":
        if image.size != (width, height):
            found, wanted = f"{image.height}x{image.width}", in_words(form.size)
            raise UnreadableError(
                f"is {found} pixels (height x width), not {wanted}: use the geometry crop or resize, or another size"
            )
        return image
    if form.geometry == "crop":
        top, left, rows, columns = central_part(image.height, image.width, form.size)
        if (rows, columns) != (image.height, image.width):
            image = image.crop((left, top, left + columns, top + rows))
    if image.size == (width, height):
        return image
    times = min(image.height / height, image.width / width)
    return image.resize((width, height), Image.Resampling.BOX if times > 2 else Image.Resampling.BICUBIC)
