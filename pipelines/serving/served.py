"""One loaded model that answers requests: each is resolved, drawn in a batch with others, and put into words."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import to_uint8
from ddpm.image_size import height_width
from ddpm.inference import COLUMNS, Drawing, Drawn, Noise, can_inpaint, parameters, table_drawings
from ddpm.model import Model
from pipelines import tracking
from pipelines.checkpoints import ModelError, references
from pipelines.checkpoints.references import Resolved
from pipelines.config import Config
from pipelines.environment.scratch import temporary_folder
from pipelines.evaluation.devices import task_device
from pipelines.inference.files import PictureSource
from pipelines.inference.pictures import Encode, Prepared, as_request_error, count_pictures, prepare
from pipelines.inference.request import RequestError
from pipelines.registry.forgotten import FORGET_TAG
from pipelines.serving.batcher import Batcher
from pipelines.serving.bodies import decode_base64, model_of, read_body, write_answer
from pipelines.serving.limits import Limits, RefusedRequest
from pipelines.shards.ingest.encode import ImageFormat, decode_grey, encode_image
from pipelines.shards.ingest.readers import UnreadableError
from pipelines.shards.text import TextEncoder
from pipelines.tracking import Scoring


@dataclass(frozen=True, eq=False)
class Served:
    """A model that is served; belongs to one event loop.

    Attributes:
        resolved: the model, with its origin.
        source: what answers say of it.
        limits: of a request.
        batcher: draws.
        encode: embeds texts; None for a model that was not trained on text.
        scoring: MLflow's protocol for it.
        card: the model card of a registered version, Markdown, as it was when it was loaded; None where there is none.
    """

    resolved: Resolved
    source: PictureSource
    limits: Limits
    batcher: Batcher
    encode: Encode | None
    scoring: Scoring
    card: str | None

    @property
    def model(self) -> Model:
        """The model."""
        return self.resolved.model

    async def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to the JSON body of a request; see `pipelines.serving.bodies`.

        Raises:
            RequestError: the model cannot do what is asked, or may not.
        """
        prepared = await asyncio.to_thread(self._prepare, body)
        with as_request_error():
            share = await self.batcher(prepared.drawing)
        batch = {**asdict(share.batch), "first": share.first}
        return await asyncio.to_thread(lambda: write_answer(prepared.pictures(share.drawn), self.source, batch))

    async def invoke(
        self, body: Mapping[str, Any], content_type: str, callers: Executor
    ) -> tuple[tuple[str, int, str], int, list[dict[str, Any]]]:
        """Return the answer to a request of MLflow's scoring protocol, its number of pictures, and their batches.

        MLflow's code calls the model from a thread, where it waits for the batches.

        Args:
            callers: of the threads.
        """
        loop = asyncio.get_running_loop()
        asked: list[Future[tuple[Tensor, list[dict[str, Any]]]]] = []

        def predict(columns: dict[str, list[Any]], given: dict[str, Any]) -> NDArray[np.uint8]:
            asked.append(asyncio.run_coroutine_threadsafe(self.draw_table(columns, given), loop))
            return to_uint8(asked[0].result()[0]).numpy()

        try:
            answer = await loop.run_in_executor(callers, self.scoring, body, content_type, predict)
        finally:
            for future in asked:
                future.cancel()
        if answer[1] != 200:
            return answer, 0, []
        images, batches = asked[0].result()
        return answer, len(images), batches

    async def draw_table(
        self, columns: Mapping[str, Sequence[Any]], given: Mapping[str, Any]
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return a picture in [-1, 1] for each row of a table, [N, C, H, W], and the batches that they were drawn in.

        Args:
            columns, given: see `ddpm.inference.table_drawings`.

        Raises:
            ValueError: the model cannot do what is asked, or may not.
        """
        parts = await asyncio.to_thread(self._table, columns, given)
        shares = await asyncio.gather(*(self.batcher(drawing) for _, drawing in parts))
        images = torch.empty(sum(len(place) for place, _ in parts), *self.model.spec.shape)
        for (place, _), share in zip(parts, shares, strict=True):
            images[place] = share.drawn.images.float().cpu()
        return images, [{**asdict(share.batch), "first": share.first} for share in shares]

    def describe(self) -> dict[str, Any]:
        """Return what the model is and can do, as JSON types."""
        spec, version = self.model.spec, self.resolved.version
        tags = {} if version is None else version.tags
        return {
            **model_of(self.source),
            "classes": list(spec.classes),
            "shape": list(spec.shape),
            "text": bool(spec.network.text_dim),
            "inpainting": can_inpaint(spec),
            "num_steps": self.model.schedule.num_steps,
            "sampling": spec.sampling.to_json(),
            "card": self.card,
            "scores": _read_json(tags.get("scores")),
            "forget_request": tags.get(FORGET_TAG),
            "aliases": [] if version is None else list(version.aliases),
        }

    def _prepare(self, body: Mapping[str, Any]) -> Prepared:
        """Return what is to be drawn for a body."""
        self.limits.check_body(body)
        with temporary_folder("request") as folder:
            try:
                request = read_body(body, folder, self.limits)
                if request.text_encoder not in (None, self.model.spec.lineage.get("text_encoder")):
                    raise RefusedRequest(
                        422, "text_encoder: a server embeds texts by the encoder of its model; leave it out"
                    )
                self._check_settings(request.sampling)
                self.limits.check_count(count_pictures(request, self.model))
                prepared = prepare(request, self.model, encode=self.encode)
            except RefusedRequest:
                raise
            except RequestError as error:  # names files that are ours
                raise RequestError(str(error).replace(f"{folder}/", "")) from error
        self.limits.check_drawing(prepared.drawing, self.model)
        return prepared

    def _table(self, columns: Mapping[str, Sequence[Any]], given: Mapping[str, Any]) -> list[tuple[Tensor, Drawing]]:
        """Return what is to be drawn for a table."""
        self._check_settings(given)
        self.limits.check_count(len(next(iter(columns.values()), ())))
        for column in ("label", "prompt"):
            for text in columns.get(column, ()):
                self.limits.check_body({"prompts" if column == "prompt" else "labels": str(text)})
        own = {"seed", "negative_prompt"}
        self.limits.check_settings("params", {name: value for name, value in given.items() if name not in own})
        self.limits.check_body({"negative_prompt": given.get("negative_prompt")})
        parts = table_drawings(self.model, columns, given, encode=self.encode, decode=self._decode)
        for _, drawing in parts:
            drawing.check(self.model)
            self.limits.check_drawing(drawing, self.model)
        return parts

    def _decode(self, value: Any, channels: int, what: str) -> Tensor:
        """Return the pixels of an image, on white, or of a mask of a table, uint8 [H, W, C], of the model's size."""
        data = decode_base64(f"the {what}", value) if isinstance(value, str) else bytes(value)
        size = self.model.spec.image_size
        height, width = height_width(size)
        self.limits.check_picture(f"the {what}", data, size=(width, height))
        try:
            if what == "mask":
                return torch.from_numpy(decode_grey(data))[..., None]
            return torch.tensor(encode_image(data, ImageFormat(size, channels, "keep", "npy")).pixels)
        except UnreadableError as error:
            raise RequestError(f"the {what} {error}") from error

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Check that a request has no network read or compiled: others would wait for it."""
        own = self.model.spec.sampling
        for name in ("classifier", "weak"):
            if settings.get(name) not in (None, own.guides.get(name)):
                raise RefusedRequest(
                    422, f"sampling.{name}: a server draws with the networks of its model only; leave it out"
                )
        if settings.get("compile") and not own.arithmetic.compile:
            raise RefusedRequest(422, "sampling.compile: others would wait for it; register the model with it")


def load(reference: str, config: Config, executor: Executor) -> Served:
    """Return a model ready to serve: it has drawn a picture, and is compiled where its settings say so.

    Args:
        reference: MODEL.
        executor: of one thread, in which it draws.

    Raises:
        ModelError: the model does not exist, or draws something that is not a number.
    """
    resolved = references.open_model(reference, config, str(task_device()))
    serving, model = config.serving, resolved.model

    def draw(drawing: Drawing) -> Drawn:
        return drawing.draw(model, batch_size=serving.batch_size)

    sampling = model.spec.sampling.with_fields(steps=min(2, model.schedule.num_steps))
    # torch.compile translates for one picture, for two, at the next number for more, and once again for many.
    for count in sorted({1, 2, 3, serving.batch_size}) if sampling.arithmetic.compile else (1,):
        probe = Drawing(Noise.numbered(0, count), sampling, _some_condition(model, count))
        if not bool(draw(probe).images.isfinite().all()):
            raise ModelError(f"{reference} draws something that is not a number: it is not served")
    batcher = Batcher(draw, executor, serving.batch_size, serving.batch_wait_ms / 1000)
    channels, height, width = model.spec.shape
    scoring = Scoring(COLUMNS, np.zeros((1, height, width, channels), np.uint8), parameters())
    card, encode = _card(resolved, config.tracking.uri), _encoder(resolved)
    return Served(resolved, PictureSource.of(resolved), Limits.of(serving), batcher, encode, scoring, card)


def _some_condition(model: Model, count: int) -> Conditioning | None:
    """Return a condition as most requests have it."""
    if width := model.spec.network.text_dim:
        return Conditioning.of_text([torch.zeros(2, width)] * count, torch.zeros(count, width))
    return Conditioning(label=torch.zeros(count, dtype=torch.long)) if model.spec.classes else None


def _read_json(text: str | None) -> Any:
    """Return what a tag says, which anybody may have changed; None where it says nothing."""
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return None


def _card(resolved: Resolved, tracking_uri: str | None) -> str | None:
    if resolved.version is None or tracking_uri is None:
        return None
    return tracking.version_description(tracking_uri, resolved.version.name, resolved.version.version) or None


def _encoder(resolved: Resolved) -> Encode | None:
    """Return the text encoder of a model, which embeds one request's texts at a time.

    Raises:
        ModelError: it cannot be loaded.
    """
    spec, name = resolved.model.spec, resolved.text_encoder
    if not spec.network.text_dim or name is None:
        return None
    try:
        return TextEncoder(name, digest=spec.lineage.get("text_encoder_digest"))
    except ValueError as error:
        raise ModelError(f"{resolved.reference}: {error}") from error
