"""The report as one HTML file, which opens without a network and loads nothing."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.presentation import html
from pipelines.presentation.blocks import Code, Link, Section
from pipelines.report.facts import Facts


def page(facts: Facts, shown: Sequence[Section]) -> str:
    """Return the page of a report with these sections."""
    about = [facts.reference]
    if facts.version and facts.version != facts.reference:
        about.append(facts.version)
    if facts.images_seen is not None:
        about.append(f"{facts.images_seen:,} images seen")
    if facts.made_at:
        about.append(f"report of {facts.made_at}")
    words: list[str | Link] = [" · ".join(about)]
    if facts.link:
        words += [" · ", Link("its page in MLflow", facts.link)]
    footer = ("Made by ", Code("ddpm report"), ". This file holds all that it shows.")
    return html.page(facts.name, words, shown, footer, tab=f"Report of {facts.name}")
