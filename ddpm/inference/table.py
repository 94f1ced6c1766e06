"""Pictures for a table of rows, the input of a served model: all tasks, with settings by name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import OF_ALL_KINDS, to_uint8
from ddpm.guidance import GUIDANCE
from ddpm.inference.checks import can_inpaint, check_count, check_names, check_takes_text, class_indices
from ddpm.inference.drawing import Drawing
from ddpm.inference.noise import Noise
from ddpm.inference.tasks import INPAINTERS, METHODS, TRAINED, Editing, FromNoise, Inpainting, Inverting, Task
from ddpm.model import Model
from ddpm.samplers import SAMPLERS
from ddpm.samplers.repaint import Inpainter
from ddpm.settings import check_settings, settings_of

COLUMNS: dict[str, str] = {
    "label": "any",
    "prompt": "string",
    "image": "any",
    "mask": "any",
    "strength": "double",
    "seed": "long",
}
"""Column -> type of its values in MLflow's terms; every column is optional."""
OWN: dict[str, tuple[str, Any]] = {
    "seed": ("long", 0),
    "method": ("string", None),
    "resamplings": ("long", None),
    "jump_length": ("long", None),
    "negative_prompt": ("string", None),
}
"""Parameter of a request beside the sampling settings -> (type, default)."""

_Allowed = tuple[str, Callable[[Any], bool]]
_TEXT: _Allowed = ("a text", lambda value: isinstance(value, str))
_PICTURE: _Allowed = (
    "the bytes of a PNG file, or their base64 text",
    lambda value: isinstance(value, str | bytes | bytearray),
)
_VALUES: dict[str, _Allowed] = {
    "label": ("the name or index of a class", lambda value: isinstance(value, str | numbers.Integral)),
    "prompt": _TEXT,
    "image": _PICTURE,
    "mask": _PICTURE,
    "strength": ("a number in [0, 1]", lambda value: isinstance(value, numbers.Real) and math.isfinite(value)),
    "seed": (
        "a whole number in [0, 2^63)",
        lambda value: isinstance(value, numbers.Integral) and 0 <= int(value) < 1 << 63,
    ),
    "negative_prompt": _TEXT,
}
"""Column or parameter -> (description of its values, function that tells whether a value is allowed)."""

Encode = Callable[[Sequence[str]], Conditioning]
Decode = Callable[[Any, int, str], Tensor]
"""(encoded picture, channels, "image" or "mask") -> pixels, uint8 [H, W, C]; transparent images are put on white."""


def parameters() -> dict[str, tuple[str, Any]]:
    """Return parameter -> (type, default) of a request: the fields of `Sampling`, and those of `OWN`.

    None, or [] for a list, keeps the model's own setting. Settings that name another network are not included.

    Examples:
        >>> parameters()["steps"], parameters()["seed"], "weak" in parameters()  # that one names another network
        (('long', None), ('long', 0), False)
    """
    kinds: list[Any] = [*SAMPLERS.values(), *GUIDANCE.values(), *OF_ALL_KINDS]
    found: dict[str, tuple[str, Any]] = {"kind": ("string", None), "guidance": ("string", None)}
    words = {bool: "boolean", int: "long"}
    for setting in (setting for kind in kinds for setting in settings_of(kind) if not setting.reference):
        word = "double" if setting.fractional else words.get(type(setting.default), "string")
        found[setting.name] = (word, [] if setting.several else None)
    return found | OWN


def draw_table(
    model: Model,
    columns: Mapping[str, Sequence[Any]],
    given: Mapping[str, Any],
    *,
    encode: Encode | None = None,
    decode: Decode | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Return a picture for each row, uint8 [N, H, W, C]; see `table_drawings` for the other arguments.

    Raises:
        ValueError: a column or parameter is unknown, or the model cannot do what is asked.

    Examples:
        >>> from ddpm.model import ModelSpec
        >>> from ddpm.models import UNetConfig
        >>> config = UNetConfig(channels=(8,), attention=(False,), norm_groups=4, head_dim=None, layers_per_block=1)
        >>> model = Model(ModelSpec(config, {"kind": "linear"}, "v", image_size=8), config.build())  # untrained
        >>> draw_table(model, {"seed": [7, 8]}, {"steps": 2}).shape
        torch.Size([2, 8, 8, 3])
    """
    parts = table_drawings(model, columns, given, encode=encode, decode=decode)
    drawn = torch.empty(sum(len(place) for place, _ in parts), *model.spec.shape)
    for place, drawing in parts:
        drawn[place] = drawing.draw(model, batch_size=batch_size).images.float().cpu()
    return to_uint8(drawn)


def table_drawings(
    model: Model,
    columns: Mapping[str, Sequence[Any]],
    given: Mapping[str, Any],
    *,
    encode: Encode | None = None,
    decode: Decode | None = None,
) -> list[tuple[Tensor, Drawing]]:
    """Return the drawings of a table, each with the indices of its rows.

    Args:
        columns: `label` (name or index of a class); `prompt`; `image` with `mask`, whose white pixels are filled, or
            with `strength` of an edit; `seed`. Without `seed` the rows are numbered pictures of the parameter `seed`.
        given: parameters other than their defaults; see `parameters`.
        encode: maps texts to embeddings.
        decode: decodes a picture of `image` or `mask`, which must have the model's size.

    Raises:
        ValueError: a column or parameter is unknown, or the model cannot do what is asked.

    Examples:
        >>> from ddpm.model import ModelSpec
        >>> from ddpm.models import UNetConfig
        >>> model = Model(ModelSpec(UNetConfig(), {"kind": "linear"}, "v", image_size=32), torch.nn.Identity())
        >>> [(place, drawing)] = table_drawings(model, {"seed": [7, 8]}, {"steps": 10})
        >>> place.tolist(), drawing.noise.seeds.tolist(), drawing.sampling.sampler.steps
        ([0, 1], [7, 8], 10)
    """
    check_names("columns", columns, COLUMNS)
    check_names("parameters", given, parameters())
    if not columns:
        raise ValueError(f"no rows: give at least one of the columns {', '.join(COLUMNS)}")
    rows = len(next(iter(columns.values())))
    check_count(rows, model.spec)
    _check_values(columns, given)
    own = {name: default for name, (_, default) in OWN.items()} | {n: v for n, v in given.items() if n in OWN}
    seeds = columns.get("seed")
    noise = Noise.numbered(own["seed"], rows) if seeds is None else Noise.of([int(seed) for seed in seeds])
    return row_drawings(
        model,
        columns,
        noise,
        {name: value for name, value in given.items() if name not in OWN},
        negative_prompt=own["negative_prompt"],
        method=own["method"],
        settings={name: own[name] for name in ("resamplings", "jump_length") if own[name] is not None},
        encode=encode,
        decode=decode,
    )


def row_drawings(
    model: Model,
    columns: Mapping[str, Sequence[Any]],
    noise: Noise,
    changed: Mapping[str, Any],
    *,
    negative_prompt: str | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    invert: bool = False,
    encode: Encode | None = None,
    decode: Decode | None = None,
) -> list[tuple[Tensor, Drawing]]:
    """Return the drawings of rows with given noise, each with the indices of its rows.

    Args:
        columns: `label`, `prompt`, `image` with `mask` or `strength`, and for an inversion `source_label`, as for
            `table_drawings`; pictures may also be pixels already, uint8 [H, W, C].
        noise: random numbers of each row.
        changed: sampling settings that differ from the model's, flat.
        negative_prompt: text that all rows move away from.
        method, settings: of inpainting, as for `inpainting_method`.
        invert: whether images are inverted instead of noised.
        encode, decode: as for `table_drawings`.

    Raises:
        ValueError: the model cannot do what is asked.

    Examples:
        >>> from ddpm.model import ModelSpec
        >>> from ddpm.models import UNetConfig
        >>> model = Model(ModelSpec(UNetConfig(), {"kind": "linear"}, "v", image_size=32), torch.nn.Identity())
        >>> [(place, drawing)] = row_drawings(model, {}, Noise.numbered(7, 3), {"scale": 2.0})
        >>> place.tolist(), drawing.noise.ids.tolist(), drawing.sampling.guidance.scale
        ([0, 1, 2], [0, 1, 2], 2.0)
    """
    sampling, rows = model.spec.sampling.with_fields(**changed), len(noise)
    cond, negative = _condition(model, columns, encode), None
    if negative_prompt is not None:
        negative = _embed(model, encode, "negative_prompt", [negative_prompt] * rows)
    everything = torch.arange(rows)
    tasks: list[tuple[Tensor, Task]] = [(everything, FromNoise())]
    if "image" in columns:
        filling = inpainting_method(model, method, settings, changed) if "mask" in columns else None
        tasks = _tasks_of_images(model, columns, invert, filling, decode)
    elif uses := columns.keys() & {"mask", "strength"}:
        raise ValueError(f"the column {', '.join(sorted(uses))} needs the column image")
    return [
        (
            place,
            Drawing(
                noise.map(lambda tensor, place=place: tensor[place]),  # type: ignore[misc]
                sampling,
                None if cond is None else cond[place],
                task,
                None if negative is None else negative[place],
            ),
        )
        for place, task in tasks
    ]


def inpainting_method(
    model: Model, method: str | None, settings: Mapping[str, Any], asked: Mapping[str, Any] = MappingProxyType({})
) -> Inpainter | None:
    """Return an inpainting method; None for the one that a model was trained for.

    Jumps of RePaint are by default as long a part of the chain as the authors', 10 of 250 steps, because known and
    hidden pixels agree only down to the noise level that a jump reaches.

    Args:
        method: one of `METHODS`; None for the one that the model was trained for, or else "repaint".
        settings: settings of the method that differ from its defaults.
        asked: requested sampling settings, flat. The method takes `steps` from them, and no other setting of a
            sampler's.

    Raises:
        ValueError: there is no such method, or it has no such setting, or no such value of it.

    Examples:
        >>> from ddpm.model import ModelSpec
        >>> from ddpm.models import UNetConfig
        >>> model = Model(ModelSpec(UNetConfig(), {"kind": "linear"}, "v", image_size=32), torch.nn.Identity())
        >>> [inpainting_method(model, "repaint", {}, {"steps": steps}).jump_length for steps in (50, 250)]
        [2, 10]
    """
    name = method or (TRAINED if can_inpaint(model.spec) else "repaint")
    check_method(name, settings)
    if name == TRAINED:
        return None
    kind: Any = INPAINTERS[name]
    own, of_samplers = model.spec.sampling.to_json(), {s.name for kind in SAMPLERS.values() for s in settings_of(kind)}
    idle = [n for n, value in asked.items() if n in {"kind", *of_samplers} - {"steps"} and own.get(n) != value]
    if idle:
        raise ValueError(f"{name} takes the steps of a sampler's settings, and not {', '.join(idle)}: leave that out")
    own_steps = min(kind().steps, model.schedule.num_steps)
    filled = {"steps": asked.get("steps", own_steps), **settings}
    if name == "repaint":
        filled.setdefault("jump_length", max(1, math.ceil(filled["steps"] / 25)))
        if filled["steps"] == 1:
            filled.setdefault("resamplings", 1)
    return kind(**filled)


def check_method(method: str | None, settings: Mapping[str, Any]) -> None:
    """Check an inpainting method as far as that is possible without a model.

    Args:
        method: one of `METHODS`; None where it is the model's.
        settings: settings of the method that differ from its defaults.

    Raises:
        ValueError: there is no such method, or it has no such setting, or no such value of it.

    Examples:
        >>> check_method("repaint", {"jump_length": 5})
        >>> check_method("replacement", {"jump_length": 5})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: jump_length: no setting of replacement; there are: steps, spacing, ...
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"unknown inpainting method {method!r}; allowed: {', '.join(METHODS)}")
    if method == TRAINED and settings:
        raise ValueError(
            f"{', '.join(settings)}: settings of {' and '.join(INPAINTERS)}; a trained model has those of its sampler"
        )
    kinds = [INPAINTERS[method]] if method in INPAINTERS else list(INPAINTERS.values())
    check_settings(method or "a method of inpainting", kinds, settings)


def check_sampling(fields: Mapping[str, Any]) -> None:
    """Check fields of `Sampling` as far as that is possible without the model whose settings they change.

    Raises:
        ValueError: a kind is unknown, no kind has the field, or no kind accepts its value.

    Examples:
        >>> check_sampling({"kind": "ddim", "eta": 0.5})
        >>> check_sampling({"eta": 2.0})
        Traceback (most recent call last):
            ...
        ValueError: eta must be in [0, 1], got 2.0
    """
    given = dict(fields)
    named: list[Any] = [given.pop(name, None) for name in ("kind", "guidance")]
    groups: tuple[Any, ...] = (SAMPLERS, GUIDANCE)
    kinds: list[Any] = []
    for choices, name in zip(groups, named, strict=True):
        kinds += choices.values() if name is None else [choices.find(name)]
    what = "sampling" if named[0] is None else f"the sampler {named[0]!r}"
    check_settings(what, [*kinds, *OF_ALL_KINDS], given)


def _check_values(columns: Mapping[str, Sequence[Any]], given: Mapping[str, Any]) -> None:
    """Check that every row has a value in each column, and that all values and parameters are allowed.

    Raises:
        ValueError: a value is missing or not allowed; the message says where, and what is allowed.
    """
    places = [(name, f" in row {i}", value) for name, values in columns.items() for i, value in enumerate(values)]
    places += [(name, "", value) for name, value in given.items() if name in _VALUES and value is not None]
    for name, place, value in places:
        allowed, fits = _VALUES[name]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(f"{name} is missing{place}: write {allowed} in every row, or leave the column out")
        if not fits(value):
            shown = repr(value) if len(repr(value)) <= 50 else f"{repr(value)[:50]} …"
            raise ValueError(f"{name} = {shown}{place}: write {allowed}")


def _condition(model: Model, columns: Mapping[str, Sequence[Any]], encode: Encode | None) -> Conditioning | None:
    labels, prompts = columns.get("label"), columns.get("prompt")
    if not model.spec.classes and prompts is None:
        return None  # the labels of a model without classes are its rows
    text = Conditioning() if prompts is None else _embed(model, encode, "prompt", prompts)
    if labels is None:
        return None if prompts is None else text
    return replace(text, label=torch.tensor(class_indices(list(labels), model.spec.classes, "label")))


def _embed(model: Model, encode: Encode | None, field: str, texts: Sequence[str]) -> Conditioning:
    check_takes_text(model.spec, field)
    if encode is None:
        raise ValueError("prompts need a text encoder, and there is none")
    different = list(dict.fromkeys(texts))
    return encode(different)[torch.tensor([different.index(text) for text in texts])]


def _tasks_of_images(
    model: Model,
    columns: Mapping[str, Sequence[Any]],
    invert: bool,
    filling: Inpainter | None,
    decode: Decode | None,
) -> list[tuple[Tensor, Task]]:
    if ("mask" in columns) == ("strength" in columns):
        raise ValueError("an image needs either a mask, to fill what it hides, or a strength, to draw it again")
    images = torch.stack([_pixels(value, decode, model.spec.shape, "image") for value in columns["image"]])
    images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    if "mask" in columns:
        form = (1, *model.spec.shape[1:])
        masks = torch.stack([_pixels(value, decode, form, "mask") for value in columns["mask"]])
        return [(torch.arange(len(images)), Inpainting(images, masks.permute(0, 3, 1, 2) < 128, filling))]
    source = None
    if "source_label" in columns:
        source = Conditioning(label=torch.tensor(class_indices(columns["source_label"], model.spec.classes)))
    strengths = [float(strength) for strength in columns["strength"]]
    places = {s: torch.tensor([i for i, other in enumerate(strengths) if other == s]) for s in dict.fromkeys(strengths)}
    if not invert:
        return [(place, Editing(images[place], strength)) for strength, place in places.items()]
    return [
        (place, Inverting(images[place], strength, None if source is None else source[place]))
        for strength, place in places.items()
    ]


def _pixels(value: Any, decode: Decode | None, shape: tuple[int, int, int], what: str) -> Tensor:
    channels, height, width = shape
    if decode is None and not isinstance(value, Tensor):
        raise ValueError("pictures need a decoder, and there is none")
    pixels = value if decode is None else decode(value, channels, what)
    if list(pixels.shape) != [height, width, channels]:
        found = f"{pixels.shape[0]}x{pixels.shape[1]}"
        raise ValueError(
            f"the {what} is {found} pixels (height x width), the model's images are {height}x{width}: resize it"
        )
    return pixels
