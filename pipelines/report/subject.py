"""The subject of a report: the MLflow run and the registered version of a RUN or MODEL."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipelines import tracking
from pipelines.checkpoints import lookup
from pipelines.config import Config
from pipelines.presentation.errors import PipelineError
from pipelines.tracking import ModelVersion, Tracker, TrackingError

_ID = re.compile(r"[0-9a-f]{32}")


class SubjectError(PipelineError):
    """There is no run or version with the requested name; the message lists the existing ones."""


@dataclass(frozen=True)
class ReportSubject:
    """A run, and the version that its report shows.

    Attributes:
        reference: requested RUN or MODEL.
        version: requested version, or the newest registered version of the run; None if there is none.
    """

    reference: str
    tracker: Tracker
    version: ModelVersion | None


def find_subject(reference: str, config: Config) -> ReportSubject:
    """Return the run of a reference.

    Args:
        reference: name of a run, its MLflow ID with or without runs:/, models:/NAME/VERSION or models:/NAME@ALIAS.
        config: with the address of the MLflow server.

    Raises:
        ReferenceFormError: the reference is malformed.
        SubjectError, ModelError: there is no such run or version; the message lists what there is.
        TrackingError: no MLflow server answers.
    """
    lookup.check_recorded(reference)
    uri = config.tracking.server
    if reference.startswith("models:/"):
        version = lookup.find_registered(reference, uri)
        return ReportSubject(reference, _run_of(version, uri), version)
    tracker = _find_run(reference, uri, config.tracking.experiment)
    of_run = [version for version in tracking.all_versions(uri) if version.run_id == tracker.run_id]
    newest = max(of_run, key=lambda version: (_seen(version), int(version.version)), default=None)
    return ReportSubject(reference, tracker, newest)


def _find_run(reference: str, uri: str, experiment: str) -> Tracker:
    name = reference.removeprefix("runs:/")
    found = tracking.find_run(uri, experiment, name)
    if found is not None:
        return found
    if _ID.fullmatch(name):
        return tracking.get_run(uri, name)
    names = dict.fromkeys(run.name for run in tracking.list_runs(uri) if run.of(experiment))
    raise SubjectError(
        f"no run '{name}' in experiment '{experiment}' at {uri}; there are: {', '.join(names) or 'none'}"
    )


def _run_of(version: ModelVersion, uri: str) -> Tracker:
    try:
        return tracking.get_run(uri, version.run_id)
    except TrackingError as error:
        raise SubjectError(
            f"the run of {version.uri} is gone, and a report shows what that recorded: {error}"
        ) from error


def _seen(version: ModelVersion) -> int:
    text = version.tags.get("images_seen", "")
    return int(text) if text.isdecimal() else -1
