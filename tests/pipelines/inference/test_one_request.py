"""A request is one thing, whoever asks: the same names of fields, and the same refusals, in every way to ask."""

from __future__ import annotations

import base64
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import typer
from fastapi.testclient import TestClient
from gradio.exceptions import Error
from mlflow.exceptions import MlflowException

from ddpm.inference import COLUMNS, parameters
from pipelines.cli.app import app, main
from pipelines.config import compose
from pipelines.inference.request import TASKS, options
from pipelines.served_model import DiffusionModel
from pipelines.serving.forms import ELSEWHERE
from pipelines.serving.http import make_app
from pipelines.serving.metrics import Metrics
from pipelines.serving.served import load
from tests.pipelines.drawing import model_folder, save_picture
from tests.pipelines.serving.alone import Alone, Page
from tests.pipelines.serving.bad_requests import png

CLASSES = ("circle", "square", "7")
LONG = 99999999999999999999
TEXT = base64.b64encode(b"no picture").decode()


@dataclass(frozen=True)
class Wrong:
    """A wrong value, as each of the four ways has it; None where one cannot say it.

    Attributes:
        field: that every refusal names.
        command: verb and options, behind the model.
        body: of HTTP.
        form: of the page, and what is in it.
        table: columns and parameters of the registered model.
    """

    field: str
    command: list[Any] | None
    body: dict[str, Any] | None
    form: tuple[str, dict[str, Any]] | None
    table: tuple[dict[str, list[Any]], dict[str, Any]] | None


def setting(name: str, value: Any, option: str | None = None, written: str | None = None) -> Wrong:
    """A wrong value of a sampling setting."""
    option, written = option or name, str(value) if written is None else written
    form = ("sample", {option: value if isinstance(value, int | float) else written})
    return Wrong(
        name, ["sample", f"--{option}", written], {"sampling": {name: value}}, form, ({"label": [0]}, {name: value})
    )


def field(name: str, value: Any, column: bool = False) -> Wrong:
    """A wrong value of a field that all ways have by one name."""
    table: Any = ({"label": [0], name: [value]}, {}) if column else ({"label": [0]}, {name: value})
    return Wrong(name, ["sample", f"--{name}", value], {name: value}, ("sample", {name: value}), table)


def mask(text: str) -> Wrong:
    """A wrong mask."""
    body = {"task": "inpaint", "images": [png()], "masks": [text]}
    table: Any = ({"image": [png()], "mask": [text]}, {})
    return Wrong("mask", ["inpaint", "image.png", "--mask", text], body, None, table)  # the page brushes its masks


def filling(name: str, value: Any) -> Wrong:
    """A wrong value of how hidden pixels are filled."""
    settings = {name: value} if name == "method" else {"method_settings": {name: value}}
    body = {"task": "inpaint", "images": [png()], "masks": ["half:left"], **settings}
    command = ["inpaint", "image.png", "--mask", "half:left", f"--{name.replace('_', '-')}", value]
    form: Any = ("inpaint", {"images": "image.png", name: value, "fill": "the left half"})
    return Wrong(name, command, body, form, ({"image": [png()], "mask": [png(most=1)]}, {name: value}))


WRONG: dict[str, Wrong] = {
    "no steps": setting("steps", 0),
    "a billion steps": setting("steps", 10**9),
    "a scale that is no number": setting("scale", math.nan, "guidance"),
    "a scale without end": setting("scale", math.inf, "guidance"),
    "a scale below zero": setting("scale", -1, "guidance"),
    "noise of a step beyond all": setting("eta", 2.0),
    "an unknown sampler": setting("kind", "magic", "sampler"),
    "an interval the other way round": setting("interval", [0.8, 0.2], written="0.8,0.2"),
    "half an interval": setting("interval", [0.5], written="0.5"),
    "an unknown setting": Wrong(
        "stepps", ["sample", "--set", "stepps=3"], {"sampling": {"stepps": 3}}, None, ({"label": [0]}, {"stepps": 3})
    ),
    "an unknown class": Wrong(
        *("label", ["sample", "--labels", "triangle"], {"labels": ["triangle"]}),
        *(("sample", {"labels": ["triangle"]}), ({"label": ["triangle"]}, {})),
    ),
    "the number of no class": Wrong(
        *("label", ["sample", "--labels", 3], {"labels": [3]}, ("sample", {"labels": [3]}), ({"label": [3]}, {})),
    ),
    "a seed below zero": field("seed", -1),
    "a seed of twenty digits": field("seed", LONG),
    "a seed of twenty digits in a row": field("seed", LONG, column=True),
    "a seed in letters": field("seed", "some"),
    "no pictures": Wrong("count", ["sample", "--count", 0], {"count": 0}, ("sample", {"count": 0}), ({}, {})),
    "no prompts": Wrong(
        *("prompt", ["sample", "--prompt-file", "empty.png"], {"prompts": []}, None, ({"prompt": []}, {})),
    ),
    "a prompt for a model without text": Wrong(
        *("prompt", ["sample", "--prompts", "a heart"], {"prompts": ["a heart"]}),
        *(("sample", {"prompts": "a heart"}), ({"prompt": ["a heart"]}, {})),
    ),
    "a negative prompt for a model without text": Wrong(
        *("negative_prompt", ["sample", "--negative-prompt", "a dog"], {"negative_prompt": "a dog"}),
        *(("sample", {"negative_prompt": "a dog"}), ({"label": [0]}, {"negative_prompt": "a dog"})),
    ),
    "a strength beyond all": Wrong(
        *("strength", ["edit", "image.png", "--strength", 2], {"task": "edit", "images": [png()], "strength": 2}),
        *(("edit", {"images": "image.png", "strength": 2}), ({"image": [png()], "strength": [2.0]}, {})),
    ),
    "a box of two numbers": mask("box:1,2"),
    "a box outside": mask("box:4,4,8,8"),
    "an unknown method": filling("method", "magic"),
    "no resamplings": filling("resamplings", 0),
    "jumps of no length": filling("jump_length", 0),
    "an image that is none": Wrong(
        *("image", ["edit", "empty.png"], {"task": "edit", "images": [TEXT]}),
        *(("edit", {"images": "empty.png"}), ({"image": [TEXT], "strength": [0.5]}, {})),
    ),
}
TOLD = {"count": "count|rows", "kind": "sampler"}
"""Field -> what messages call it: the pictures of a table are its rows, and the kind is that of a sampler."""
OF_A_TABLE = {
    "labels": "label",
    "prompts": "prompt",
    "images": "image",
    "masks": "mask",
    "strength": "strength",
    "seeds": "seed",
    "seed": "seed",
    "negative_prompt": "negative_prompt",
    "method": "method",
}
"""Field of a request -> column or parameter of a registered model."""
NOT_OF_A_TABLE = {
    "count": "a table has a row for each picture",
    "interpolate": "a row has noise of its own",
    "frames": "a row has noise of its own",
    "film": "a prediction is a picture",
    "invert": "a row says how far it goes by its strength",
    "source_labels": "a row says how far it goes by its strength",
    "text_encoder": "a version carries its own",
    "batch_size": "whoever serves chooses it",
}


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """A model behind each of the ways."""
    folder = tmp_path_factory.mktemp("one")
    model, config, pyfunc = model_folder(folder / "model", classes=CLASSES), compose([]), DiffusionModel()
    pyfunc.load_context(SimpleNamespace(artifacts={"model": str(model)}))
    save_picture(folder / "image.png")
    (folder / "empty.png").write_text("")
    with ThreadPoolExecutor(1) as executor:
        served, shown = (load(str(model), config, executor) for _ in range(2))  # one of each event loop
        front = make_app(Alone(served), served.limits, None, Metrics(dict))
        with TestClient(front, raise_server_exceptions=False) as client, closing(Page(shown)) as page:
            yield SimpleNamespace(folder=folder, client=client, page=page, pyfunc=pyfunc)


def told_by_the_command(ways, command, monkeypatch, capsys):
    verb, *options = map(str, command)
    monkeypatch.chdir(ways.folder)
    monkeypatch.setattr("sys.argv", ["ddpm", verb, "model", *options, "--out", "drawn"])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    assert not (ways.folder / "drawn").exists()
    return " ".join(said.partition("Error: ")[2].split() if "Usage: " in said else said.split())


def told_by_the_server(ways, body):
    answer = ways.client.post("/v1/images", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    return answer.json()["message"]


def told_by_the_page(ways, form, given):
    files = {name: ways.folder / given[name] for name in ("images",) if name in given}
    with pytest.raises(Error) as raised:
        ways.page.send(form, given | files)
    return raised.value.message


def told_by_the_registered_model(ways, columns, params):
    with pytest.raises(MlflowException) as raised:
        ways.pyfunc.predict(None, pandas.DataFrame(columns), params)
    assert raised.value.error_code == "INVALID_PARAMETER_VALUE"
    return raised.value.message


@pytest.mark.parametrize("kind", WRONG)
def test_every_way_refuses_a_wrong_value_and_names_the_same_field(ways, kind, monkeypatch, capsys):
    wrong = WRONG[kind]
    told = {}
    if wrong.command is not None:
        told["command"] = told_by_the_command(ways, wrong.command, monkeypatch, capsys)
    if wrong.body is not None:
        told["server"] = told_by_the_server(ways, wrong.body)
    if wrong.form is not None:
        told["page"] = told_by_the_page(ways, *wrong.form)
    if wrong.table is not None:
        told["registered model"] = told_by_the_registered_model(ways, *wrong.table)
    assert len(told) >= 3
    for who, message in told.items():
        assert re.search(rf"\b({TOLD.get(wrong.field, wrong.field)})s?\b", message), f"{who}: {message}"
        assert "Traceback" not in message


@pytest.mark.parametrize("kind", TASKS.values(), ids=list(TASKS))
def test_a_field_of_a_request_is_in_every_way_to_ask(ways, kind):
    fields, written = set(kind.model_fields), {option.name for option in options(kind)}
    assert {option.field for option in options(kind)} == fields
    group: Any = typer.main.get_command(app)
    assert written <= {parameter.name for parameter in group.commands[kind.task].params}
    shown = set(ways.page.options(kind.task))
    assert shown == written - set(ELSEWHERE)
    schemas = ways.client.get("/openapi.json").json()["paths"]["/v1/images"]["post"]["requestBody"]["content"]
    (schema,) = (
        each
        for each in schemas["application/json"]["schema"]["oneOf"]
        if each["properties"]["task"]["const"] == kind.task
    )
    assert fields - {"text_encoder"} <= set(schema["properties"])
    assert set(OF_A_TABLE.values()) <= {*COLUMNS, *parameters()}
    settings = {option.setting for option in options(kind) if option.setting}
    assert settings <= set(parameters())
    assert fields - {"sampling", "method_settings"} <= {*OF_A_TABLE, *NOT_OF_A_TABLE}
