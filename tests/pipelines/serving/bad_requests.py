"""Requests that a server of a model with ten classes and limits as below has to refuse, each with its reason."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

LIMITS = {
    "max_pictures": 16,
    "max_steps": 300,
    "max_body_mib": 2,
    "max_megapixels": 1,
    "max_total_megapixels": 2,
    "body_s": 2,
}
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Bad:
    """A request that is refused.

    Attributes:
        status: of the answer.
        reason: a part of its message.
        body: as JSON, or as it is.
    """

    status: int
    reason: str
    body: Any = field(default_factory=dict)
    path: str = "/v1/images"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    token: bool = True

    @property
    def data(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def png(*size: int, most: int = 255) -> str:
    """A PNG of grey values from 0 to most."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, most + 1, size or (8, 8), np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def bomb(width: int, height: int) -> str:
    """A PNG of 100 bytes whose header promises so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return base64.b64encode(whole).decode()


def inpaint(**fields: Any) -> dict[str, Any]:
    return {"task": "inpaint", "images": [png()], "masks": ["half:left"], **fields}


def table(columns: list[str], rows: list[list[Any]], **params: Any) -> dict[str, Any]:
    return {"dataframe_split": {"columns": columns, "data": rows}, "params": params}


BAD: dict[str, Bad] = {
    "no token": Bad(401, "a bearer token is needed", token=False),
    "wrong token": Bad(401, "a bearer token is needed", headers=JSON | {"authorization": "Bearer x"}, token=False),
    "token as basic": Bad(401, "a bearer token", headers=JSON | {"authorization": "Basic eDp4"}, token=False),
    "no token for models": Bad(401, "a bearer token", path="/v1/models", method="GET", token=False),
    "unknown path": Bad(404, "POST /v1/images or /invocations", path="/v2/images"),
    "wrong method": Bad(405, "GET /v1/images", method="GET", body=b""),
    "no content type": Bad(415, "allowed is application/json", headers={"content-type": ""}),
    "form": Bad(415, "allowed is application/json", headers={"content-type": "application/x-www-form-urlencoded"}),
    "broken JSON": Bad(400, "no JSON text", b'{"labels": ['),
    "not UTF-8": Bad(400, "no JSON text", b'{"labels": ["\xff"]}'),
    "half a surrogate pair as a name": Bad(400, "surrogates not allowed", b'{"\\ud800": 1}'),
    "half a surrogate pair as a text": Bad(400, "surrogates not allowed", b'{"labels": ["\\udc00"]}'),
    "half a surrogate pair in a table": Bad(
        400, "surrogates not allowed", b'{"inputs": {"\\ud800": ["1"]}}', path="/invocations"
    ),
    "empty body": Bad(400, "no JSON text", b""),
    "list for an object": Bad(400, "send an object", b"[1]"),
    "NaN": Bad(422, "sampling.scale = nan: at most 300", b'{"sampling": {"scale": NaN}}'),
    "deep nesting": Bad(400, "no JSON text", b'{"a":' + b"[" * 90_000),
    "nesting": Bad(422, "nested more than", {"sampling": {"a": [[[[[[[[1]]]]]]]]}}),
    "number of 5,000 digits": Bad(400, "no JSON text", b'{"seed": ' + b"9" * 5_000 + b"}"),
    "too large": Bad(413, "at most 2,097,152 bytes", b'{"a": "' + b"x" * (2 << 20) + b'"}'),
    "unknown task": Bad(422, "allowed are sample, inpaint, edit", {"task": "paint"}),
    "task of another type": Bad(422, "write a text", {"task": 3}),
    "unknown field": Bad(422, "no such field of a request to sample", {"labls": ["3"]}),
    "field of Python": Bad(422, "no such field", {"cls": 1, "self": 2}),
    "field of another task": Bad(422, "no such field of a request to sample", {"masks": ["half:left"]}),
    "unknown model": Bad(404, "there is no model 'nobody'; served are:", {"model": "nobody"}),
    "model of another type": Bad(404, "there is no model", {"model": ["x"]}),
    "unknown label": Bad(422, "labels: no class 'ten'; the model has: 0, 1, 2", {"labels": ["ten"]}),
    "label out of range": Bad(422, "no class '10'", {"labels": [10]}),
    "too many pictures": Bad(422, "at most 16", {"labels": ["1"], "count": 17}),
    "a billion pictures": Bad(422, "at most 16", {"labels": ["1"], "count": 10**9}),
    "too many in all": Bad(422, "20 pictures: at most 16 a request", {"count": 2}),
    "too many seeds": Bad(422, "17 entries: at most 16", {"seeds": list(range(17))}),
    "settings without end": Bad(
        422, "sampling has 90,000 entries: at most 45,450", {"sampling": {"weights": [0] * 90_000}}
    ),
    "values without end": Bad(413, "about 200,002 values: at most 100,000", {"sampling": {"weights": [0] * 200_000}}),
    "brackets without end": Bad(413, "values: at most 100,000", b'{"a":' + b"[" * 1_000_000),
    "too many frames": Bad(422, "at most 16", {"interpolate": [1, 2], "frames": 10**9, "labels": ["1"]}),
    "no pictures": Bad(422, "count = 0", {"count": 0}),
    "negative seed": Bad(422, "seed = -1", {"seed": -1}),
    "seed of 65 bits": Bad(422, "seed = ", {"seed": 1 << 64}),
    "negative steps": Bad(422, "steps must be >= 1, got -5", {"sampling": {"steps": -5}}),
    "a million steps": Bad(422, "sampling.steps = 1000000: at most 300", {"sampling": {"steps": 10**6}}),
    "more steps than the schedule": Bad(422, "steps must be in 1..50", {"sampling": {"steps": 51}}),
    "steps of another type": Bad(422, "steps must be a whole number, got 'many'", {"sampling": {"steps": "many"}}),
    "steps as a list": Bad(422, "steps must be a whole number, got (3,)", {"sampling": {"steps": [3]}}),
    "half a step": Bad(422, "steps", {"labels": ["1"], "sampling": {"steps": 2.5}}),
    "correctors without end": Bad(
        422, "at most 300", {"sampling": {"kind": "predictor_corrector", "steps": 50, "corrector_steps": 200}}
    ),
    "unknown sampler": Bad(422, "unknown sampler", {"sampling": {"kind": "magic"}}),
    "sampler of another type": Bad(422, "unknown sampler {'a': 1}", {"sampling": {"kind": {"a": 1}}}),
    "unknown setting": Bad(422, "stepps: no setting of sampling; there are: steps", {"sampling": {"stepps": 3}}),
    "interval of one": Bad(422, "interval", {"sampling": {"interval": [0.2]}}),
    "a network of its own": Bad(422, "networks of its model only", {"sampling": {"guidance": "auto", "weak": "/etc"}}),
    "an encoder of its own": Bad(422, "leave it out", {"text_encoder": "/etc"}),
    "prompts": Bad(422, "was not trained on text", {"prompts": ["a heart"]}),
    "prompt of 1 MB": Bad(422, "at most 2,000", {"prompts": ["x" * 1_000_000]}),
    "label of 1 MB": Bad(422, "at most 200", {"labels": ["x" * 1_000_000]}),
    "film of another type": Bad(422, "film = 'yes': Input should be a valid boolean", {"film": "yes"}),
    "unknown format": Bad(422, "allowed are json, png", {"format": "gif"}),
    "image for a sample": Bad(422, "no such field", {"images": [png()]}),
    "path as image": Bad(422, "no base64 text", inpaint(images=["/etc/passwd"])),
    "path as mask": Bad(422, "no base64 text", inpaint(masks=["/etc/passwd"])),
    "text as image": Bad(422, "no PNG file", inpaint(images=[base64.b64encode(b"hello").decode()])),
    "image as a text": Bad(422, "write a list of PNG files", inpaint(images=png())),
    "PNG bomb": Bad(413, "at most 1,000,000", inpaint(images=[bomb(60_000, 60_000)])),
    "larger picture": Bad(413, "1,001 x 1,000 pixels: at most 1,000,000", inpaint(images=[bomb(1_001, 1_000)])),
    "many pictures that are large together": Bad(
        413, "have 3,000,000 pixels together: at most 2,000,000", inpaint(images=[bomb(1_000, 1_000)] * 3)
    ),
    "pictures and masks that are large together": Bad(
        413, "have 3,000,000 pixels together", inpaint(images=[bomb(1_500, 600)] * 2, masks=[bomb(1_000, 600)] * 2)
    ),
    "truncated PNG": Bad(422, "images-0.png", inpaint(images=[bomb(8, 8)])),
    "mask of another size": Bad(422, "must have the size of", inpaint(masks=[png(5, 5)])),
    "mask without an area": Bad(422, "has a pixel at least", inpaint(masks=["box:0,0,0,0"])),
    "mask outside": Bad(422, "does not lie within", inpaint(masks=["box:0,0,9,9"])),
    "no images": Bad(422, "images", {"task": "inpaint", "masks": ["half:left"]}),
    "two masks, one image": Bad(422, "as many of each", inpaint(masks=["half:left"] * 3, images=[png()] * 2)),
    "untrained method": Bad(422, "not trained for inpainting", inpaint(method="trained")),
    "resamplings without end": Bad(422, "at most 300", inpaint(method_settings={"resamplings": 10**9})),
    "too many resamplings": Bad(422, "network evaluations", inpaint(method_settings={"resamplings": 299})),
    "strength": Bad(422, "strength = 2", {"task": "edit", "images": [png()], "strength": 2}),
    "table of another form": Bad(400, "exactly one of the input fields", {}, path="/invocations"),
    "unknown field beside a table": Bad(
        400,
        "unknown fields parameters; there are: dataframe_split",
        {"inputs": {"label": ["1"]}, "parameters": {"steps": 3}},
        path="/invocations",
    ),
    "deep nesting in a table": Bad(400, "no JSON text", b'{"inputs":' + b"[" * 90_000, path="/invocations"),
    "number of 5,000 digits in a table": Bad(
        400, "no JSON text", b'{"inputs": {"seed": [' + b"9" * 5_000 + b"]}}", path="/invocations"
    ),
    "list for a table": Bad(400, "send an object", b"[1]", path="/invocations"),
    "unknown column": Bad(
        400,
        "unknown columns colour; there are: label, prompt",
        table(["label", "colour"], [["1", "red"]]),
        path="/invocations",
    ),
    "unknown column of a record": Bad(
        400,
        "unknown columns sede; there are: label, prompt",
        {"dataframe_records": [{"label": "1"}, {"label": "1", "sede": 3}]},
        path="/invocations",
    ),
    "unknown column of inputs": Bad(
        400, "unknown columns labels", {"inputs": {"label": ["1"], "labels": ["1"]}}, path="/invocations"
    ),
    "unknown column of instances": Bad(
        400, "unknown columns labels", {"instances": [{"label": "1", "labels": "1"}]}, path="/invocations"
    ),
    "unknown class in a table": Bad(400, "label: no class 'x'", table(["label"], [["x"]]), path="/invocations"),
    "too many rows": Bad(400, "at most 16", table(["label"], [["1"]] * 17), path="/invocations"),
    "unknown parameter": Bad(
        400, "unknown parameters stepps; there are: kind, guidance", table(["label"], [["1"]], stepps=3), "/invocations"
    ),
    "parameter of another type": Bad(400, "steps", table(["label"], [["1"]], steps="many"), path="/invocations"),
    "too many steps for rows": Bad(400, "at most 300", table(["label"], [["1"]], steps=10**9), path="/invocations"),
    "seed of 65 bits in a table": Bad(
        400, "seed", table(["label", "seed"], [["1", 1 << 64], ["1", 3]]), path="/invocations"
    ),
    "seed of 65 bits for a table": Bad(400, "seed", table(["label"], [["1"]], seed=1 << 64), path="/invocations"),
    "negative seed in a table": Bad(
        400, "seed = -1 in row 1: write a whole number", table(["seed"], [[1], [-1]]), path="/invocations"
    ),
    "missing label in a table": Bad(
        400, "label is missing in row 1: write the name", table(["label"], [["1"], [None]]), path="/invocations"
    ),
    "missing strength in a table": Bad(
        400,
        "strength is missing in row 1: write a number in [0, 1] in every row",
        table(["image", "strength"], [[png(), 0.5], [png(), None]]),
        path="/invocations",
    ),
    "missing image in a table": Bad(
        400,
        "image is missing in row 1: write the bytes of a PNG file",
        table(["image", "strength"], [[png(), 0.5], [None, 0.5]]),
        path="/invocations",
    ),
    "list as an image in a table": Bad(
        400, "image", table(["image", "strength"], [[[png()], 0.5]]), path="/invocations"
    ),
    "list as a prompt in a table": Bad(400, "prompt", table(["prompt"], [[["a heart"]]]), path="/invocations"),
    "list as a label in a table": Bad(400, "label", table(["label"], [[["1"]]]), path="/invocations"),
    "lists of different lengths as a parameter": Bad(
        400, "of another type", table(["label"], [["1"]], interval=[[1], [1, 2]]), path="/invocations"
    ),
    "truncated PNG in a table": Bad(
        400, "the image is damaged", table(["image", "strength"], [[bomb(8, 8), 0.5]]), path="/invocations"
    ),
    "mask of nothing in a table": Bad(
        400,
        "the mask of picture 0 hides no pixel",
        table(["image", "mask"], [[png(), png(most=0)]]),
        path="/invocations",
    ),
    "bomb in a table": Bad(
        400, "at most 1,000,000", table(["image", "strength"], [[bomb(60_000, 60_000), 0.5]]), path="/invocations"
    ),
    "parquet": Bad(
        415, "allowed is", b"PAR1", "/invocations", headers={"content-type": "application/vnd.apache.parquet"}
    ),
}
