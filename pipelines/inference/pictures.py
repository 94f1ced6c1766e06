"""From a request and a model to pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import to_uint8
from ddpm.inference import (
    Drawing,
    Drawn,
    Film,
    Inpainting,
    Noise,
    check_count,
    check_takes_text,
    class_indices,
    method_name,
    row_drawings,
)
from ddpm.model import Model
from pipelines.checkpoints import references
from pipelines.checkpoints.references import Resolved
from pipelines.config import Config
from pipelines.evaluation.devices import task_device
from pipelines.inference.inputs import read_images, read_mask
from pipelines.inference.request import EditRequest, InpaintRequest, Request, RequestError, SampleRequest
from pipelines.presentation.progress import Notice, Progress, no_notice, no_progress
from pipelines.shards.text import TextEncoder
from pipelines.storage import Storage

Encode = Callable[[Sequence[str]], Conditioning]
"""Maps texts to their embeddings."""
FRAMES = 48
"""States that a film keeps."""
Finished = Callable[[int, Sequence["PictureRow"], NDArray[np.uint8]], None]
"""Takes some pictures as soon as they are drawn: the index of the first, their rows, and uint8 [B, H, W, C]."""


@dataclass(frozen=True)
class PictureRow:
    """Where one picture comes from.

    Attributes:
        label: its class, if any.
        prompt: its text, if any.
        seed, id: of its noise.
        to_seed, fraction: the other end of an interpolation, and how far the picture is on the way to it.
        image: index of the given image, if any.
    """

    label: str | None
    prompt: str | None
    seed: int
    id: int
    to_seed: int | None = None
    fraction: float | None = None
    image: int | None = None


@dataclass(frozen=True, kw_only=True)
class PictureRows:
    """Where each of some pictures comes from.

    Attributes:
        rows: of each picture, row by row.
        columns: number of columns.
        request: with everything that was left open filled in; it draws the same pictures again.
        originals: the given images at the model's size, uint8 [M, H, W, C]; None where there are none.
        hidden: their pixels that are filled, bool [M, H, W]; None where there are none.
    """

    rows: tuple[PictureRow, ...]
    columns: int
    request: Request
    originals: NDArray[np.uint8] | None = None
    hidden: NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True)
class Pictures(PictureRows):
    """The pictures of a request, and where each comes from.

    Attributes:
        pixels: uint8 [N, H, W, C], row by row.
        film: the way to the pictures, where that was asked for.
    """

    pixels: NDArray[np.uint8]
    film: Film | None = None


def open_model(reference: str, request: Request, config: Config) -> Resolved:
    """Return the model of a MODEL reference with the guiding networks that a request needs, on the GPU if there is one.

    Raises:
        ModelError: the model, or a guiding network, does not exist.
        RequestError: the request changes the sampling settings in a way that does not work.
    """
    device = str(task_device())
    resolved = references.open_model(reference, config, device)
    with as_request_error():
        settings = resolved.model.spec.sampling.with_fields(**request.sampling)
    if settings.guidance == resolved.model.spec.sampling.guidance:
        return resolved
    model = references.guided(resolved.model, settings, config.tracking.uri, Storage.of(config))
    return replace(resolved, model=model.to(device))


@dataclass(frozen=True, kw_only=True)
class Prepared(PictureRows):
    """A request that was resolved against a model: what is to be drawn, and where each picture comes from.

    Attributes:
        drawing: what is to be drawn, row by row.
    """

    drawing: Drawing

    def pictures(self, drawn: Drawn) -> Pictures:
        """Return the pictures, once they are drawn."""
        shared = {field.name: getattr(self, field.name) for field in fields(PictureRows)}
        return Pictures(pixels=to_uint8(drawn.images).cpu().numpy(), film=drawn.film, **shared)


def encoder_of(resolved: Resolved, request: Request) -> Encode | None:
    """Return the text encoder that a model carries, read when it is first asked; None where a request names another.

    A request that is complete names the encoder that embedded the training data, which is the one that is carried.
    """
    own, named = resolved.text_encoder, resolved.model.spec.lineage.get("text_encoder")
    if own is None or own == named or request.text_encoder not in (None, named):
        return None

    @cache
    def encoder() -> TextEncoder:
        return TextEncoder(own, digest=resolved.model.spec.lineage.get("text_encoder_digest"))

    return lambda texts: encoder()(texts)


def picture(
    request: Request,
    model: Model,
    *,
    encode: Encode | None = None,
    progress: Progress = no_progress,
    notice: Notice = no_notice,
    finished: Finished | None = None,
) -> Pictures:
    """Return the pictures that a request asks for; see `prepare` for the other arguments.

    Args:
        progress: called in sampling steps.
        finished: called with each batch as soon as it is drawn; None for nothing.

    Raises:
        RequestError: the model cannot do what is asked; the message says what it can.
    """
    prepared = prepare(request, model, encode=encode, notice=notice)

    def pass_on(first: int, images: Tensor) -> None:
        if finished is not None:
            finished(first, prepared.rows[first : first + len(images)], to_uint8(images).cpu().numpy())

    with as_request_error():  # a sampler may find out only now that its levels do not fit
        drawn = prepared.drawing.draw(model, batch_size=request.batch_size, progress=progress, finished=pass_on)
    return prepared.pictures(drawn)


def prepare(request: Request, model: Model, *, encode: Encode | None = None, notice: Notice = no_notice) -> Prepared:
    """Return what a model has to draw for a request, and everything that can be known before.

    Args:
        model: on the device to use, with the networks that guide it.
        encode: text encoder to use instead of the one that the request or the model names.
        notice: called with what was changed in given images.

    Raises:
        RequestError: the model cannot do what is asked; the message says what it can.
    """
    with as_request_error():
        prepared = _Resolving(request, model, encode, notice).prepare()
        prepared.drawing.check(model)
        return prepared


def count_pictures(request: Request, model: Model) -> int:
    """Return how many pictures a request asks for.

    Raises:
        RequestError: labels, prompts or images do not go together.
    """
    with as_request_error():
        return _Resolving(request, model, None, no_notice).count


@contextmanager
def as_request_error() -> Iterator[None]:
    """Raise a ValueError, with which `ddpm` says what is wrong with what was asked, as a `RequestError`."""
    try:
        yield
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(str(error)) from error


class _Resolving:
    """A request that is being resolved against a model; its errors are ValueErrors."""

    def __init__(self, request: Request, model: Model, encode: Encode | None, notice: Notice) -> None:
        self.request, self.model, self.spec, self.encode, self.notice = request, model, model.spec, encode, notice
        self.images: tuple[Any, ...] = request.images if isinstance(request, InpaintRequest | EditRequest) else ()
        labels = request.labels
        if labels is None and isinstance(request, SampleRequest) and request.prompts is None and self.spec.classes:
            labels = tuple(range(len(self.spec.classes)))
        self.labels = None if labels is None else class_indices(labels, self.spec.classes)
        source = request.source_labels if isinstance(request, EditRequest) else None
        self.source_labels = None if source is None else class_indices(source, self.spec.classes, "source_labels")
        self.columns = self._columns()
        if isinstance(request, InpaintRequest) and len(self.images) == 1:
            self.images *= len(request.masks)  # one image with several masks is an image for each of them

    @property
    def count(self) -> int:
        """The number of pictures."""
        return self.columns * self.request.draws

    def prepare(self) -> Prepared:
        """Return what is to be drawn."""
        request = self.request
        check_count(self.count, self.spec)
        if request.prompts is not None:
            check_takes_text(self.spec, "prompts")
        noise, hidden = self._noise(), None
        images = read_images(self.images, self.spec.shape, self.notice)
        columns: dict[str, Sequence[Any] | None] = {"label": self.labels, "prompt": request.prompts}
        more: dict[str, Any] = {}
        originals = np.stack([image.pixels for image in images]) if images else None
        columns["image"] = None if originals is None else [torch.from_numpy(pixels) for pixels in originals]
        if isinstance(request, InpaintRequest):
            masks = request.masks * (len(images) if len(request.masks) == 1 else 1)
            pairs = zip(masks, images, strict=True)
            hidden = np.stack([read_mask(mask, image, self.spec.shape) for mask, image in pairs])
            columns["mask"] = [torch.from_numpy(mask[..., None] * np.uint8(255)) for mask in hidden]
            more = {"method": request.method, "settings": request.method_settings}
        elif isinstance(request, EditRequest):
            columns |= {"strength": [request.strength], "source_label": self.source_labels}
            more = {"invert": request.invert}
        ((_, drawing),) = row_drawings(
            self.model,
            {name: self._spread(values) for name, values in columns.items() if values is not None},
            noise,
            request.sampling,
            negative_prompt=request.negative_prompt,
            encode=self._encode,
            **more,
        )
        drawing = replace(drawing, film=FRAMES if request.film else 0)
        return Prepared(
            drawing=drawing,
            rows=self._rows(noise),
            columns=self.columns,
            request=self._complete(drawing),
            originals=originals,
            hidden=hidden,
        )

    def _columns(self) -> int:
        request = self.request
        given = {
            "labels": self.labels,
            "prompts": request.prompts,
            "images": self.images or None,
            "masks": request.masks if isinstance(request, InpaintRequest) else None,
            "source_labels": self.source_labels,
        }
        lengths = {name: len(values) for name, values in given.items() if values is not None}
        columns = max(lengths.values(), default=1)
        if any(length not in (1, columns) for length in lengths.values()):
            counts = ", ".join(f"{length} {name}" for name, length in lengths.items())
            raise ValueError(f"{counts}: give as many of each as there are columns, or one for all")
        return columns

    def _spread(self, values: Sequence[Any]) -> list[Any]:
        """Return a value for each picture, of values for each column or of one for all."""
        return (list(values) * (self.columns if len(values) == 1 else 1)) * self.request.draws

    def _noise(self) -> Noise:
        request, columns = self.request, self.columns
        if isinstance(request, SampleRequest) and request.interpolate is not None:
            return Noise.between(*request.interpolate, request.frames).map(lambda t: t.repeat_interleave(columns))
        if request.seeds is not None:
            return Noise.of(request.seeds).map(lambda t: t.repeat_interleave(columns))
        return Noise.numbered(request.seed, columns * request.draws)

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        """Return the embeddings of texts."""
        if self.encode is None:
            name = self.request.text_encoder or self.spec.lineage.get("text_encoder")
            if name is None:
                raise ValueError(
                    "the model does not say which text encoder embedded its training data: name it (text_encoder)"
                )
            self.encode = TextEncoder(name, digest=self.spec.lineage.get("text_encoder_digest"))
        return self.encode(texts)

    def _rows(self, noise: Noise) -> tuple[PictureRow, ...]:
        request = self.request
        labels = None if self.labels is None else self._spread([self.spec.classes[i] for i in self.labels])
        prompts = None if request.prompts is None else self._spread(request.prompts)
        images = self._spread(range(len(self.images))) if self.images else None
        return tuple(
            PictureRow(
                None if labels is None else labels[i],
                None if prompts is None else prompts[i],
                int(noise.seeds[i]),
                int(noise.ids[i]),
                None if noise.other is None else int(noise.other[i]),
                None if noise.fraction is None else float(noise.fraction[i]),
                None if images is None else images[i],
            )
            for i in range(len(noise))
        )

    def _complete(self, drawing: Drawing) -> Request:
        """Return the request with labels by name, the text encoder, every sampling setting, and those of a method."""
        request, encoder = self.request, self.request.text_encoder
        if request.prompts is not None or request.negative_prompt is not None:
            encoder = encoder or self.spec.lineage.get("text_encoder")
        names = None if self.labels is None else tuple(self.spec.classes[i] for i in self.labels)
        update = {"labels": names, "text_encoder": encoder, "sampling": drawing.sampling.to_json()}
        if isinstance(drawing.task, Inpainting):
            method = drawing.task.method
            update |= {"method": method_name(method), "method_settings": {} if method is None else dict(vars(method))}
        return request.model_copy(update=update)
