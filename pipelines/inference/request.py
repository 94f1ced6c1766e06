"""The request for pictures: frozen, checked before a model is read, and complete enough to draw the same again.

Every way to ask has its names, types, ranges, defaults and meanings from the fields here: a body of HTTP is the fields
themselves, and the options of the command line and the fields of the page are those of `options`. What settings of
samplers, guidance and methods are allowed, `ddpm` says. Nothing here imports torch before there is a request, so that
`ddpm --help` is quick.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Self, get_args, get_origin

import pydantic
from pydantic import ConfigDict, Field, StrictBool, field_validator, model_validator
from pydantic.fields import FieldInfo

from pipelines.presentation.errors import PipelineError

MANIFEST = "manifest.json"
"""Name of the file beside pictures that holds their request."""
HALVES = ("left", "right", "top", "bottom")
SHOWN = 100
"""Letters that a message shows of a value."""
NAMED = 5
"""Unknown fields that a message names."""

Seed = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
Count = Annotated[int, Field(ge=1)]


class RequestError(PipelineError, ValueError):
    """A request that a model cannot answer: says what is wrong, what is allowed and how to fix it."""

    exit_code = 2


class Request(pydantic.BaseModel):
    """The fields that all requests have in common.

    Pictures have rows and columns. A column is a class, a prompt or a given image; a list with one entry serves all
    columns. A row is another draw of the noise. With one `seed` the pictures are numbered row by row and each has its
    own noise; with `seeds` a row has one seed, whose noise all its pictures share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    task: ClassVar[str]

    labels: tuple[str | int, ...] | None = Field(
        None,
        min_length=1,
        description="classes by name or index; default of a sample: all of them, unless it has prompts",
    )
    prompts: tuple[str, ...] | None = Field(None, min_length=1, description="a text, for a model trained on text")
    negative_prompt: str | None = Field(None, description="text to move away from, by the guidance scale")
    text_encoder: str | None = Field(None, description="hub name or folder; default: the one the model was trained on")
    count: Count = Field(1, description="pictures of each class, prompt or image; in all where there is none of them")
    seed: Seed = Field(0, description="seed of the noise; the pictures of one seed are numbered")
    seeds: tuple[Seed, ...] | None = Field(
        None, min_length=1, description="a seed for each row of pictures, instead of a count"
    )
    sampling: dict[str, Any] = Field({}, description="fields of `ddpm.generate.Sampling` that differ from the model's")
    batch_size: Count = Field(64, description="pictures of one network call; they depend on it by rounding alone")
    film: StrictBool = Field(
        False, description="also the way there, x_t and the predicted x_0; as files, film.png and film.webp"
    )

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Return the request with these fields; None stands for a field's default.

        Raises:
            RequestError: a field is unknown or out of range.
        """
        fields = {name: value for name, value in given.items() if value is not None}
        check_fields(cls, fields)
        try:
            return cls(**fields)
        except pydantic.ValidationError as error:
            raise RequestError("\n".join(_lines(error, cls))) from error

    @model_validator(mode="after")
    def _of_settings_that_there_are(self) -> Self:
        from ddpm.inference import check_sampling  # torch

        check_sampling(self.sampling)
        return self

    @model_validator(mode="after")
    def _one_source_of_rows(self) -> Self:
        if self.seeds is not None and self.count != 1 and self.count != len(self.seeds):
            raise ValueError(f"there are {len(self.seeds)} seeds and a count of {self.count}: give only one of the two")
        return self

    @property
    def draws(self) -> int:
        """The number of rows."""
        return self.count if self.seeds is None else len(self.seeds)


class SampleRequest(Request):
    """Pictures from noise; a model with classes and neither labels nor prompts draws every class."""

    task: ClassVar[str] = "sample"

    interpolate: tuple[Seed, Seed] | None = Field(None, description="seeds between whose noise the rows interpolate")
    frames: Annotated[int, Field(ge=2)] = Field(8, description="rows of an interpolation, both ends included")

    @model_validator(mode="after")
    def _one_kind_of_rows(self) -> Self:
        if self.interpolate is not None and (self.seeds is not None or self.count != 1):
            raise ValueError("interpolate makes the rows by itself: set frames, and leave seeds and count out")
        return self

    @property
    def draws(self) -> int:
        """See `Request`."""
        return super().draws if self.interpolate is None else self.frames


class InpaintRequest(Request):
    """Images whose hidden pixels are filled; the others stay exactly as they are."""

    task: ClassVar[str] = "inpaint"

    images: tuple[Path, ...] = Field(min_length=1, description="pictures, brought to the model's size and channels")
    masks: tuple[str, ...] = Field(
        min_length=1,
        title="mask",
        description="a picture whose white pixels are filled, box:X,Y,WIDTH,HEIGHT in pixels of the model's image, or "
        "half:left|right|top|bottom; one for each image or for all, or several of one image",
    )
    method: str | None = Field(
        None,
        description="how to fill: trained, repaint or replacement; default: trained if the model was, else repaint",
    )
    method_settings: dict[str, Any] = Field(
        {}, description="steps, and for repaint resamplings and jump_length, that differ from the method's own"
    )

    @field_validator("masks")
    @classmethod
    def _forms_of_masks(cls, masks: tuple[str, ...]) -> tuple[str, ...]:
        for mask in masks:
            if mask.startswith("box:"):
                parse_box(mask)
            elif mask.startswith("half:") and mask.removeprefix("half:") not in HALVES:
                raise ValueError(f"{mask}: the half that is filled is one of {', '.join(HALVES)}")
        return masks

    @model_validator(mode="after")
    def _of_a_method_that_there_is(self) -> Self:
        from ddpm.inference import check_method  # torch

        check_method(self.method, self.method_settings)
        return self


class EditRequest(Request):
    """Other pictures from images: those that are noised and sampled from there (SDEdit), or inverted."""

    task: ClassVar[str] = "edit"

    images: tuple[Path, ...] = Field(min_length=1, description="pictures, brought to the model's size and channels")
    strength: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="level from which is sampled, as a share of T: 0 keeps the image, 1 keeps nearly nothing"
    )
    invert: StrictBool = Field(False, description="find the noise of the image by DDIM instead of drawing it")
    source_labels: tuple[str | int, ...] | None = Field(
        None, min_length=1, description="classes of the images, which an inversion needs to find their noise"
    )

    @model_validator(mode="after")
    def _source(self) -> Self:
        if self.source_labels is not None and not self.invert:
            raise ValueError("source_labels are for an inversion: set invert, or leave them out")
        return self


@dataclass(frozen=True)
class Option:
    """A value of a request as a person writes it, on a command line or in a form.

    Attributes:
        name: of the option, and of what a form shows.
        field: of the request that it is, or is in.
        setting: within the field, where that holds settings by name; "" elsewhere.
        type: bool, int, float, str or Path.
        meaning: in one line.
        several: "" for one value; "repeat" for a text each; "A,B" or "A,B,…" for one text with commas between them.
        default: None where it is the model's, or where there is none.
        required: whether a request needs it.
        low, high: what numbers may be, both included; None for what has no bound, or one that `ddpm` knows.
    """

    name: str
    field: str
    setting: str
    type: type
    meaning: str
    several: str = ""
    default: Any = None
    required: bool = False
    low: float | None = None
    high: float | None = None

    def read(self, given: Any, classes: Sequence[str] = ()) -> Any:
        """Return the value of a field or setting for what a person has written.

        Args:
            classes: the model's, where they are known: a text that is the name of one of them is not cut.

        Raises:
            RequestError: it cannot be read.
        """
        if not isinstance(given, str):
            return given
        if self.several == "repeat" or given in classes:
            return [given]
        texts = [part.strip() for part in (given.split(",") if self.several else [given])]
        parts = texts if self.type in (str, Path) else [plain_value(self.name, text) for text in texts]
        return parts if self.several else parts[0]


SETTINGS: dict[str, tuple[Option, ...]] = {
    "sampling": (
        Option("sampler", "sampling", "kind", str, "kind of sampler, such as dpm_solver; default: the model's own"),
        Option(
            *("steps", "sampling", "steps", int),
            "sampling steps, 1 or more: an edit does its part of them, repaint jumps as well; default: the model's own",
        ),
        Option("eta", "sampling", "eta", float, "noise of a DDIM step, 0 to 1; 0 is deterministic"),
        Option("guidance", "sampling", "scale", float, "guidance scale, 0 or more; default: the model's own"),
        Option(
            *("interval", "sampling", "interval", float),
            "lowest and highest t / T at which guidance is applied",
            several="A,B",
        ),
    ),
    "method_settings": (
        Option("resamplings", "method_settings", "resamplings", int, "how often repaint samples each section"),
        Option("jump_length", "method_settings", "jump_length", int, "length of repaint's jumps, in steps"),
    ),
}
"""Field of settings -> those that people set often, which have a name of their own on a command line and in a form."""


@cache
def options(kind: type[Request]) -> tuple[Option, ...]:
    """Return all that can be written of a request, in the order of its fields."""
    return tuple(
        option for name, field in kind.model_fields.items() for option in SETTINGS.get(name) or (_option(name, field),)
    )


def _option(name: str, field: FieldInfo) -> Option:
    annotation: Any = field.annotation
    if get_origin(annotation) is UnionType:
        annotation = next(each for each in get_args(annotation) if each is not type(None))
    several, parts = "", get_args(annotation)
    if parts:  # of a tuple
        several = "repeat" if parts[0] in (str, Path) else "A,B,…" if parts[-1] is Ellipsis else "A,B"
        annotation = str if get_origin(parts[0]) is UnionType else (*get_args(parts[0]), parts[0])[0]
    bounds = {bound: getattr(part, bound) for part in field.metadata for bound in ("ge", "le") if hasattr(part, bound)}
    assert field.description is not None
    return Option(
        *(field.title or name, name, "", annotation, field.description, several),
        None if field.is_required() else field.default,
        field.is_required(),
        bounds.get("ge"),
        bounds.get("le"),
    )


def read_fields(kind: type[Request], given: Mapping[str, Any], classes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields of a request from what was written, by the names of its options; None and "" say nothing.

    Args:
        classes: the model's, where they are known: a text that is the name of one of them is not cut at its commas.

    Raises:
        RequestError: something cannot be read.
    """
    fields: dict[str, Any] = {}
    for option in options(kind):
        if given.get(option.name) not in (None, ""):
            value = option.read(given[option.name], classes)
            if option.setting:
                fields.setdefault(option.field, {})[option.setting] = value
            else:
                fields[option.field] = value
    return fields


def plain_value(name: str, text: str) -> Any:
    """Return the value of a JSON text, and any other text as it is.

    Raises:
        RequestError: it is JSON that cannot be read; names what it was to be.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}: its value cannot be read: {error}") from error


TASKS: dict[str, type[Request]] = {kind.task: kind for kind in (SampleRequest, InpaintRequest, EditRequest)}


def read_request(manifest: Path) -> Request:
    """Return the request of the pictures beside a manifest; its images are the ones that are stored there.

    Raises:
        RequestError: the file is missing or damaged.
    """
    try:
        plain = json.loads(manifest.read_text())
        fields = dict(plain["request"])
        kind = TASKS[fields.pop("task")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{manifest} is no manifest of pictures: {error!r}") from error
    if "images" in fields:
        fields["images"] = [manifest.parent / name for name in fields["images"]]
    if "masks" in fields:
        fields["masks"] = [str(manifest.parent / name) for name in fields["masks"]]
    return kind.of(**fields)


def parse_box(mask: str) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a mask box:X,Y,WIDTH,HEIGHT.

    Raises:
        ValueError: it is written in another way, or no box at all.
    """
    try:
        x, y, width, height = (int(part) for part in mask.removeprefix("box:").split(","))
    except ValueError as error:
        raise ValueError(f"{mask}: write box:X,Y,WIDTH,HEIGHT, four whole numbers of pixels") from error
    if min(x, y) < 0 or min(width, height) < 1:
        raise ValueError(f"{mask}: a box begins at 0,0 or later and has a pixel at least")
    return x, y, width, height


def check_fields(kind: type[Request], names: Iterable[str], own: Sequence[str] = ()) -> None:
    """Raise if there are names that no field of a request has.

    Args:
        own: names that may be there beside the fields.

    Raises:
        RequestError: there are.
    """
    if unknown := sorted(set(names) - {*own, *kind.model_fields}):
        more = f" and {len(unknown) - NAMED:,} more" if len(unknown) > NAMED else ""
        raise RequestError(
            f"{', '.join(unknown[:NAMED])}{more}: no such field of a request to {kind.task}; "
            f"there are: {', '.join([*own, *kind.model_fields])}"
        )


def _lines(error: pydantic.ValidationError, cls: type[Request]) -> list[str]:
    """Return a line for each field that is wrong; of a list with a wrong entry, for the entry."""
    parts = [(_place(part["loc"]), part) for part in error.errors()]
    found: dict[str, list[Any]] = {}
    for place, part in parts:
        if not any(place and other.startswith(f"{place}.") for other, _ in parts):
            found.setdefault(place, []).append(part)
    return [_line(place, wrong, cls) for place, wrong in found.items()]


def _place(path: Sequence[str | int]) -> str:
    """Return the name of a field or of an entry of a list, without the type that the entry was tried as."""
    typed = len(path) > 1 and isinstance(path[-1], str) and isinstance(path[-2], int)
    return ".".join(str(part) for part in (path[:-1] if typed else path))


def _line(place: str, wrong: Sequence[Any], cls: type[Request]) -> str:
    """Return one line of what is wrong with a field, as each of the types that it may have."""
    kind, given = wrong[0]["type"], repr(wrong[0]["input"])
    if kind == "missing":
        return f"{place} is missing: a request to {cls.task} needs {cls.model_fields[wrong[0]['loc'][0]].description}"
    said = " or ".join(part["msg"].removeprefix("Value error, ") for part in wrong)
    return f"{place} = {given if len(given) <= SHOWN else given[:SHOWN] + '…'}: {said}" if place else said
