"""Real measurements of a machine that take no longer than a test that looks at something else may."""

from __future__ import annotations

import pytest

from pipelines.plan import measure


def measure_briefly(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.03) -> None:
    """Have steps and evaluations of a candidate repeated for so many seconds each, and those of the chosen one too."""
    monkeypatch.setattr(measure, "SECONDS", seconds)
    monkeypatch.setattr(measure, "LONGER_S", (seconds, seconds))
