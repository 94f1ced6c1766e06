"""Blocks as one HTML file, which opens without a network and loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from itertools import count

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pipelines.presentation.blocks import Code, Interactive, Link, Section, Strong, Words


def page(title: str, subtitle: Words, sections: Sequence[Section], footer: Words, *, tab: str = "") -> str:
    """Return a page: every text is escaped, and no script runs but its own and those of interactive figures.

    Args:
        title: above the page.
        subtitle: below the title.
        tab: title of the browser's tab; the page's own where not given.
    """
    environment = Environment(
        loader=PackageLoader("pipelines.presentation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = resources.files("pipelines.presentation").joinpath("templates", "slides.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    figures = count()

    def interactive(shown: Interactive) -> Markup:
        # Plotly's library is embedded once, so that the page opens offline.
        first = next(figures) == 0
        return Markup(shown.figure.to_html(full_html=False, include_plotlyjs=first, default_height="440px"))

    return environment.get_template("page.html.j2").render(
        title=title,
        tab=tab or title,
        subtitle=subtitle,
        sections=sections,
        footer=footer,
        words=words,
        script=Markup(script),  # our own
        # Figures of plotly bring scripts whose digests are not known beforehand.
        script_source="'unsafe-inline'" if _is_interactive(sections) else f"'sha256-{digest}'",
        svg=lambda chart: Markup(chart.svg()),  # whose texts matplotlib escapes
        interactive=interactive,
    )


def words(shown: Words) -> Markup:
    """Return text within a line; plain strings are escaped."""
    match shown:
        case str():
            return escape(shown)
        case Code():
            return Markup("<code>{}</code>").format(shown.text)
        case Strong():
            return Markup("<b>{}</b>").format(shown.text)
        case Link():
            return Markup('<a href="{}" rel="noreferrer">{}</a>').format(shown.url, words(shown.text))
    return Markup("").join(words(part) for part in shown)


def _is_interactive(sections: Sequence[Section]) -> bool:
    return any(block.kind == "interactive" for section in sections for block in section.blocks)
