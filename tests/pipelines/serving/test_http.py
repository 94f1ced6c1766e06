"""A server of a tiny model without Ray: what it answers, and what it refuses and why."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm.generate import Sampling
from ddpm.inference import COLUMNS, Drawing, FromNoise, Inpainting, Noise, draw_table, parameters
from ddpm.samplers import SAMPLERS
from ddpm.samplers.repaint import RePaint
from ddpm.settings import settings_of
from pipelines.config import compose
from pipelines.inference.files import PictureSource
from pipelines.inference.pictures import picture
from pipelines.inference.request import EditRequest, InpaintRequest, RequestError, SampleRequest
from pipelines.serving.bodies import read_answer, write_body
from pipelines.serving.http import make_app
from pipelines.serving.limits import Limits, RefusedRequest
from pipelines.serving.metrics import Metrics
from pipelines.serving.served import Served, load
from pipelines.serving.token import Token
from tests.pipelines.drawing import model_folder, save_picture
from tests.pipelines.serving.alone import Alone
from tests.pipelines.serving.bad_requests import BAD, JSON, LIMITS, Bad, inpaint, png

TOKEN = Token("a token of some length", "a test")
NAMES = tuple(str(i) for i in range(10))


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    folder = model_folder(tmp_path_factory.mktemp("models") / "ten", classes=NAMES)
    config = compose([f"serving.{name}={value}" for name, value in LIMITS.items()])
    with ThreadPoolExecutor(1) as executor:
        yield Alone(load(str(folder), config, executor))


@pytest.fixture(scope="module")
def client(backend):
    metrics = Metrics(lambda: {"one": 0})
    app = make_app(backend, backend.served.limits, TOKEN.digest, metrics)
    with TestClient(app, headers={"authorization": f"Bearer {TOKEN.text}"}, raise_server_exceptions=False) as client:
        yield client


def asked(client, body):
    answer = client.post("/v1/images", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def near(one, other):
    return one.shape == other.shape and np.abs(one.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_answered_is_refused_with_the_reason(client, name):
    bad: Bad = BAD[name]
    headers = bad.headers if bad.token else {"authorization": "", **bad.headers}
    answer = client.request(bad.method, bad.path, content=bad.data, headers=headers)
    assert answer.status_code == bad.status, answer.text
    assert set(answer.json()) >= {"error_code", "message"}
    assert bad.reason in answer.json()["message"]
    assert len(answer.text) < 5_000
    assert "Traceback" not in answer.text
    assert "stack_trace" not in answer.text
    assert "/tmp" not in answer.text


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "3", "x", "ddim", "ancestral", "auto", "box:1,1,2,2", "half:left", "trained", png()]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["steps", "scale", "a"]), inner),
    max_leaves=4,
)
FIELDS = sorted(
    {"model", "film", "format", *SampleRequest.model_fields, *InpaintRequest.model_fields, *EditRequest.model_fields}
    - {"task"}
)
SETTINGS = sorted({"kind", "guidance", *(setting.name for kind in SAMPLERS.values() for setting in settings_of(kind))})


@settings(max_examples=150)
@given(
    st.sampled_from(["sample", "inpaint", "edit"]),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
    st.dictionaries(st.sampled_from([*SETTINGS, "scale", "interval", "clip", "threshold"]), VALUES, max_size=2),
)
def test_whatever_a_field_holds_it_is_answered_or_refused(client, task, fields, sampling):
    given_too = {} if task == "sample" else {"images": [png()]} if task == "edit" else inpaint()
    few = {"labels": ["1"], "sampling": {"steps": 2, **sampling}}
    answer = client.post("/v1/images", json={**given_too, **few, **fields, "task": task})
    assert answer.status_code in (200, 404, 413, 422), answer.text


@settings(max_examples=100)
@given(
    st.lists(st.dictionaries(st.sampled_from([*COLUMNS, "a"]), VALUES, max_size=3), min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(sorted(parameters())), VALUES, max_size=2),
    st.sampled_from(["dataframe_records", "dataframe_split", "inputs", "instances"]),
)
def test_whatever_a_table_holds_it_is_answered_or_refused(client, rows, params, form):
    table = rows
    if form == "dataframe_split":
        table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
    elif form == "inputs":
        table = {name: [row.get(name) for row in rows] for row in rows for name in row}
    answer = client.post("/invocations", json={form: table, "params": {"steps": 2, **params}})
    assert answer.status_code in (200, 400), answer.text
    assert "stack_trace" not in answer.text


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("task", ["sample", "interpolate", "inpaint", "edit"])
def test_an_answer_is_what_the_same_request_draws_here(client, backend, tmp_path, task, film):
    image = save_picture(tmp_path / "image.png", 10, 12)
    request = {
        "sample": SampleRequest.of(labels=["3", 7], seeds=[5, 9], sampling={"steps": 3}, film=film),
        "interpolate": SampleRequest.of(labels=["3"], interpolate=(1, 2), frames=3, film=film),
        "inpaint": InpaintRequest.of(
            images=[image], masks=["half:left"], method_settings={"steps": 3}, count=2, film=film
        ),
        "edit": EditRequest.of(images=[image], strength=0.6, labels=["3", "8"], film=film),
    }[task]
    wanted = picture(request, backend.served.model)
    answer = asked(client, write_body(request))
    found, source = read_answer(answer)
    assert near(found.pixels, wanted.pixels)
    assert found.rows == wanted.rows
    assert found.columns == wanted.columns
    assert source == PictureSource.of(backend.served.resolved)
    for ours, theirs in ((found.originals, wanted.originals), (found.hidden, wanted.hidden)):
        assert (ours is None and theirs is None) or np.array_equal(ours, theirs)
    assert found.request.model_dump(exclude={"images", "masks"}) == wanted.request.model_dump(
        exclude={"images", "masks"}
    )
    assert (answer["film"] is not None) == film
    if film:
        assert found.film.t == wanted.film.t
        assert near(found.film.x0.numpy(), wanted.film.x0.numpy())
    again = asked(client, answer["request"])
    assert again["images"] == answer["images"]


def test_a_model_whose_name_is_not_latin_is_named_in_the_header_of_a_png(client, backend, monkeypatch):
    source = replace(backend.served.source, version="models:/плюс 1/3")
    monkeypatch.setattr(backend, "served", replace(backend.served, source=source))
    answer = client.post("/v1/images", json={"labels": ["3"], "format": "png"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-model"] == "models:/%D0%BF%D0%BB%D1%8E%D1%81%201/3"


def test_a_png_is_the_one_picture_or_the_grid(client):
    one = client.post("/v1/images", json={"labels": ["3"], "format": "png"})
    assert one.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(one.content)).size == (8, 8)
    assert one.headers["x-digest"]
    same = asked(client, {"labels": ["3"]})
    assert base64.b64decode(same["images"][0]) == one.content
    assert same["grid"] is None
    grid = client.post("/v1/images", json={"format": "png"})
    assert Image.open(io.BytesIO(grid.content)).width > 80


def test_the_inner_steps_of_a_sampler_that_an_inpainting_does_not_use_are_not_counted(client, backend):
    langevin = {"kind": "predictor_corrector", "steps": 5, "corrector_steps": 200}
    answer = client.post("/v1/images", json={"labels": ["3"], "sampling": langevin})
    assert (answer.status_code, "network evaluations" in answer.text) == (422, True)
    model, images = backend.served.model, torch.zeros(1, *backend.served.model.spec.shape)
    known = Inpainting(images, torch.ones(1, 1, *images.shape[2:]), RePaint(steps=5, jump_length=1, resamplings=1))
    drawing = Drawing(Noise.numbered(0, 1), Sampling.of(**langevin), None, known)  # of a model that is drawn so
    backend.served.limits.check_drawing(drawing, model)
    with pytest.raises(RefusedRequest, match="network evaluations"):
        backend.served.limits.check_drawing(replace(drawing, task=FromNoise()), model)


def test_a_request_may_have_more_settings_than_pictures(client):
    levels = [float(t) for t in range(40, -1, -1)]  # of which the limits allow fewer pictures
    learned = {"kind": "generalized", "steps": 40, "timesteps": [50.0, *levels[1:]], "weights": [0.01] * (40 * 43 // 2)}
    answer = asked(client, {"labels": ["3"], "sampling": learned})
    assert len(answer["request"]["sampling"]["weights"]) > LIMITS["max_pictures"]
    assert asked(client, answer["request"])["images"] == answer["images"]


def test_a_table_is_answered_as_mlflow_answers_it(client, backend):
    rows = {"label": ["3", "8", "3"], "seed": [1, 1, 2]}
    split = {"columns": list(rows), "data": [list(row) for row in zip(*rows.values(), strict=True)]}
    records = [dict(zip(rows, row, strict=True)) for row in split["data"]]  # type: ignore[attr-defined]
    params = {"steps": 3, "scale": 2.5}
    wanted = draw_table(backend.served.model, rows, params).numpy()
    for body in ({"dataframe_split": split}, {"dataframe_records": records}, {"inputs": rows}):
        answer = client.post("/invocations", json={**body, "params": params})
        assert answer.status_code == 200, answer.text
        assert list(answer.json()) == ["predictions"]
        assert near(np.array(answer.json()["predictions"], np.uint8), wanted)


def test_a_transparent_picture_of_a_table_is_edited_as_by_a_request(client, backend, tmp_path):
    image = save_picture(tmp_path / "image.png", mode="RGBA")
    wanted = picture(EditRequest.of(images=[image], strength=0.5, labels=["3"], seed=2), backend.served.model)
    row = {"image": base64.b64encode(image.read_bytes()).decode(), "strength": 0.5, "label": "3", "seed": 2}
    answer = client.post("/invocations", json={"dataframe_records": [row], "params": {}})
    assert answer.status_code == 200, answer.text
    assert near(np.array(answer.json()["predictions"], np.uint8), wanted.pixels)


def test_it_says_that_it_is_there_what_it_serves_and_what_it_counts(client):
    for path in ("/ping", "/health", "/version", "/docs", "/openapi.json"):
        assert client.get(path, headers={"authorization": ""}).status_code == 200
    tasks = client.get("/openapi.json").json()["paths"]["/v1/images"]["post"]["requestBody"]
    kinds = tasks["content"]["application/json"]["schema"]["oneOf"]
    assert [kind["properties"]["task"]["const"] for kind in kinds] == ["sample", "inpaint", "edit"]
    (model,) = client.get("/v1/models").json()["models"]
    assert model["classes"] == list(NAMES)
    assert (model["shape"], model["text"], model["inpainting"]) == ([1, 8, 8], False, False)
    assert model["sampling"]["steps"] == 4
    asked(client, {"labels": ["1"]})
    client.post("/v1/images", json={"labels": ["none"]})
    counted = client.get("/metrics").text
    assert 'ddpm_serve_requests_total{path="/v1/images",status="200"}' in counted
    assert 'ddpm_serve_requests_total{path="/v1/images",status="422"}' in counted
    assert 'ddpm_serve_queue{model="one"} 0.0' in counted


def test_a_failure_inside_is_said_without_its_details(client, backend, caplog):
    backend.failing = True
    try:
        answer = client.post("/v1/images", json={})
        health, ping = client.get("/health"), client.get("/ping")
    finally:
        backend.failing = False
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "the secret of the house" in caplog.text
    assert (health.status_code, ping.status_code) == (503, 200)
    assert "one does not answer now" in health.json()["message"]
    asked(client, {"labels": ["1"]})


def test_a_failure_while_a_table_is_drawn_is_said_without_its_details(client, monkeypatch, caplog):
    async def fail(*_):
        raise MemoryError("the secret of the house")

    monkeypatch.setattr(Served, "draw_table", fail)
    answer = client.post("/invocations", json={"inputs": {"label": ["1"]}})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "the secret of the house" in caplog.text


def test_without_a_token_everybody_may_ask(backend):
    app = make_app(backend, backend.served.limits, None, Metrics(dict))
    with TestClient(app) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/images", content=b"[]", headers=JSON).status_code == 400  # it was read


def test_an_answer_of_another_kind_is_no_answer():
    with pytest.raises(RequestError, match="no answer of `ddpm serve`"):
        read_answer({"images": []})


def test_a_large_film_is_refused_before_it_is_drawn(backend):
    limits = Limits.of(compose(["serving.max_answer_mib=0.01"]).serving)
    with pytest.raises(RefusedRequest, match=r"0.0 MiB of pixels: at most 0.0 are allowed; .*, or for no film"):
        limits.check_drawing(
            Drawing(Noise.numbered(0, 2), backend.served.model.spec.sampling, film=48), backend.served.model
        )
