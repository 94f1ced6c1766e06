"""The report of a RUN or MODEL, one HTML file that loads nothing, and its storing as an artifact of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.config import Config
from pipelines.inference.files import file_name
from pipelines.presentation import html
from pipelines.presentation.blocks import Code, Link, Section
from pipelines.presentation.progress import Notice, no_notice
from pipelines.report.ask_model import ask_model
from pipelines.report.facts import Facts
from pipelines.report.gather import gather
from pipelines.report.sections import sections
from pipelines.report.subject import find_subject
from pipelines.tracking import Tracker, links

ARTIFACT = "report.html"
"""Artifact of the run with its newest report."""


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


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        name: name of the run.
        html: the page.
        sections: names of the sections, in order.
        tracker: MLflow run.
    """

    name: str
    html: str
    sections: tuple[str, ...]
    tracker: Tracker

    @property
    def file_name(self) -> str:
        """Name of the file, in which the name of the run, which MLflow users can change, cannot select a folder."""
        return f"report-{file_name(self.name)}.html"

    def log(self) -> str:
        """Store it as an artifact of the run, replacing an earlier one, and return the address of its page."""
        self.tracker.text(self.html, ARTIFACT)
        page = links.run_page(self.tracker.experiment_id(), self.tracker.run_id, f"artifacts/{ARTIFACT}")
        return f"{self.tracker.uri}/{page}"


def make(reference: str, config: Config, notice: Notice = no_notice, *, with_model: bool = True) -> Report:
    """Return the report of a run or a registered version.

    Args:
        reference: see `find_subject`.
        config: configuration with the addresses of the services.
        notice: called with each part that could not be read or computed, and the reason.
        with_model: whether the model itself draws a few pictures.

    Raises:
        SubjectError, ModelError: there is no such run or version; the message lists what there is.
        TrackingError: MLflow does not answer.
    """
    subject = find_subject(reference, config)
    facts = gather(subject, config, notice)
    if with_model:
        facts = ask_model(facts, subject, config, notice)
    shown = sections(facts)
    return Report(facts.name, page(facts, shown), tuple(section.name for section in shown), subject.tracker)
