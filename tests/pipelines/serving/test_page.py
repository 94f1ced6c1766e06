"""The page draws what a request draws, in every form, and says what the server refuses."""

from __future__ import annotations

import base64
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import requests
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from ddpm.model import load_model
from pipelines.config import compose
from pipelines.inference.pictures import picture
from pipelines.inference.request import EditRequest, InpaintRequest, SampleRequest
from pipelines.serving.bodies import encode_png
from pipelines.serving.forms import OWN
from pipelines.serving.served import load
from pipelines.serving.token import digest_of
from tests.pipelines.drawing import model_folder, save_picture
from tests.pipelines.serving.alone import Page
from tests.pipelines.serving.bad_requests import bomb
from tests.pipelines.serving.page_server import page_of

CLASSES = ("circle", "square", "7", "8", "9")
TOKEN = "a-token-of-enough-characters"
FILL_STEPS = 50
"""In which the model fills hidden pixels unless it is told otherwise: RePaint's, as far as it has noise levels."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model") / "model", classes=CLASSES)


@pytest.fixture(scope="module")
def page(model):
    with page_of(model) as address:
        yield Client(address, verbose=False)


def fields(labels, *, sampler=OWN, steps=4, scale=2.0, seed=0, count=1):
    return [labels, "", "", seed, count, sampler, steps, scale]


def shown(html):
    """Return the pictures of a page as base64 texts, in order."""
    return re.findall(r"data:image/png;base64,([^\"]+)", html)


def encoded(pictures):
    return [encode_png(image) for image in pictures.pixels]


def test_samples_are_those_of_the_request(page, model):
    html = page.predict(*fields(["square", "7"], sampler="ddim", steps=3, seed=5, count=2), api_name="/sample")
    request = SampleRequest.of(labels=["square", "7"], seed=5, count=2, sampling={"kind": "ddim", "steps": 3})
    assert shown(html) == encoded(picture(request, load_model(model)))
    assert "square, seed 5" in html


@pytest.mark.heavy
@pytest.mark.parametrize("steps, asked", [(FILL_STEPS, {}), (4, {"steps": 4}), (20, {"steps": 20})])
def test_half_of_a_picture_is_filled_as_by_the_request_in_as_many_steps(page, model, tmp_path, steps, asked):
    path = save_picture(tmp_path / "image.png")
    drawing = {"background": handle_file(str(path)), "layers": [], "composite": None}
    html = page.predict(drawing, "the left half", *fields(["circle"], seed=3, steps=steps), api_name="/inpaint")
    request = InpaintRequest.of(images=[path], masks=["half:left"], labels=["circle"], seed=3, sampling=asked)
    assert shown(html) == encoded(picture(request, load_model(model)))


def test_a_picture_is_edited_as_by_the_request(page, model, tmp_path):
    path = save_picture(tmp_path / "image.png")
    html = page.predict(handle_file(str(path)), 0.5, *fields(["circle"], seed=3), api_name="/edit")
    request = EditRequest.of(images=[path], strength=0.5, labels=["circle"], seed=3)
    assert shown(html) == encoded(picture(request, load_model(model)))


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_a_transparent_picture_of_any_format_is_edited_and_filled_as_by_the_request(page, model, tmp_path, kind):
    path = tmp_path / f"image.{kind}"
    Image.open(save_picture(tmp_path / "colours.png", mode="RGBA")).save(path)
    edit = page.predict(handle_file(str(path)), 0.5, *fields(["circle"], seed=3), api_name="/edit")
    request = EditRequest.of(images=[path], strength=0.5, labels=["circle"], seed=3)
    assert shown(edit) == encoded(picture(request, load_model(model)))
    drawing = {"background": handle_file(str(path)), "layers": [], "composite": None}
    filled = page.predict(drawing, "the left half", *fields(["circle"], seed=3), api_name="/inpaint")
    request = InpaintRequest.of(images=[path], masks=["half:left"], labels=["circle"], seed=3, sampling={"steps": 4})
    assert shown(filled) == encoded(picture(request, load_model(model)))


def test_a_film_ends_with_the_sample(page, model):
    html = page.predict(*fields(["7"], seed=2), api_name="/film")
    final = encoded(picture(SampleRequest.of(labels=["7"], seed=2), load_model(model)))
    assert len(shown(html)) == 2 * 4
    assert shown(html)[-2:] == final * 2


def test_a_form_that_nobody_touched_asks_for_no_more_steps_than_are_allowed(model):
    config = compose(["serving.max_steps=3"])  # of which the model has four by itself
    with ThreadPoolExecutor(1) as executor, closing(Page(load(str(model), config, executor))) as here:
        html, _ = here.send("sample", {"labels": ["7"]})
    assert shown(html) == encoded(picture(SampleRequest.of(labels=["7"], sampling={"steps": 3}), load_model(model)))


def test_what_the_server_refuses_is_said(page):
    with pytest.raises(AppError, match=r"80 pictures.*64"):
        page.predict(*fields(list(CLASSES), count=16), api_name="/sample")


def test_nothing_to_fill_is_said(page):
    with pytest.raises(AppError, match="no picture yet"):
        page.predict(None, "the left half", *fields(["circle"]), api_name="/inpaint")


def test_what_is_larger_than_a_request_may_be_is_refused_before_it_is_decoded(page, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(base64.b64decode(bomb(8_000, 4_000)))  # of no pixels: decoding it would fail otherwise
    wrong = "8,000 x 4,000 pixels: at most 16,000,000 are allowed"
    with pytest.raises(AppError, match=wrong):
        page.predict(handle_file(str(path)), 0.5, *fields(["circle"]), api_name="/edit")
    drawing = {"background": handle_file(str(path)), "layers": [], "composite": None}
    with pytest.raises(AppError, match=wrong):
        page.predict(drawing, "the left half", *fields(["circle"]), api_name="/inpaint")
    whole = save_picture(tmp_path / "image.png")
    drawing = {"background": handle_file(str(whole)), "layers": [handle_file(str(path))], "composite": None}
    with pytest.raises(AppError, match=wrong):
        page.predict(drawing, "the left half", *fields(["circle"]), api_name="/inpaint")


def test_what_is_no_picture_is_said(page, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(AppError, match="the image cannot be read as a picture"):
        page.predict(handle_file(str(tmp_path / "text.png")), 0.5, *fields(["circle"]), api_name="/edit")


def test_a_file_that_is_larger_than_a_request_may_be_is_not_taken(page):
    upload = requests.post(f"{page.src}gradio_api/upload", files={"files": ("a.png", bytes(17 << 20))}, timeout=60)
    assert upload.status_code == 413


def test_the_page_of_a_server_with_a_token_asks_for_it(model):
    with page_of(model, digest_of(TOKEN)) as address, requests.Session() as browser:
        assert browser.get(f"{address}config").status_code == 401
        assert browser.post(address, data={"token": TOKEN}).status_code == 200
        assert browser.get(f"{address}config").json()["title"] == "Pictures from a diffusion model"


def test_the_page_names_no_other_address(model, page):
    told = requests.get(f"{page.src}config").json()
    assert told["analytics_enabled"] is False
    text = requests.get(page.src).text
    assert not re.findall(r"(?:src|href)=\"(https?://(?!127\.0\.0\.1)[^\"]+)\"", text)


def test_tabs_are_named_by_what_a_visitor_does_there(page):
    parts = requests.get(f"{page.src}config").json()["components"]
    tabs = [part["props"]["label"] for part in parts if part["type"] == "tabitem"]
    assert tabs == ["Sample", "Inpaint", "Edit", "Film", "About this model"]
