"""What the page sends is a request of the server, and what it shows says where each picture comes from."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.inference.request import RequestError, SampleRequest
from pipelines.serving.bodies import decode_png, encode_png
from pipelines.serving.forms import BRUSH, HALVES, OWN, enlarged, figures, film, picture_and_mask, write_form


def drawing(size: int = 80, brushed: tuple[slice, slice] | None = None) -> dict:
    background = np.zeros((size, size, 4), np.uint8)
    background[: size // 2] = 200
    background[..., 3] = 255
    layer = np.zeros((size, size, 4), np.uint8)
    if brushed is not None:
        layer[brushed] = 255
    return {"background": background, "layers": [layer], "composite": background}


def test_a_form_that_nobody_touched_asks_with_the_models_own_settings():
    given = {"labels": [], "prompts": " ", "sampler": OWN, "steps": 4, "seed": None, "eta": "", "frames": "8"}
    body = write_form(SampleRequest, "champion", given, {"sampler": OWN, "steps": 4, "frames": "8"})
    assert body == {"model": "champion", "task": "sample"}


def test_the_body_of_a_form_is_a_request():
    given = {"labels": ["3", "7"], "prompts": " a heart ", "negative_prompt": "", "sampler": "ddim", "steps": 20}
    more = {"guidance": 2.5, "seed": 7.0, "count": 3.0, "interval": "0.2, 0.8", "interpolate": "", "frames": "12"}
    body = write_form(SampleRequest, "champion", given | more, {})
    fields = {name: value for name, value in body.items() if name not in ("model", "task")}
    request = SampleRequest.of(**fields)
    assert request.labels == ("3", "7")
    assert request.prompts == ("a heart",)
    assert request.seed == 7
    assert request.count == 3
    assert request.frames == 12
    assert request.sampling == {"kind": "ddim", "steps": 20, "scale": 2.5, "interval": [0.2, 0.8]}


def test_a_brushed_part_is_what_the_mask_hides():
    picture, mask = picture_and_mask(drawing(brushed=(slice(0, 20), slice(0, 40))), BRUSH, 8)
    hidden = decode_png(mask)[..., 0]
    assert hidden.shape == (8, 8)
    assert (hidden[:2, :4] == 255).all()
    assert hidden.sum() == 255 * 8
    assert (decode_png(picture)[:4] == 200).all()
    assert (decode_png(picture)[4:] == 0).all()


def test_a_pixel_of_which_any_part_is_brushed_is_hidden():
    _, mask = picture_and_mask(drawing(brushed=(slice(10, 11), slice(10, 11))), BRUSH, 8)
    assert decode_png(mask)[1, 1, 0] == 255
    assert decode_png(mask).sum() == 255


def test_a_half_needs_no_brush():
    for name, mask in HALVES.items():
        assert picture_and_mask(drawing(), name, 8)[1] == mask


def test_a_wide_picture_and_its_mask_are_cut_to_the_same_square():
    wide = {"background": np.zeros((40, 80, 4), np.uint8), "layers": [np.zeros((40, 80, 4), np.uint8)]}
    wide["background"][:, 20:60] = 255
    wide["layers"][0][:, 20:40] = 255
    picture, mask = picture_and_mask(wide, BRUSH, 8)
    assert (decode_png(picture) == 255).all()
    hidden = decode_png(mask)
    assert (hidden[:, :4] == 255).all()
    assert (hidden[:, 4:] == 0).all()


def test_a_picture_and_its_mask_are_cut_to_the_proportions_of_the_model():
    tall = {"background": np.zeros((100, 80, 4), np.uint8), "layers": [np.zeros((100, 80, 4), np.uint8)]}
    tall["background"][20:80] = 255
    tall["layers"][0][20:80, :40] = 255
    picture, mask = picture_and_mask(tall, BRUSH, (6, 8))
    assert decode_png(picture).shape[:2] == (6, 8)
    assert (decode_png(picture) == 255).all()
    hidden = decode_png(mask)
    assert hidden.shape[:2] == (6, 8)
    assert (hidden[:, :4] == 255).all()
    assert (hidden[:, 4:] == 0).all()


def test_what_is_transparent_in_a_picture_is_white():
    background = np.full((8, 8, 4), 90, np.uint8)  # of which a little shows
    background[:4, :, 3] = 0
    background[4:, :, 3] = 255
    picture, _ = picture_and_mask({"background": background}, next(iter(HALVES)), 8)
    assert (decode_png(picture)[:4] == 255).all()
    assert (decode_png(picture)[4:] == 90).all()


@pytest.mark.parametrize("form", [(8, 8), (8, 8, 1), (8, 8, 2), (2, 8, 8, 3)])
def test_a_picture_without_colours_is_refused(form):
    with pytest.raises(RequestError, match=r"allowed is uint8 \[height, width, 3\], or 4 with transparency"):
        picture_and_mask({"background": np.zeros(form, np.uint8)}, next(iter(HALVES)), 8)


@pytest.mark.parametrize("given", [None, {"background": None, "layers": []}])
def test_a_missing_picture_is_said(given):
    with pytest.raises(RequestError, match="no picture yet"):
        picture_and_mask(given, BRUSH, 8)


def test_a_missing_brush_is_said():
    with pytest.raises(RequestError, match="nothing is brushed"):
        picture_and_mask(drawing(), BRUSH, 8)


def test_a_small_picture_is_enlarged_without_blur():
    pixels = np.array([[[0], [255]], [[255], [0]]], np.uint8)
    large = np.asarray(enlarged(encode_png(pixels)))
    assert large.shape == (320, 320, 3)
    assert set(np.unique(large)) == {0, 255}
    assert (large[:160, :160] == 0).all()


def test_pictures_say_what_they_were_drawn_from_and_are_escaped():
    picture = encode_png(np.zeros((2, 2, 1), np.uint8))
    answer = {"images": [picture, picture], "rows": [{"label": "<b>", "seed": 3, "id": 0}, {"seed": 3, "id": 1}]}
    shown = figures(answer)
    assert shown.count("<img") == 2
    assert "&lt;b&gt;, seed 3" in shown
    assert "<b>" not in shown
    assert "seed 3, number 1" in shown


def test_a_film_shows_each_state_with_its_noise_level():
    picture = encode_png(np.zeros((2, 2, 1), np.uint8))
    reel = {"t": [1000.0, 500.0], "x_t": [[picture], [picture]], "x0": [[picture], [picture]]}
    shown = film({"film": reel})
    assert shown.count("<img") == 4
    assert "x_t at t = 1000" in shown
    assert "t = 500" in shown
