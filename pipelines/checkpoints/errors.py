"""The error of this room."""

from __future__ import annotations

from pipelines.presentation.errors import PipelineError


class ModelError(PipelineError):
    """The error for a MODEL reference that does not exist, or a checkpoint that is damaged or of another run."""
