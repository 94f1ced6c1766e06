"""Given pictures and masks as people have them: odd ones are seen upright and fit each other, bad ones are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.inference.inputs import check_given, read_images, read_mask
from pipelines.inference.request import EditRequest, InpaintRequest, RequestError

SHAPE = (3, 8, 8)
ORIENTATION = 0x0112


def saved(path: Path, pixels: np.ndarray, orientation: int | None = None, kind: str = "png") -> Path:
    """A picture that a camera holds as it lies, with the turn that shows it upright."""
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, kind, exif=exif)
    return path


def lying(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels in the file of a picture that an orientation turns upright."""
    turns = {1: lambda p: p, 3: lambda p: np.rot90(p, 2), 6: lambda p: np.rot90(p), 8: lambda p: np.rot90(p, -1)}
    return np.ascontiguousarray(turns[orientation](upright))


def hidden(mask: str, image: Path) -> np.ndarray:
    (given,) = read_images([image], SHAPE, lambda text: None)
    return read_mask(mask, given, SHAPE)


@pytest.mark.parametrize("of_image", [1, 3, 6, 8])
@pytest.mark.parametrize("of_mask", [1, 3, 6, 8])
@pytest.mark.parametrize("height, width", [(16, 16), (16, 24)])
def test_a_mask_hides_what_it_covers_of_the_upright_picture(tmp_path, of_image, of_mask, height, width):
    upright = np.full((height, width, 3), 40, np.uint8)
    upright[: height // 2] = 200  # the sky
    covered = np.zeros((height, width), np.uint8)
    covered[: height // 2] = 255
    image = saved(tmp_path / "image.png", lying(upright, of_image), of_image)
    mask = saved(tmp_path / "mask.png", lying(covered, of_mask), of_mask)
    (given,) = read_images([image], SHAPE, lambda text: None)
    assert given.size == (width, height)
    assert (given.pixels[hidden(str(mask), image)] > 120).all()  # edges are softened where a picture is made smaller
    assert (given.pixels[~hidden(str(mask), image)] < 120).all()


@pytest.mark.parametrize("mask", ["half:top", "box:0,0,8,4"])
def test_a_drawn_mask_is_that_of_the_upright_picture_too(tmp_path, mask):
    upright = np.full((8, 8, 3), 40, np.uint8)
    upright[:4] = 200
    image = saved(tmp_path / "image.png", lying(upright, 6), 6)
    (given,) = read_images([image], SHAPE, lambda text: None)
    assert (given.pixels[hidden(mask, image)] == 200).all()


@pytest.mark.parametrize("kind", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_mask_may_have_any_kind_of_pixels(tmp_path, kind):
    image = saved(tmp_path / "image.png", np.zeros((8, 8, 3), np.uint8))
    covered = np.zeros((8, 8), np.uint8)
    covered[2:4, 1:7] = 255
    if kind == "I;16":
        Image.fromarray(covered.astype(np.uint16) * 257).save(tmp_path / "mask.png")
    else:
        Image.fromarray(covered).convert(kind).save(tmp_path / "mask.png")
    assert np.array_equal(hidden(str(tmp_path / "mask.png"), image), covered > 0)


FULL, NONE, PART = (np.full((8, 8), value, np.uint8) for value in (255, 0, 0))
PART[0] = 255
REFUSED = {
    "a mask of nothing": (NONE, "hides no pixel"),
    "a mask of everything": (FULL, "hides every pixel"),
    "a mask that is too dark to hide anything": (PART // 2, "hides no pixel"),
    "a mask of another size": (np.zeros((5, 7), np.uint8), r"is 5x7 \(height x width\): it must have the size of"),
    "a mask of a pixel": (np.zeros((1, 1), np.uint8), r"is 1x1 \(height x width\): it must have the size of"),
    "a mask of 10,000 pixels in a line": (
        np.zeros((1, 10_000), np.uint8),
        r"is 1x10000 \(height x width\): it must have the size of",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_mask_that_cannot_be_used_is_refused_with_what_it_would_have_to_be(tmp_path, kind):
    pixels, message = REFUSED[kind]
    image = saved(tmp_path / "image.png", np.zeros((8, 8, 3), np.uint8))
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=message) as raised:
        hidden(str(tmp_path / "mask.png"), image)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "mask, message",
    [("box:0,0,9,1", "does not lie within the model's images, 8 pixels wide and 8 high"), ("half:left", None)],
)
def test_a_box_has_to_lie_within_the_model(tmp_path, mask, message):
    image = saved(tmp_path / "image.png", np.zeros((8, 8, 3), np.uint8))
    if message is None:
        assert hidden(mask, image).sum() == 32
        return
    with pytest.raises(RequestError, match=message):
        hidden(mask, image)


BAD_FILES = {
    "nothing": (None, "cannot be read: No such file or directory"),
    "no bytes": (b"", "is not an image of a known kind"),
    "a text": (b"hello", "is not an image of a known kind"),
    "a name that is too long": ("x" * 300, "cannot be read: File name too long"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("as_mask", [False, True])
def test_a_file_that_is_no_picture_is_refused_before_there_is_a_model(tmp_path, kind, as_mask):
    content, message = BAD_FILES[kind]
    good = saved(tmp_path / "good.png", np.zeros((8, 8, 3), np.uint8))
    bad = tmp_path / (content if isinstance(content, str) else "bad.png")
    if isinstance(content, bytes):
        bad.write_bytes(content)
    request = InpaintRequest.of(images=[good], masks=[str(bad)]) if as_mask else EditRequest.of(images=[good, bad])
    with pytest.raises(RequestError) as raised:
        check_given(request)
    assert f"the {'mask' if as_mask else 'image'} {bad} {message}" in str(raised.value)
    assert str(raised.value).endswith("half:SIDE") == as_mask
    check_given(InpaintRequest.of(images=[good], masks=[str(good), "half:left", "box:0,0,1,1"]))
