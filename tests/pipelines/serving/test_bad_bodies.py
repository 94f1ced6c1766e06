"""Bodies that are refused before a model is asked: with a line that names the field, and nothing of the server."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from pipelines.config import compose
from pipelines.inference.request import RequestError
from pipelines.serving.bodies import answer_format, read_body
from pipelines.serving.limits import Limits
from tests.pipelines.serving.bad_requests import LIMITS, bomb, inpaint, png


def encoded(kind: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def edit(**fields: Any) -> dict[str, Any]:
    return {"task": "edit", "images": [png()], **fields}


HUGE = 10**4_290
NO_PNG = "images[0] is no PNG file: send one, in base64"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a count of thousands of digits": ({"count": HUGE}, "count has a number of more than 20 digits"),
    "a seed of thousands of digits": ({"seed": -HUGE}, "seed has a number of more than 20 digits"),
    "a label of thousands of digits": ({"labels": [HUGE]}, "labels has a number of more than 20 digits"),
    "steps of thousands of digits": ({"sampling": {"steps": HUGE}}, "sampling has a number of more than 20 digits"),
    "a batch of thousands of digits": ({"batch_size": HUGE}, "batch_size has a number of more than 20 digits"),
    "half a picture": ({"count": 1.5}, "count = 1.5: Input should be a valid integer"),
    "pictures without end": ({"count": float("inf")}, "count = inf"),
    "a count in a list": ({"count": [1]}, "count = [1]: Input should be a valid integer"),
    "seeds as a text": ({"seeds": "1,2"}, "seeds = '1,2': Input should be a valid tuple"),
    "no seeds": ({"seeds": []}, "seeds = []: Tuple should have at least 1 item"),
    "a seed that is a word": ({"seeds": [1, "a"]}, "seeds.1 = 'a': Input should be a valid integer"),
    "a seed in a list": ({"seeds": [[1]]}, "seeds.0 = [1]: Input should be a valid integer"),
    "labels as a text": ({"labels": "3"}, "labels = '3': Input should be a valid tuple"),
    "labels as an object": ({"labels": {"a": 1}}, "labels = {'a': 1}: Input should be a valid tuple"),
    "a label of nothing": ({"labels": [None]}, "labels.0 = None: Input should be a valid string or"),
    "a label between two": ({"labels": [1.5]}, "labels.0 = 1.5: Input should be a valid string or"),
    "a label in a list": ({"labels": [["1"]]}, "labels.0 = ['1']: Input should be a valid string or"),
    "prompts as a text": ({"prompts": "a"}, "prompts = 'a': Input should be a valid tuple"),
    "a prompt that is a number": ({"prompts": [3]}, "prompts.0 = 3: Input should be a valid string"),
    "a negative prompt that is a number": ({"negative_prompt": 3}, "negative_prompt = 3: Input should be a valid str"),
    "one end of a way": ({"interpolate": [1]}, "interpolate.1 is missing: a request to sample needs seeds between"),
    "three ends of a way": ({"interpolate": [1, 2, 3]}, "interpolate = [1, 2, 3]: Tuple should have at most 2 items"),
    "a way of one frame": ({"interpolate": [1, 2], "frames": 1}, "frames = 1: Input should be greater than or equal"),
    "settings in a list": ({"sampling": [1]}, "sampling = [1]: Input should be a valid dictionary"),
    "settings as a text": ({"sampling": "ddim"}, "sampling = 'ddim': Input should be a valid dictionary"),
    "a batch of nothing": ({"batch_size": 0}, "batch_size = 0: Input should be greater than or equal to 1"),
    "a task in a list": ({"task": [1]}, "task = [1]: write a text"),
    "a task in capitals": ({"task": "Sample"}, "task = 'Sample': allowed are sample, inpaint, edit"),
    "a task of ten thousand letters": ({"task": "x" * 10_000}, "a text of task has 10,000 characters: at most 200"),
    "a film that is a number": ({"film": 1}, "film = 1: Input should be a valid boolean"),
    "a film that is a list": ({"film": []}, "film = []: Input should be a valid boolean"),
    "a film that is nothing written": ({"film": ""}, "film = '': Input should be a valid boolean"),
    "a format in a list": ({"format": [1]}, "format = [1]: write a text"),
    "an unknown field": ({"label": 1}, "label: no such field of a request to sample; there are: model, task, format"),
    "thousands of unknown fields": (
        {f"k{i}": 1 for i in range(3_000)},
        "k0, k1, k10, k100, k1000 and 2,995 more: no such field of a request to sample",
    ),
    "a field of ten thousand letters": ({"z" * 10_000: 1}, "a field has a name of 10,000 characters: at most 200"),
    "no images": (
        {"task": "inpaint", "masks": ["half:left"]},
        "images is missing: a request to inpaint needs pict",
    ),
    "no masks": (
        {"task": "inpaint", "images": [png()]},
        "masks is missing: a request to inpaint needs a picture",
    ),
    "nothing to edit": ({"task": "edit"}, "images is missing: a request to edit needs pictures"),
    "images in an object": (edit(images={"a": 1}), "images: write a list of PNG files in base64"),
    "an empty list of images": (edit(images=[]), "images = []: Tuple should have at least 1 item"),
    "an image that is a number": (edit(images=[3]), "images[0] is no text: send the bytes of a PNG file in base64"),
    "an image that is nothing": (edit(images=[None]), "images[0] is no text: send the bytes of a PNG file in base64"),
    "an image in a list": (edit(images=[[png()]]), "images[0] is no text: send the bytes of a PNG file in base64"),
    "base64 without its end": (edit(images=[png().rstrip("=")[:-1]]), "images[0] is no base64 text"),
    "base64 in two lines": (edit(images=[png()[:20] + "\n" + png()[20:]]), "images[0] is no base64 text"),
    "base64 as in addresses": (edit(images=["_-_-"]), "images[0] is no base64 text (Only base64 data is allowed)"),
    "base64 of other letters": (edit(images=["é"]), "images[0] is no base64 text"),
    "a data URL of a JPEG": (edit(images=["data:image/jpeg;base64," + encoded("jpeg")]), "images[0] is no base64 text"),
    "no bytes": (edit(images=[""]), NO_PNG),
    "a JPEG": (edit(images=[encoded("jpeg")]), NO_PNG),
    "a GIF": (edit(images=[encoded("gif")]), NO_PNG),
    "a drawing of lines": (edit(images=[base64.b64encode(b"<svg/>").decode()]), NO_PNG),
    "the first bytes of a PNG": (edit(images=[base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()]), NO_PNG),
    "a picture without width": (edit(images=[bomb(0, 8)]), NO_PNG),
    "a picture that fills the memory": (edit(images=[bomb(60_000, 60_000)]), "images[0] has too many pixels: at most"),
    "a mask as a text": (inpaint(masks="half:left"), "masks: write a list of PNG files in base64"),
    "a mask that is a number": (inpaint(masks=[3]), "masks[0] is no text: send the bytes of a PNG file in base64"),
    "a half that is none": (inpaint(masks=["half:sideways"]), "the half that is filled is one of left, right, top"),
    "a half that is a path": (inpaint(masks=["half:/etc/passwd"]), "the half that is filled is one of left, right"),
    "a box of two numbers": (inpaint(masks=["box:1,2"]), "box:1,2: write box:X,Y,WIDTH,HEIGHT, four whole numbers"),
    "a box of words": (inpaint(masks=["box:a,b,c,d"]), "write box:X,Y,WIDTH,HEIGHT, four whole numbers of pixels"),
    "a box of half pixels": (inpaint(masks=["box:0,0,1.5,1"]), "write box:X,Y,WIDTH,HEIGHT, four whole numbers"),
    "a box before the first pixel": (inpaint(masks=["box:-1,0,2,2"]), "a box begins at 0,0 or later"),
    "a box of ten thousand numbers": (inpaint(masks=["box:" + "1," * 10_000]), "a text of masks has 20,004 characters"),
    "a method that is a number": (inpaint(method=3), "method = 3: Input should be a valid string"),
    "settings of a method in a list": (inpaint(method_settings=[1]), "method_settings = [1]: Input should be a valid"),
    "a strength that is a word": (edit(strength="much"), "strength = 'much': Input should be a valid number"),
    "a strength that is no number": (edit(strength=float("nan")), "strength = nan: Input should be a finite number"),
}


@pytest.fixture(scope="module")
def limits():
    given = [f"serving.{name}={value}" for name, value in LIMITS.items()]
    return Limits.of(compose(["+experiment=digits", *given]).serving)


def read(body, folder, limits):
    limits.check_body(body)
    answer_format(body)
    return read_body(body, folder, limits)


@pytest.mark.parametrize("kind", BAD)
def test_a_body_that_is_wrong_by_itself_is_refused_in_a_line_without_a_model(kind, limits, tmp_path):
    body, message = BAD[kind]
    with pytest.raises(RequestError) as raised:
        read(body, tmp_path, limits)
    said = str(raised.value)
    assert message in said
    assert "\n" not in said
    assert len(said) < 400
    assert str(tmp_path) not in said
    assert "object at 0x" not in said


@pytest.mark.parametrize("body", [{}, {"film": None, "task": None, "sampling": None}, {"labels": ["3"], "film": True}])
def test_what_is_left_open_has_its_default(body, limits, tmp_path):
    request = read(body, tmp_path, limits)
    assert (request.task, request.count) == ("sample", 1)
    assert request.film == (body.get("film") is True)
