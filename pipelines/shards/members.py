"""Decode and check the members of a sample: image, label, text and embedding."""

from __future__ import annotations

import io
import json
import math
import struct
import threading
import tokenize
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ddpm.image_size import ImageSize, height_width, in_words
from pipelines.presentation.errors import PipelineError

IMAGE_MEMBERS = ("png", "jpg", "jpeg", "webp", "npy")
"""Extensions of images, in order of preference: of several images in a sample, the first one is used."""
KNOWN_MEMBERS = (*IMAGE_MEMBERS, "cls", "txt", "json", "emb.npy")
MAX_CLASSES = 100_000
Embedding = tuple[NDArray[np.float16] | None, NDArray[np.float16] | None]
"""`pooled` [D] and `text` [L, D'] of a caption."""
T = TypeVar("T")

cv2.setNumThreads(1)  # readers decode in threads of their own

# Not all of Pillow's formats, because some of them start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP")
_GREY = ("1", "L", "LA", "La")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
_NO_ARRAY = (*_UNDECODABLE, TypeError, LookupError, RecursionError, MemoryError, tokenize.TokenError)
"""Errors of NumPy, which has Python read the header of an array, on damaged ones."""
_PARSING = threading.Lock()


@dataclass(frozen=True)
class Flaw:
    """One thing that is wrong with a sample: an identifier for programs, and a description for people."""

    kind: str
    reason: str


class FlawError(PipelineError):
    """A member is missing, damaged, or does not fit the dataset."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.flaw = Flaw(kind, reason)


@dataclass(frozen=True)
class SampleFormat:
    """The properties that every sample of a dataset has; None where a property is not known and not checked.

    Attributes:
        image_size: height and width in pixels; one number for square images.
        channels: 1 (grey) or 3 (RGB).
        labelled: whether each sample has a `cls`.
        classes: number of classes.
    """

    image_size: ImageSize | None = None
    channels: int | None = None
    labelled: bool | None = None
    classes: int | None = None


@dataclass(frozen=True)
class Examined:
    """The result of checking a sample: its pixels [H, W, 1 or 3] and label where they can be read, and its flaws."""

    pixels: NDArray[np.uint8] | None
    label: int | None
    flaws: tuple[Flaw, ...]


def decode_image(members: Mapping[str, bytes | memoryview], channels: int | None = None) -> NDArray[np.uint8]:
    """Decode a sample's image into pixels, uint8 [H, W, C].

    Args:
        members: extension -> bytes.
        channels: 1 for grey or 3 for RGB; None to keep a grey image grey and make any other RGB.

    Raises:
        FlawError: there is no image, or it cannot be read.
    """
    name = next((extension for extension in IMAGE_MEMBERS if extension in members), None)
    if name is None:
        raise FlawError("no-image", _no_image(members))
    if name == "npy":
        return _from_array(members[name], channels)
    try:
        with Image.open(io.BytesIO(members[name]), formats=_FORMATS) as image:
            if image.mode not in _GREY + _COLOUR:
                raise FlawError("channels", f"{name} has pixels of mode {image.mode}: write 8 bits, grey or colour")
            grey = image.mode in _GREY if channels is None else channels == 1
            pixels = np.asarray(on_white(image)[0].convert("L" if grey else "RGB"))
    except FlawError:
        raise
    except UnidentifiedImageError as error:
        raise FlawError("decode", f"{name} cannot be decoded: it is no PNG, JPEG or WebP image") from error
    except (*_UNDECODABLE, Image.DecompressionBombError) as error:
        raise FlawError("decode", f"{name} cannot be decoded: {error}") from error
    return pixels.reshape(*pixels.shape[:2], -1)


def on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return an image as it looks on a white page, and whether any of it was transparent.

    What lies below transparent pixels is never seen, and mostly black. An image without transparency, or of more than
    8 bits, is returned as it is.
    """
    if not image.has_transparency_data or image.mode not in _GREY + _COLOUR:
        return image, False
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(rgba)
    return white.convert("L" if image.mode in _GREY else "RGB"), rgba.getchannel("A").getextrema() != (255, 255)


def decode_pixels(members: Mapping[str, bytes | memoryview], size: ImageSize, channels: int) -> NDArray[np.uint8]:
    """Decode an image of known form into pixels [H, W, channels]: `decode_image`, three times as fast.

    Raises:
        FlawError: there is no image, it cannot be read, or it has another size.
    """
    name = next((extension for extension in IMAGE_MEMBERS if extension in members), None)
    pixels = None if name is None else _decode_fast(name, memoryview(members[name]), channels)
    if pixels is None:
        pixels = decode_image(members, channels)
    if pixels.shape[:2] != height_width(size):
        raise FlawError("shape", f"is {pixels.shape[0]}x{pixels.shape[1]}, dataset.json says {in_words(size)}")
    return pixels


def _decode_fast(name: str, data: memoryview, channels: int) -> NDArray[np.uint8] | None:
    """Decode with OpenCV where it gives exactly the pixels that Pillow gives; None where it might not.

    OpenCV releases the interpreter's lock, so that threads decode in parallel.
    """
    if name == "npy":
        try:
            header = _npy_header(data)
        except ValueError:
            return None
        shape = (*header.shape, 1)[:3]
        if len(header.shape) not in (2, 3) or header.dtype != np.uint8 or header.by_columns or shape[-1] != channels:
            return None
        if math.prod(shape) + header.bytes != len(data):
            return None
        return np.frombuffer(data, np.uint8, offset=header.bytes).reshape(shape)
    if name == "png":
        # Only 8 bits, grey or RGB, without palette or transparency.
        whole = len(data) > 34 and data[-8:-4] == b"IEND"
        if not whole or data[24] != 8 or data[25] not in ((0, 2) if channels == 3 else (0,)):
            return None
        # One colour may be transparent, where anything comes before the pixels; in files of an ingest nothing does.
        if data[37:41] != b"IDAT" and b"tRNS" in bytes(data).partition(b"IDAT")[0]:
            return None
    elif channels == 1 or b"Adobe" in bytes(data[:1024]):  # a JPEG in CMYK, or with another colour transform
        return None
    elif data[12:15] == b"VP8" and data[15:16] != b" " and data[20 if data[15:16] == b"X" else 24] & 0x10:
        return None  # a WebP with transparency, as its header says
    flags = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if pixels is None else pixels.reshape(*pixels.shape[:2], channels)


def _read_npy(data: bytes | memoryview) -> NDArray[Any]:
    """Return the array in a `.npy` file.

    Raises:
        ValueError: it is none, holds objects of Python, or less than its header promises.
    """
    header = _npy_header(data)
    if header.dtype.hasobject:
        raise ValueError("it holds objects of Python")
    # NumPy's own function makes room for whatever a header promises before it looks at what follows.
    promised, held = math.prod(header.shape) * header.dtype.itemsize, len(data) - header.bytes
    if promised > held:
        raise ValueError(f"it promises {promised:,} bytes and holds {held:,}")
    try:
        order: Literal["F", "C"] = "F" if header.by_columns else "C"
        return np.ndarray(header.shape, header.dtype, data, header.bytes, order=order).copy()
    except _NO_ARRAY as error:
        raise ValueError(str(error) or type(error).__name__) from error


def npy_header(data: bytes | memoryview) -> bytes:
    """Return the bytes of a `.npy` file that come before the numbers; none where it is no such file."""
    try:
        return bytes(data[: _npy_header(data).bytes])
    except ValueError:
        return b""


class _NpyHeader(NamedTuple):
    """The header of a `.npy` file, and its length in bytes."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype[Any]
    bytes: int


def _npy_header(data: bytes | memoryview) -> _NpyHeader:
    """Return the header of a `.npy` file.

    Raises:
        ValueError: it has none.
    """
    # The first version writes the length of what follows in two bytes, later ones in four.
    fixed = 10 if bytes(data[6:7]) == b"\x01" else 12
    return _parse_npy_header(bytes(data[: fixed + int.from_bytes(data[8:fixed], "little")]))


@lru_cache(maxsize=64)
def _parse_npy_header(header: bytes) -> _NpyHeader:
    """Return what a header says. The result is cached, because all samples of a dataset have the same header.

    NumPy has Python parse it. CPython 3.11 counts the depth of that for all threads together, so that it fails with a
    `SystemError` where another thread parses in between, as may happen when garbage is collected: one at a time.
    """
    file = io.BytesIO(header)
    try:
        with _PARSING:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return _NpyHeader(*read(file), len(header))
    except _NO_ARRAY as error:
        raise ValueError(str(error) or type(error).__name__) from error


def require_member(members: Mapping[str, T], name: str) -> T:
    """Return a member that every sample of the dataset should have.

    Raises:
        FlawError: this sample does not have it.
    """
    if name not in members:
        raise FlawError("member", f"has no {name}, other samples of the dataset do")
    return members[name]


def unpack_embedding(data: bytes | memoryview) -> Embedding:
    """Return (pooled [D], text [L, D']) of an `emb.npy` of an ingest; None for a field that its encoder does not give.

    Raises:
        FlawError: it cannot be read, or has neither field.
    """
    try:
        record = _read_npy(data)
    except ValueError as error:
        raise FlawError("embedding", f"emb.npy cannot be read: {error}") from error
    names = record.dtype.names or ()
    if not {"pooled", "text"} & set(names):
        raise FlawError(
            "embedding", f"emb.npy ({record.dtype}) has neither `pooled` nor `text`: ingest it with an encoder"
        )
    return (record["pooled"] if "pooled" in names else None), (record["text"] if "text" in names else None)


def _no_image(names: Collection[str]) -> str:
    """Return the reason for a sample that has only these members."""
    return f"has no image: a sample needs one of {', '.join(IMAGE_MEMBERS)}; it has {', '.join(sorted(names))}"


def _from_array(data: bytes | memoryview, channels: int | None) -> NDArray[np.uint8]:
    """Decode an image that is stored as a NumPy array; see `decode_image`."""
    try:
        array = _read_npy(data)
    except ValueError as error:
        raise FlawError("decode", f"npy cannot be decoded: {error}") from error
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise FlawError(
            "channels", f"npy is {array.dtype} {list(array.shape)}: write uint8 [H, W], [H, W, 1] or [H, W, 3]"
        )
    if channels == 3 and array.shape[-1] == 1:
        return np.repeat(array, 3, axis=-1)
    if channels == 1 and array.shape[-1] == 3:
        return np.asarray(Image.fromarray(array).convert("L"))[..., None]
    return array


def decode_label(data: bytes) -> int:
    """Return the class index in a `cls` member.

    Raises:
        FlawError: it is not a whole number >= 0.
    """
    text = data[:40].decode("ascii", "backslashreplace").strip()
    if not text.isdecimal() or len(data) > 40:
        raise FlawError("label", f"cls is {text!r}: write a class index, a whole number from 0 on")
    return int(text)


def examine(members: Mapping[str, bytes], form: SampleFormat, others: Collection[str] = ()) -> Examined:
    """Check all known members of a sample.

    Args:
        members: extension -> bytes.
        form: the properties that every sample of the dataset has.
        others: extensions of further members, whose bytes are not checked.
    """
    flaws: list[Flaw] = []
    pixels, label = None, None
    try:
        if not any(extension in members for extension in IMAGE_MEMBERS):
            raise FlawError("no-image", _no_image({*members, *others}))
        pixels = decode_image(members)
        flaws += _check_pixels(pixels, form)
        _check_png(members)
    except FlawError as error:
        flaws.append(error.flaw)
    try:
        if "cls" in members:
            label = decode_label(members["cls"])
        flaws += _check_label(label, form)
    except FlawError as error:
        flaws.append(error.flaw)
    return Examined(pixels, label, (*flaws, *_check_texts(members)))


def _check_pixels(pixels: NDArray[np.uint8], form: SampleFormat) -> list[Flaw]:
    height, width, channels = pixels.shape
    flaws = []
    if form.image_size is not None and (height, width) != height_width(form.image_size):
        flaws.append(Flaw("shape", f"is {height}x{width} pixels, the dataset is {in_words(form.image_size)}"))
    if form.channels == 1 and channels == 3:
        flaws.append(Flaw("channels", "is in colour, the dataset is grey (1 channel)"))
    return flaws


def _check_png(members: Mapping[str, bytes]) -> None:
    """Check the checksums of a PNG, which Pillow ignores when it decodes pixels.

    Raises:
        FlawError: one of them is wrong.
    """
    if "png" not in members:
        return
    try:
        with Image.open(io.BytesIO(members["png"]), formats=_FORMATS) as image:
            image.verify()
    except _UNDECODABLE as error:
        raise FlawError("decode", f"png is damaged: {error}") from error


def _check_label(label: int | None, form: SampleFormat) -> list[Flaw]:
    if label is None:
        return [Flaw("label", "has no cls member, other samples of the dataset do")] if form.labelled else []
    if form.labelled is False:
        return [Flaw("label", f"has the label {label}, the dataset has no classes")]
    if label >= (form.classes if form.classes is not None else MAX_CLASSES):
        allowed = f"the dataset has {form.classes}" if form.classes is not None else f"at most {MAX_CLASSES:,} can be"
        return [Flaw("label", f"has the label {label}, but classes are counted from 0 and {allowed}")]
    return []


def _check_texts(members: Mapping[str, bytes]) -> list[Flaw]:
    flaws = []
    try:
        members.get("txt", b"").decode()
    except UnicodeDecodeError as error:
        flaws.append(Flaw("text", f"txt is not UTF-8: {error.reason} at byte {error.start}"))
    try:
        json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        flaws.append(Flaw("json", f"json cannot be read: {error}"))
    if "emb.npy" in members:
        try:
            array = _read_npy(members["emb.npy"])
            # An ingest writes one record of arrays; other tools write a plain array.
            parts = [array[name] for name in array.dtype.names or ()] or [array]
            if not all(part.dtype.kind == "f" and np.isfinite(part).all() for part in parts):
                flaws.append(Flaw("embedding", f"emb.npy ({array.dtype}) holds values that are no finite floats"))
        except ValueError as error:
            flaws.append(Flaw("embedding", f"emb.npy cannot be read: {error}"))
    return flaws
