"""The page of a server: every way to draw pictures, in a browser, on a phone, with the keyboard and without a network.

The page is a client like any other: what it shows it asks of the server, in the words of `POST /v1/images`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, which looks for newer versions else

import gradio as gr
import numpy as np
from fastapi import FastAPI
from ray import serve

from ddpm.image_size import of_sides
from pipelines.inference.request import EditRequest, InpaintRequest, RequestError, SampleRequest
from pipelines.serving.application import ask_front
from pipelines.serving.bodies import decode_base64
from pipelines.serving.fields import Form
from pipelines.serving.forms import (
    BRUSH,
    HALVES,
    enlarged,
    figures,
    film,
    picture_and_mask,
)
from pipelines.serving.limits import Limits, RefusedRequest
from pipelines.serving.login import Login

Ask = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]
"""Maps the body of a request to the server's answer; raises RequestError for what the server refuses."""

STYLE = """
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 12px; }
.pictures figure { margin: 0; }
.pictures img, .film img { width: 100%; aspect-ratio: 1; border-radius: 4px; display: block; }
.pictures img, .film img { image-rendering: pixelated; }
.pictures figcaption, .film small { font-size: 12px; overflow-wrap: anywhere; }
.film { display: flex; gap: 8px; overflow-x: auto; padding-bottom: 8px; }
.film .state { flex: 0 0 96px; display: grid; gap: 6px; }
"""
NO_CARD = "This model has no card: it is not a version of the registry."
KEPT_S = (600, 3600)
"""Every so many seconds, uploads older than so many are deleted."""
FONTS = ["system-ui", "sans-serif"]
"""Fonts that are there without a network."""


class ModelPage:
    """The deployment of the page: one process, because it keeps what its visitors have uploaded.

    Args:
        front: handle of the process that answers requests.
        models: what is served, as in `GET /v1/models`.
        limits: of a request.
        token_digest: of the token that visitors need; None for none.
    """

    def __init__(
        self, front: Any, models: Sequence[Mapping[str, Any]], limits: Limits, token_digest: str | None
    ) -> None:
        self._front, self._models, self._limits, self._token_digest = front, models, limits, token_digest

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application that Ray Serve answers HTTP with."""
        return make_page(self._models, partial(ask_front, self._front), self._limits, self._token_digest)


def page_application(front: Any, models: Sequence[Mapping[str, Any]], limits: Limits, token_digest: str | None) -> Any:
    """Return the Ray Serve application of the page; the arguments are those of `ModelPage`."""
    deployment = serve.deployment(serve.ingress()(ModelPage), num_replicas=1, ray_actor_options={"num_cpus": 0})
    return deployment.bind(front, list(models), limits, token_digest)


def make_page(models: Sequence[Mapping[str, Any]], ask: Ask, limits: Limits, token_digest: str | None) -> FastAPI:
    """Return the page as an application of its own, at /.

    Args:
        limits: of a request, which what a visitor uploads is held to before it is decoded.
        token_digest: of the token that visitors need; None for none.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if token_digest is not None:
        app.add_middleware(Login, digest=token_digest)
    theme = gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        app,
        build_page(models, ask, limits),
        path="/",
        max_file_size=limits.max_body,
        theme=theme,
        css=STYLE,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        show_error=False,
    )


def build_page(models: Sequence[Mapping[str, Any]], ask: Ask, limits: Limits) -> gr.Blocks:
    """Return the page of some models: a tab for each of them, where there are several."""
    blocks = gr.Blocks(title="Pictures from a diffusion model", analytics_enabled=False, delete_cache=KEPT_S)
    with blocks:
        if len(models) == 1:
            _Panel(models[0], ask, limits).build()
        else:
            with gr.Tabs():
                for model in models:
                    with gr.Tab(model["id"]):
                        _Panel(model, ask, limits).build()
    # The server puts the requests of different visitors into one batch, and has limits of its own.
    return blocks.queue(default_concurrency_limit=None)


def _limited(field: gr.Image | gr.ImageEditor, limits: Limits) -> Any:
    """Return a field whose pictures are held to the limits of a request before they are decoded.

    Not a class of its own: gradio would write a file for it beside this one.
    """
    decode = field.preprocess

    def preprocess(payload: Any) -> Any:
        parts = [payload]
        if isinstance(field, gr.ImageEditor) and payload is not None:  # a drawing may be sent beside the form
            drawing = payload if payload.id is None else field.blob_storage.get(payload.id)
            parts = [] if drawing is None else [drawing.background, *(drawing.layers or []), drawing.composite]
        for part in parts:
            _check_upload(limits, part)
        return decode(payload)

    field.preprocess = preprocess  # type: ignore[method-assign]
    return field


def _check_upload(limits: Limits, given: Any) -> None:
    """Check the size of an uploaded picture: a file, its bytes, or a data URL.

    Raises:
        gr.Error: it is too large, or no picture.
    """
    with _shown_errors():
        url = getattr(given, "url", None) or ""
        if given is None:
            return
        if isinstance(given, bytes) or url.startswith("data:"):
            data = given if isinstance(given, bytes) else decode_base64("the image", url.partition(",")[2])
            if len(data) > limits.max_body:
                raise RefusedRequest(413, f"the image has {len(data):,} bytes: at most {limits.max_body:,} are allowed")
            limits.check_picture("the image", data, formats=None)
        elif given.path:
            limits.check_picture("the image", Path(given.path), formats=None)


class _Panel:
    """The forms of one model."""

    def __init__(self, told: Mapping[str, Any], ask: Ask, limits: Limits) -> None:
        self.told, self.ask, self.limits = told, ask, limits
        self._size = of_sides(*told["shape"][1:])

    def build(self) -> None:
        """Add the forms to the page that is being made."""
        gr.Markdown(f"# {self.told['id']}")
        with gr.Tab("Sample"):
            last = self._sample()
        with gr.Tab("Inpaint"):
            self._inpaint(last)
        with gr.Tab("Edit"):
            self._edit(last)
        with gr.Tab("Film"):
            self._film()
        with gr.Tab("About this model"):
            gr.Markdown(self.told["card"] or NO_CARD)

    def _sample(self) -> gr.State:
        """Add the form of samples, and return the first picture of the last ones."""
        form = Form(SampleRequest, self.told, self.limits, many=True)
        button = gr.Button("Sample", variant="primary")
        pictures, last = gr.HTML(), gr.State(None)

        async def draw(*values: Any) -> tuple[str, str]:
            answer = await self._asked(form, values)
            return figures(answer), answer["images"][0]

        button.click(draw, form.components, [pictures, last], api_name="sample")
        return last

    def _inpaint(self, last: gr.State) -> None:
        gr.Markdown("Drop a picture onto the field, or take the one that was sampled; then brush over what to fill.")
        take = gr.Button("Take the first sampled picture", size="sm")
        editor = gr.ImageEditor(
            label="Picture",
            type="numpy",
            image_mode="RGBA",
            sources=["upload", "clipboard"],
            brush=gr.Brush(colors=["#ff3b30"], color_mode="fixed", default_size=24),
            layers=False,
            transforms=(),
            format="png",  # a brush has sharp edges
            height=400,
        )
        filled = gr.Radio([BRUSH, *HALVES], value=BRUSH, label="Fill")
        form = Form(InpaintRequest, self.told, self.limits)
        button = gr.Button("Fill", variant="primary")
        pictures = gr.HTML()

        async def draw(drawing: Any, filled: str, *values: Any) -> str:
            with _shown_errors():
                picture, mask = await asyncio.to_thread(picture_and_mask, drawing, filled, self._size)
            return figures(await self._asked(form, values, images=[picture], masks=[mask]))

        take.click(self._take, last, editor, api_visibility="private")
        button.click(draw, [_limited(editor, self.limits), filled, *form.components], pictures, api_name="inpaint")

    def _edit(self, last: gr.State) -> None:
        gr.Markdown("The picture is noised and drawn again from there: its coarse content stays, the rest is new.")
        take = gr.Button("Take the first sampled picture", size="sm")
        # Not as an array: that of a GIF file has no colours, but indices of them.
        given = gr.Image(label="Picture", type="pil", image_mode="RGBA", sources=["upload", "clipboard"], height=320)
        form = Form(EditRequest, self.told, self.limits, first=("strength",))
        button = gr.Button("Draw again", variant="primary")
        pictures = gr.HTML()

        async def draw(given: Any, *values: Any) -> str:
            def shaped() -> str:
                background = None if given is None else np.asarray(given.convert("RGBA"))
                return picture_and_mask({"background": background}, next(iter(HALVES)), self._size)[0]

            with _shown_errors():
                picture = await asyncio.to_thread(shaped)
            return figures(await self._asked(form, values, images=[picture]))

        take.click(self._take, last, given, api_visibility="private")
        button.click(draw, [_limited(given, self.limits), *form.components], pictures, api_name="edit")

    def _film(self) -> None:
        gr.Markdown("From noise to a picture: above x_t, below the x_0 that the model predicts from it.")
        form = Form(SampleRequest, self.told, self.limits)
        button = gr.Button("Show the way", variant="primary")
        shown = gr.HTML()

        async def draw(*values: Any) -> str:
            return film(await self._asked(form, values, film=True))

        button.click(draw, form.components, shown, api_name="film")

    async def _asked(self, form: Form, values: Sequence[Any], **more: Any) -> Mapping[str, Any]:
        """Return the answer to what a form holds, and to fields that are no part of it."""
        with _shown_errors():
            return await self.ask(form.body(values, **more))

    def _take(self, last: str | None) -> Any:
        with _shown_errors():
            if last is None:
                raise RequestError("no picture is sampled yet: sample one first")
            return enlarged(last)


@contextmanager
def _shown_errors() -> Iterator[None]:
    """Show what the server refuses to whoever sits before the page."""
    try:
        yield
    except RequestError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error
