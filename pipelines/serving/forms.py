"""The page's requests and answers: the body of a request from the fields of a form, and pictures as HTML.

Nothing here knows the page's library, so that everything the page decides can be tested without a browser.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm.image_size import ImageSize, central_part, height_width
from pipelines.inference.request import Request, RequestError, read_fields
from pipelines.serving.bodies import decode_png, encode_png
from pipelines.shards.members import on_white

ELSEWHERE = ("images", "mask", "film", "text_encoder", "batch_size")
"""Options that are no field of a form: pictures are dropped or brushed, a film has a tab, the rest is the server's."""
OWN = "the model's own"
"""Choice of a form that leaves a setting as the model has it."""
BRUSH = "what I brush"
HALVES = {
    "the left half": "half:left",
    "the right half": "half:right",
    "the upper half": "half:top",
    "the lower half": "half:bottom",
}
"""Choice of what is filled, beside `BRUSH` -> mask of a request."""
SHOWN_PIXELS = 320
"""Width at which a given picture is brushed on, at least: pictures of models are small."""


def write_form(
    kind: type[Request], model: str, given: Mapping[str, Any], own: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Return the body of a request from what a form holds, by the names of the request's options.

    Args:
        model: that is asked.
        own: what the model and the request have by themselves, which is not asked for.
        more: fields that are no part of the form.

    Raises:
        RequestError: something cannot be read.
    """
    written = {name: value.strip() if isinstance(value, str) else value for name, value in given.items()}
    asked = {name: value for name, value in written.items() if value != [] and value != own.get(name)}
    return {"model": model, "task": kind.task, **read_fields(kind, asked), **more}


def enlarged(picture: str) -> Image.Image:
    """Return a picture large enough to brush on: each of its pixels is a square."""
    pixels = decode_png(picture)
    image = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
    times = max(1, -(-SHOWN_PIXELS // image.width))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def picture_and_mask(drawing: Mapping[str, Any] | None, filled: str, size: ImageSize) -> tuple[str, str]:
    """Return a picture and the mask of what is to be filled, as fields of a request.

    Args:
        drawing: of an image editor: `background`, and `layers` with what was brushed, each uint8 [H, W, 3 or 4]. What
            is transparent in the background is white, as for the command.
        filled: `BRUSH`, or a key of `HALVES`.
        size: of the model's images, to whose proportions the picture is cut; the mask of a brush has it, and hides a
            pixel of which any part was brushed.

    Raises:
        RequestError: there is no picture, or one of another form, or nothing was brushed.
    """
    background = None if drawing is None else drawing.get("background")
    if drawing is None or background is None:
        raise RequestError("there is no picture yet: drop one onto the field, or take the one that was sampled")
    height, width = height_width(size)
    part = _central(_colours(np.asarray(background)), size)
    picture = encode_png(np.asarray(Image.fromarray(part).resize((width, height), Image.Resampling.BOX)))
    if filled != BRUSH:
        return picture, HALVES[filled]
    brushed = np.zeros(np.asarray(background).shape[:2], bool)
    for layer in drawing.get("layers") or []:
        if layer is not None:
            brushed |= np.asarray(layer)[..., -1] > 0
    if not brushed.any():
        raise RequestError("nothing is brushed yet: paint over what should be filled, or choose a half of the picture")
    mask = Image.fromarray(_central(brushed, size) * np.uint8(255)).resize((width, height), Image.Resampling.BOX)
    return picture, encode_png((np.asarray(mask) > 0)[..., None] * np.uint8(255))


def figures(answer: Mapping[str, Any]) -> str:
    """Return the pictures of an answer as HTML, each with the label or prompt and the seed that it was drawn from."""
    names = [_named(row) for row in answer["rows"]]
    parts = [_figure(picture, name) for picture, name in zip(answer["images"], names, strict=True)]
    return f'<div class="pictures">{"".join(parts)}</div>'


def film(answer: Mapping[str, Any]) -> str:
    """Return the film of the first picture of an answer as HTML: x_t above the x_0 that the model predicts from it."""
    reel = answer["film"]
    columns = [
        f'<div class="state">{_image(x_t[0], f"x_t at t = {t:.0f}")}{_image(x0[0], f"predicted x_0 at t = {t:.0f}")}'
        f"<small>t = {t:.0f}</small></div>"
        for t, x_t, x0 in zip(reel["t"], reel["x_t"], reel["x0"], strict=True)
    ]
    return f'<div class="film" tabindex="0" role="group" aria-label="film of a sample">{"".join(columns)}</div>'


def _colours(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the colours of a picture on white, uint8 [H, W, 3].

    Raises:
        RequestError: it has none.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise RequestError(
            f"the picture is {pixels.dtype} {list(pixels.shape)}: allowed is uint8 [height, width, 3], or 4 with "
            "transparency; save it as a PNG or JPEG file in colours"
        )
    return np.asarray(on_white(Image.fromarray(pixels))[0])


def _central(pixels: NDArray[Any], size: ImageSize) -> NDArray[Any]:
    """Return the largest central part of an image [H, W, ...] that has the proportions of a size."""
    top, left, height, width = central_part(pixels.shape[0], pixels.shape[1], size)
    return pixels[top : top + height, left : left + width]


def _named(row: Mapping[str, Any]) -> str:
    named = row.get("label") if row.get("label") is not None else row.get("prompt")
    seed = f"seed {row['seed']}" + (f", number {row['id']}" if row.get("id") else "")
    return f"{named}, {seed}" if named is not None else seed


def _figure(picture: str, name: str) -> str:
    return f"<figure>{_image(picture, name)}<figcaption>{html.escape(name)}</figcaption></figure>"


def _image(picture: str, name: str) -> str:
    return f'<img src="data:image/png;base64,{picture}" alt="{html.escape(name, quote=True)}">'
