"""The request for pictures: frozen, checked before a model is read, and complete enough to draw the same again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import ConfigDict, Field, PositiveInt, field_validator, model_validator

from ddpm.inference import METHODS
from pipelines.config import Seed
from pipelines.errors import PipelineError

MANIFEST = "manifest.json"
"""Name of the file beside pictures that holds their request."""
HALVES = ("left", "right", "top", "bottom")
SHOWN = 100
"""Letters that a message shows of a value."""

Method = Literal["trained", "replacement", "repaint"]
assert set(METHODS) == {"trained", "replacement", "repaint"}


class RequestError(PipelineError, ValueError):
    """A request that a model cannot answer: says what is wrong, what is allowed and how to fix it."""

    exit_code = 2


class Request(pydantic.BaseModel):
    """What all requests have in common.

    Pictures have rows and columns. A column is a class, a prompt or a given image; a list with one entry serves all
    columns. A row is another draw of the noise. With one `seed` the pictures are numbered row by row and each has its
    own noise; with `seeds` a row has one seed, whose noise all its pictures share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    task: ClassVar[str]

    labels: tuple[str | int, ...] | None = Field(None, min_length=1, description="classes by name or index")
    prompts: tuple[str, ...] | None = Field(None, min_length=1, description="texts, for a model trained on text")
    negative_prompt: str | None = Field(None, description="text to move away from, by the guidance scale")
    text_encoder: str | None = Field(None, description="hub name or folder; default: the one the model was trained on")
    count: PositiveInt = Field(1, description="pictures of each column")
    seed: Seed = Field(0, description="of the noise")
    seeds: tuple[Seed, ...] | None = Field(None, min_length=1, description="a seed for each row, instead of a count")
    sampling: dict[str, Any] = Field({}, description="fields of `ddpm.generate.Sampling` that differ from the model's")
    batch_size: PositiveInt = Field(64, description="pictures of one network call; they depend on it by rounding alone")

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Return the request with these fields; None stands for a field's default.

        Raises:
            RequestError: a field is unknown or out of range.
        """
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except pydantic.ValidationError as error:
            raise RequestError("\n".join(_lines(error, cls))) from error

    @model_validator(mode="after")
    def _one_source_of_rows(self) -> Self:
        if self.seeds is not None and self.count != 1 and self.count != len(self.seeds):
            raise ValueError(f"there are {len(self.seeds)} seeds and a count of {self.count}: give only one of the two")
        return self

    @property
    def draws(self) -> int:
        """The number of rows."""
        return self.count if self.seeds is None else len(self.seeds)


class Sample(Request):
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


class Inpaint(Request):
    """Images whose hidden pixels are filled; the others stay exactly as they are."""

    task: ClassVar[str] = "inpaint"

    images: tuple[Path, ...] = Field(min_length=1, description="files, brought to the model's size and channels")
    masks: tuple[str, ...] = Field(
        min_length=1,
        description="of each image, one for all, or several for one image: a picture whose white pixels are filled, "
        "box:X,Y,WIDTH,HEIGHT in pixels of the model's image, or half:left|right|top|bottom",
    )
    method: Method | None = Field(None, description="default: trained, where the model was trained for it, or repaint")
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


class Edit(Request):
    """Other pictures from images: those that are noised and sampled from there (SDEdit), or inverted."""

    task: ClassVar[str] = "edit"

    images: tuple[Path, ...] = Field(min_length=1, description="files, brought to the model's size and channels")
    strength: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="level from which is sampled, as a share of T: 0 keeps the image, 1 keeps nearly nothing"
    )
    invert: bool = Field(False, description="find the noise of the image by DDIM instead of drawing it")
    source_labels: tuple[str | int, ...] | None = Field(
        None, min_length=1, description="classes of the images, which an inversion needs to find their noise"
    )

    @model_validator(mode="after")
    def _source(self) -> Self:
        if self.source_labels is not None and not self.invert:
            raise ValueError("source_labels are for an inversion: set invert, or leave them out")
        return self


TASKS: dict[str, type[Request]] = {kind.task: kind for kind in (Sample, Inpaint, Edit)}


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


def parse_labels(labels: str, classes: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return class names or indices that are separated by commas.

    Args:
        classes: the model's, where they are known: a text that is the name of one of them is not cut.
    """
    return (labels,) if labels in classes else tuple(part.strip() for part in labels.split(","))


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
    if kind == "extra_forbidden":
        return f"{place}: no such field of a request to {cls.task}; there are: {', '.join(cls.model_fields)}"
    if kind == "missing":
        return f"{place} is missing: a request to {cls.task} needs {cls.model_fields[wrong[0]['loc'][0]].description}"
    said = " or ".join(part["msg"].removeprefix("Value error, ") for part in wrong)
    return f"{place} = {given if len(given) <= SHOWN else given[:SHOWN] + '…'}: {said}" if place else said
