"""The error of a training as its driver sees it."""

from __future__ import annotations

from pipelines.presentation.errors import PipelineError


class TrainingError(PipelineError):
    """A run that could not start or did not finish; the message says why and what to do."""
