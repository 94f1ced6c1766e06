"""The report as one HTML file, which opens without a network and loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipelines.report.facts import Facts
from pipelines.report.sections import Section

_SCRIPT = "slides.js"


def page(facts: Facts, shown: Sequence[Section]) -> str:
    """Return the page of a report with these sections: every text is escaped, and no script but its own runs."""
    environment = Environment(
        loader=PackageLoader("pipelines.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = resources.files("pipelines.report").joinpath("templates", _SCRIPT).read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        facts=facts,
        sections=shown,
        script=Markup(script),  # our own
        script_digest=f"sha256-{digest}",
        svg=lambda chart: Markup(chart.svg()),  # whose texts matplotlib escapes
    )
