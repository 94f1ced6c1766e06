"""The blocks of a page, independent of their form. `html` and `markdown` render them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from pipelines.presentation.charts import Chart


@dataclass(frozen=True)
class Code:
    """Literal text: a command, an address, a digest."""

    text: str
    kind: Literal["code"] = "code"


@dataclass(frozen=True)
class Strong:
    """Emphasised text."""

    text: str
    kind: Literal["strong"] = "strong"


@dataclass(frozen=True)
class Link:
    """Text that leads to an address."""

    text: Words
    url: str
    kind: Literal["link"] = "link"


Words: TypeAlias = str | Code | Strong | Link | Sequence["str | Code | Strong | Link"]
"""Text within a line. Plain strings are escaped by every renderer."""


@dataclass(frozen=True)
class Text:
    """A paragraph; `faint` for remarks."""

    words: Words
    faint: bool = False
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class Items:
    """A list with bullets."""

    items: Sequence[Words]
    kind: Literal["items"] = "items"


@dataclass(frozen=True)
class Listing:
    """Lines of code.

    Attributes:
        language: for highlighting.
    """

    text: str
    language: str = ""
    kind: Literal["listing"] = "listing"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: names of the columns.
        rows: cells, as many as there are columns.
        numbers: indices of the columns that contain numbers.
        headed: whether the first cell of a row is its header.
        marked: indices of highlighted rows.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Words]]
    numbers: frozenset[int] = frozenset()
    headed: bool = True
    marked: frozenset[int] = frozenset()
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Image:
    """An image.

    Attributes:
        url: address of the image, or the image itself as a data URL.
        alt: description for readers who do not see it.
        caption: text below the image.
        size: (width, height) in pixels; None if unknown.
    """

    url: str
    alt: str
    caption: Words = ""
    size: tuple[int, int] | None = None
    kind: Literal["image"] = "image"


@dataclass(frozen=True)
class Gallery:
    """Images side by side if there is room."""

    images: Sequence[Image]
    kind: Literal["gallery"] = "gallery"


@dataclass(frozen=True)
class Slides:
    """Images of which one is shown at a time, as (name, image)."""

    slides: Sequence[tuple[str, Image]]
    kind: Literal["slides"] = "slides"


@dataclass(frozen=True)
class Charts:
    """Charts side by side if there is room."""

    charts: Sequence[Chart]
    kind: Literal["charts"] = "charts"


@dataclass(frozen=True)
class Interactive:
    """A figure of plotly."""

    figure: Any
    kind: Literal["interactive"] = "interactive"


@dataclass(frozen=True)
class Bar:
    """Shares of a whole, as (name, share in 0..1)."""

    parts: Sequence[tuple[str, float]]
    alt: str
    kind: Literal["bar"] = "bar"


Block: TypeAlias = Text | Items | Listing | Table | Image | Gallery | Slides | Charts | Interactive | Bar


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        name: anchor in addresses.
        title: heading.
        blocks: contents, in order.
        how: a sentence on how to read it.
    """

    name: str
    title: str
    blocks: Sequence[Block]
    how: str = ""


def number(value: float | None) -> str:
    """Return a number with four digits; an empty string for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not a number"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


def with_interval(value: float, low: float | None, high: float | None) -> str:
    """Return a number with its interval, if it has one."""
    return number(value) if low is None or high is None else f"{number(value)} ({number(low)} to {number(high)})"
