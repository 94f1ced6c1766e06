"""Requests and answers as JSON: pictures are PNG files in base64.

    {"model": …, "task": "sample", "labels": ["3"], "seeds": [7], "sampling": {"steps": 20}, "film": false}

The fields are those of the typed requests. The answer holds the complete request, with given images and masks at the
model's size, so that it can be asked again for the same pictures.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddpm.inference import Film
from pipelines.inference.files import PictureSource, grid_of
from pipelines.inference.inputs import DRAWN, read_file
from pipelines.inference.pictures import PictureRow, Pictures
from pipelines.inference.request import TASKS, Request, RequestError, check_fields
from pipelines.presentation.images import to_png
from pipelines.serving.limits import Limits
from pipelines.shards.ingest.encode import as_png

OWN = ("model", "task", "format")
"""Fields of a body beside those of the typed request."""
FORMATS = ("json", "png")


def read_body(body: Mapping[str, Any], folder: Path, limits: Limits) -> Request:
    """Return the typed request of a body.

    Args:
        folder: where given pictures are put; it must outlive the use of the request.

    Raises:
        RequestError: a field is missing, unknown or out of range.
    """
    kind = TASKS.get(_text(body, "task", "sample"))
    if kind is None:
        raise RequestError(f"task = {body['task']!r}: allowed are {', '.join(TASKS)}")
    fields = {name: value for name, value in body.items() if name not in OWN and value is not None}
    check_fields(kind, fields, OWN)
    pixels = 0
    for name in ("images", "masks"):
        if name in fields:
            fields[name], sizes = _write_pictures(name, fields[name], folder, limits)
            pixels += sum(sizes)
    limits.check_total(pixels)
    return kind.of(**fields)


def answer_format(body: Mapping[str, Any]) -> str:
    """Return in which form a body wants its answer.

    Raises:
        RequestError: there is no such form.
    """
    wanted = _text(body, "format", "json")
    if wanted not in FORMATS:
        raise RequestError(f"format = {wanted!r}: allowed are {', '.join(FORMATS)}")
    return wanted


def write_answer(pictures: Pictures, source: PictureSource, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer to a request.

    Args:
        source: who drew the pictures.
        batch: the network batch that they were drawn in.
    """
    request = pictures.request.model_dump(mode="json")
    if pictures.originals is not None:
        request["images"] = [encode_png(image) for image in pictures.originals]
    if pictures.hidden is not None:
        request["masks"] = [encode_png(hidden[..., None] * np.uint8(255)) for hidden in pictures.hidden]
    return {
        "model": model_of(source),
        "request": {"task": pictures.request.task, **request},
        "images": [encode_png(image) for image in pictures.pixels],
        "rows": [asdict(row) for row in pictures.rows],
        "columns": pictures.columns,
        "grid": encode_png(grid_of(pictures)) if len(pictures.rows) > 1 or pictures.originals is not None else None,
        "film": None if pictures.film is None else _write_film(pictures.film),
        "batch": dict(batch),
    }


def model_of(source: PictureSource) -> dict[str, Any]:
    """Return what answers say of a model: its registered name and version, if any, and where it came from."""
    name, _, number = (source.version or "").removeprefix("models:/").rpartition("/")
    return {**asdict(source), "name": name or source.reference, "version": number or None, "uri": source.version}


def known_names(served: Sequence[str]) -> dict[str, str]:
    """Return the names by which requests may call models -> their references.

    models:/digits@champion is also digits@champion, champion and digits, where no other model is called so.
    """
    short: dict[str, list[str]] = {}
    for reference in served:
        bare = reference.removeprefix("models:/")
        parts = [bare, *(bare.split("@") if "@" in bare else bare.rsplit("/", 1)[:1])] if bare != reference else []
        for name in dict.fromkeys(parts):
            short.setdefault(name, []).append(reference)
    unique = {name: references[0] for name, references in short.items() if len(references) == 1}
    return {reference: reference for reference in served} | unique


def one_picture(answer: Mapping[str, Any]) -> bytes:
    """Return the PNG file that stands for an answer: its one picture, or else the grid."""
    return base64.b64decode(answer["grid"] or answer["images"][0])


def write_body(request: Request) -> dict[str, Any]:
    """Return the body that asks a server for a request.

    Raises:
        RequestError: a given picture cannot be read.
    """
    fields = request.model_dump(mode="json", exclude_defaults=True)
    for name in ("images", "masks"):
        if name in fields:
            fields[name] = [
                text
                if text.startswith(DRAWN)
                else read_file("picture", Path(text), lambda data: base64.b64encode(as_png(data)).decode())
                for text in fields[name]
            ]
    return {"task": request.task, **fields}


def read_answer(answer: Mapping[str, Any]) -> tuple[Pictures, PictureSource]:
    """Return the pictures of an answer, and who drew them.

    Raises:
        RequestError: it is no such answer.
    """
    try:
        fields = dict(answer["request"])
        kind = TASKS[fields.pop("task")]
        given = {name: [decode_png(text) for text in fields[name]] for name in ("images", "masks") if name in fields}
        names = {name: [f"{name}-{i}.png" for i in range(len(pictures))] for name, pictures in given.items()}
        pictures = Pictures(
            pixels=np.stack([decode_png(text) for text in answer["images"]]),
            rows=tuple(PictureRow(**row) for row in answer["rows"]),
            columns=int(answer["columns"]),
            request=kind.of(**{**fields, **names}),
            originals=np.stack(given["images"]) if "images" in given else None,
            hidden=np.stack(given["masks"])[..., 0] > 0 if "masks" in given else None,
            film=None if answer["film"] is None else _read_film(answer["film"]),
        )
        told = answer["model"]
        source = PictureSource(told["reference"], told["digest"], told["uri"], told["lineage"], told["versions"])
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"that is no answer of `ddpm serve`: {error!r}") from error
    return pictures, source


def encode_png(image: NDArray[np.uint8]) -> str:
    """Return an image, uint8 [H, W, C], as a PNG file in base64."""
    return base64.b64encode(to_png(image)).decode()


def decode_png(text: str) -> NDArray[np.uint8]:
    """Return the pixels of a PNG file in base64 that a server has written, uint8 [H, W, C]."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def decode_base64(name: str, text: Any) -> bytes:
    """Return the bytes of a text in base64, perhaps as a data URL of a PNG.

    Raises:
        RequestError: it is none.
    """
    if not isinstance(text, str):
        raise RequestError(f"{name} is no text: send the bytes of a PNG file in base64")
    try:
        return base64.b64decode(text.removeprefix("data:image/png;base64,"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name} is no base64 text ({error}): send the bytes of a PNG file in base64") from error


def _write_pictures(name: str, given: Any, folder: Path, limits: Limits) -> tuple[list[Any], list[int]]:
    """Write pictures into files, and return their paths, or how masks are drawn, with the pixels of each file."""
    if not isinstance(given, list):
        raise RequestError(f"{name}: write a list of PNG files in base64")
    written: list[Any] = []
    sizes: list[int] = []
    for i, text in enumerate(given):
        if name == "masks" and isinstance(text, str) and text.startswith(DRAWN):
            written.append(text)
            continue
        data = decode_base64(f"{name}[{i}]", text)
        sizes.append(limits.check_picture(f"{name}[{i}]", data))
        path = folder / f"{name}-{i}.png"
        path.write_bytes(data)
        written.append(str(path))
    return written, sizes


def _text(body: Mapping[str, Any], name: str, default: str) -> str:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{name} = {value!r}: write a text")
    return value or default


def _write_film(film: Film) -> dict[str, Any]:
    def encode(states: Tensor) -> list[list[str]]:
        return [[encode_png(image) for image in state.numpy()] for state in states]

    return {"t": list(film.t), "x_t": encode(film.x_t), "x0": encode(film.x0)}


def _read_film(plain: Mapping[str, Any]) -> Film:
    def decode(states: Sequence[Sequence[str]]) -> Tensor:
        return torch.from_numpy(np.stack([np.stack([decode_png(text) for text in state]) for state in states]))

    return Film(tuple(plain["t"]), decode(plain["x_t"]), decode(plain["x0"]))
