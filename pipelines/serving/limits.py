"""Limits that a server checks before it draws; a refusal is an HTTP status and a message that says what is allowed."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ddpm.inference import Drawing, Inpainting
from ddpm.model import Model
from pipelines.config import ServingConfig
from pipelines.inference.inputs import DRAWN
from pipelines.inference.request import RequestError

MIB = 2**20
SETTING = 200
"""Characters of a text that is no prompt: the name of a class or setting, a mask's box."""
VALUES = 100_000
"""Values in a body, which the one process that answers HTTP reads: a generalized solver of 400 steps has 80,000."""
DEPTH = 6
"""Lists and objects inside of each other."""
LARGEST = 10**20
"""Whole numbers are smaller: a seed has 64 bits at most, and a text of JSON may hold thousands of digits."""
PROMPTS = ("prompts", "negative_prompt")
PICTURES = ("images", "masks")
COUNTED = ("labels", "prompts", "seeds", *PICTURES, "source_labels")
"""Fields whose entries are of a picture each."""


class RefusedRequest(RequestError):  # noqa: N818 - what has happened to the request
    """A request that is not answered.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[RefusedRequest], tuple[int, str]]:
        """Pickle it with its status, on the way from a replica."""
        return RefusedRequest, (self.status, str(self))


@dataclass(frozen=True)
class Limits:
    """How much a server accepts; see `ServingConfig` for the meaning of each."""

    max_pictures: int
    max_steps: int
    max_prompt: int
    max_body: int
    max_answer: int
    max_pixels: int
    max_total_pixels: int
    max_queue: int
    body_s: float

    @classmethod
    def of(cls, config: ServingConfig) -> Limits:
        """Return the limits of a configuration."""
        return cls(
            config.max_pictures,
            config.max_steps,
            config.max_prompt,
            int(config.max_body_mib * MIB),
            int(config.max_answer_mib * MIB),
            int(config.max_megapixels * 1e6),
            int(config.max_total_megapixels * 1e6),
            config.max_queue,
            config.body_s,
        )

    def check_values(self, data: bytes) -> None:
        """Estimate the number of values of a JSON text before it is parsed, by its separators, and check it.

        A picture in base64 contains none of them.

        Raises:
            RefusedRequest: they are too many.
        """
        values = sum(map(data.count, (b",", b"[", b"{")))
        if values > VALUES:
            raise RefusedRequest(413, f"the body has about {values:,} values: at most {VALUES:,} are allowed")

    def check_body(self, body: Mapping[str, Any]) -> None:
        """Check the size of every part of a body, before any of it is used.

        Raises:
            RefusedRequest: a list, a text or a number is too large, or they are nested too deeply.
        """
        for name, value in body.items():
            if len(name) > SETTING:
                raise RefusedRequest(
                    422, f"a field has a name of {len(name):,} characters: at most {SETTING} are allowed"
                )
            for part in _leaves(value, name):
                if isinstance(part, str):
                    self._check_text(name, part)
                elif isinstance(part, list | dict):
                    self._check_length(name, len(part))
                elif isinstance(part, int) and abs(part) >= LARGEST:
                    raise RefusedRequest(422, f"{name} has a number of more than 20 digits, which nothing here needs")
        for name in ("count", "frames"):
            value = body.get(name)
            if isinstance(value, int) and value > self.max_pictures:
                raise RefusedRequest(
                    422, f"{name} = {value:,}: at most {self.max_pictures} pictures a request are allowed"
                )
        for name in ("sampling", "method_settings"):
            self.check_settings(name, body.get(name))

    def check_settings(self, name: str, settings: Any) -> None:
        """Check the numbers of settings, of which some say how much is computed.

        Raises:
            RefusedRequest: one is larger than any of them may be.
        """
        for setting, value in settings.items() if isinstance(settings, dict) else ():
            if isinstance(value, int | float) and not abs(value) <= self.max_steps:
                raise RefusedRequest(422, f"{name}.{setting} = {value}: at most {self.max_steps:,} is allowed")

    def check_count(self, count: int) -> None:
        """Check how many pictures a request asks for.

        Raises:
            RefusedRequest: they are too many.
        """
        if count > self.max_pictures:
            raise RefusedRequest(
                422,
                f"{count:,} pictures: at most {self.max_pictures} a request are allowed; ask for parts, by seeds",
            )

    def check_drawing(self, drawing: Drawing, model: Model) -> None:
        """Check how much a request has the network compute, and how much it is answered.

        Raises:
            RefusedRequest: it is too much.
        """
        evaluations = drawing.evaluations(model)
        if not (isinstance(drawing.task, Inpainting) and drawing.task.method is not None):  # which has steps of its own
            evaluations *= inner_steps(drawing.sampling.to_json())
        if evaluations > self.max_steps:
            raise RefusedRequest(
                422,
                f"{evaluations:,} network evaluations for each picture: at most {self.max_steps:,} are allowed; "
                "use fewer steps",
            )
        answered = len(drawing) * math.prod(model.spec.shape) * (1 + 2 * drawing.film)
        if answered > self.max_answer:
            raise RefusedRequest(
                422,
                f"the answer would hold {answered / MIB:,.1f} MiB of pixels: at most {self.max_answer / MIB:,.1f} are "
                "allowed; ask for fewer pictures" + (", or for no film" if drawing.film else ""),
            )

    def check_total(self, pixels: int) -> None:
        """Check how many pixels all pictures and masks of a request have.

        Raises:
            RefusedRequest: they are too many.
        """
        if pixels > self.max_total_pixels:
            raise RefusedRequest(
                413,
                f"the pictures and masks have {pixels:,} pixels together: at most {self.max_total_pixels:,} are "
                "allowed; ask for parts",
            )

    def check_picture(
        self,
        name: str,
        data: bytes | Path,
        *,
        size: tuple[int, int] | None = None,
        formats: tuple[str, ...] | None = ("PNG",),
    ) -> int:
        """Check an encoded picture by its header, before its pixels are decoded; return how many it has.

        Args:
            name: of the picture, for the message.
            data: bytes of the file, or where it is.
            size: (width, height) that it must have; None for any.
            formats: that it may have, as Pillow calls them; None for any.

        Raises:
            RefusedRequest: it is no picture of such a format, or too large.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=formats) as image:
                    width, height = image.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise RefusedRequest(413, f"{name} has too many pixels: at most {self.max_pixels:,} are allowed") from error
        except (OSError, ValueError, SyntaxError) as error:
            # The message of the first kind shows an object of Python.
            why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
            wrong = (
                f"cannot be read as a picture{why}" if formats is None else f"is no PNG file{why}: send one, in base64"
            )
            raise RefusedRequest(422, f"{name} {wrong}") from error
        if width * height > self.max_pixels:
            raise RefusedRequest(
                413, f"{name} has {width:,} x {height:,} pixels: at most {self.max_pixels:,} are allowed"
            )
        if size is not None and (width, height) != size:
            raise RefusedRequest(
                422, f"{name} is {width}x{height} pixels, the model's images are {size[0]}x{size[1]}: resize it"
            )
        return width * height

    def _check_length(self, name: str, length: int) -> None:
        # The longest setting has an entry for each pair of steps: the weights of a generalized solver.
        most = self.max_pictures if name in COUNTED else self.max_steps * (self.max_steps + 3) // 2
        if length > most:
            raise RefusedRequest(422, f"{name} has {length:,} entries: at most {most:,} are allowed")

    def _check_text(self, name: str, text: str) -> None:
        if name in PICTURES and not (name == "masks" and text.startswith(DRAWN)):
            return  # the body's size bounds it
        most = self.max_prompt if name in PROMPTS else SETTING
        if len(text) > most:
            raise RefusedRequest(422, f"a text of {name} has {len(text):,} characters: at most {most:,} are allowed")


def inner_steps(settings: Mapping[str, Any]) -> int:
    """Return how often a sampler evaluates the network in a step, by its settings that count steps in a step."""
    inner = [value for name, value in settings.items() if "steps" in name and name != "steps"]
    return math.prod(1 + value for value in inner if isinstance(value, int))


def _leaves(value: Any, name: str, depth: int = 0) -> Iterator[Any]:
    """Yield a value of JSON and everything in it, names included.

    Raises:
        RefusedRequest: it is nested too deeply.
    """
    if depth > DEPTH:
        raise RefusedRequest(422, f"{name} is nested more than {DEPTH} deep")
    yield value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner, name, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, name, depth + 1)
