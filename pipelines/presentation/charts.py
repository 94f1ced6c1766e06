"""Charts as SVG that inherits colours and fonts from the page, so that it suits light and dark themes."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

# Placeholders that are replaced by the page's colours, because matplotlib has no CSS variables.
_INK, _RULE = "#010203", "#010204"
_SERIES = ("#010205", "#010206", "#010207", "#010208")
_VARIABLES = {_INK: "var(--faint)", _RULE: "var(--line)"} | {
    color: f"var(--series-{i})" for i, color in enumerate(_SERIES, 1)
}
_SIZE = (5.2, 3.0)  # inches: letters of 10 points are as large as small text on a phone
MOST_POINTS = 400
"""Largest number of points drawn of a curve; in longer curves, neighbours are averaged."""


@dataclass(frozen=True)
class Point:
    """A point of a curve, with its 95 % interval if known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: name in the legend; "" for a single series.
        style: a line with or without markers, or only markers.
    """

    name: str
    points: Sequence[Point]
    style: Literal["line", "marked", "marks"] = "line"


@dataclass(frozen=True)
class Chart:
    """A chart with two axes.

    Attributes:
        title: title, also used in the description for readers who do not see it.
        x, y: labels of the axes.
        series: at most `len(_SERIES)` series with at least one finite point in total.
        log_y: whether y is logarithmic; then points that are not positive are left out.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_y: bool = False

    @property
    def summary(self) -> str:
        """Description of the chart in a sentence, for readers who do not see it."""
        parts = []
        for series in self.series:
            shown = self._shown(series.points)
            if shown:
                first, last, low = shown[0], shown[-1], min(shown, key=lambda point: point.y)
                name = f"{series.name}: " if series.name else ""
                parts.append(
                    f"{name}{number(first.y)} at {number(first.x)}, {number(last.y)} at {number(last.x)}, "
                    f"lowest {number(low.y)} at {number(low.x)}"
                )
        return f"Chart. {self.title}: {self.y} by {self.x}. {'; '.join(parts)}."

    def svg(self) -> str:
        """Return the chart as an SVG element to be put into a page."""
        settings: Any = {"svg.fonttype": "none", "svg.hashsalt": self.title, "font.size": 10, "axes.linewidth": 0.8}
        with rc_context(settings):
            figure = Figure(figsize=_SIZE, layout="constrained")
            axes = figure.add_subplot()
            for series, color in zip(self.series, _SERIES, strict=False):
                self._draw(axes, series, color)
            self._dress(axes)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return _for_page(buffer.getvalue(), self.summary)

    def _draw(self, axes: Axes, series: Series, color: str) -> None:
        points = thinned(self._shown(series.points), MOST_POINTS)
        x, y = [p.x for p in points], [p.y for p in points]
        line, mark = ("" if series.style == "marks" else "-"), ("" if series.style == "line" and len(x) > 1 else "o")
        axes.plot(x, y, linestyle=line, marker=mark, markersize=4, linewidth=1.6, color=color, label=series.name)
        sure = [(p.x, p.y, p.low, p.high) for p in points if p.low is not None and p.high is not None]
        if not sure:
            return
        xs = [x for x, *_ in sure]
        lows = [max(low, y * 1e-3) if self.log_y else low for _, y, low, _ in sure]
        highs = [high for *_, high in sure]
        if series.style == "marks" or len(sure) == 1:
            axes.vlines(xs, lows, highs, color=color, linewidth=1, alpha=0.6)
        else:
            axes.fill_between(xs, lows, highs, color=color, alpha=0.18, linewidth=0)

    def _dress(self, axes: Axes) -> None:
        if self.log_y:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            steps = (1.0,) if high / low > 200 else (1.0, 2.0, 5.0) if high / low > 3 else tuple(range(1, 10))
            axes.yaxis.set_major_locator(LogLocator(subs=steps))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(self.x, color=_INK)
        axes.set_ylabel(self.y, color=_INK)
        axes.tick_params(colors=_INK, labelcolor=_INK)
        axes.grid(color=_RULE, linewidth=0.7)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_RULE)
        if any(series.name for series in self.series):
            axes.legend(frameon=False, labelcolor=_INK, fontsize=9)

    def _shown(self, points: Sequence[Point]) -> list[Point]:
        return [p for p in points if math.isfinite(p.x) and math.isfinite(p.y) and (p.y > 0 or not self.log_y)]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most `most` points; if there are more, means of neighbours without intervals."""
    if len(points) <= most:
        return list(points)
    each = -(-len(points) // most)
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    return [Point(math.fsum(p.x for p in g) / len(g), math.fsum(p.y for p in g) / len(g)) for g in groups]


def number(value: float) -> str:
    """Return a number in short form: 12 k, 1.5 M, 0.02."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size * (10 if unit == "k" else 1):
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def _for_page(document: str, summary: str) -> str:
    """Convert an SVG document into an element of a page, in the page's colours."""
    start = document.index("<svg")
    element = re.sub(r"<metadata>.*?</metadata>", "", document[start:], flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        element = element.replace(color, variable)
    # IDs must be unique in a page; those of groups, which nothing refers to, are the same in every chart.
    used = set(re.findall(r"#([\w.-]+)[\")]", element))
    element = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", element)
    # The page chooses the size; the view box keeps the aspect ratio. Namespaces have no meaning inside HTML.
    head, rest = element.split(">", 1)
    head = re.sub(r' (?:width|height|xmlns|xmlns:xlink|version)="[^"]*"', "", head)
    rest = rest.replace("xlink:href=", "href=")
    return f'{head} role="img" aria-label="{html.escape(summary)}">{rest}'.strip()
