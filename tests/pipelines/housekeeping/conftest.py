from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import tracking
from pipelines.config import Config, compose
from pipelines.tracking import RunRecord


@pytest.fixture
def config(tmp_path: Path) -> Config:
    overrides = ["storage=file", f"storage.root=file://{tmp_path}", "tracking.uri=http://mlflow", "name=first"]
    return compose(["+experiment=digits", *overrides])


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[RunRecord]:
    """What MLflow has; one that is deleted leaves the list."""
    there = [RunRecord("id", "first", "ddpm", "KILLED")]

    def delete(uri: str, run_id: str) -> None:
        there[:] = [record for record in there if record.run_id != run_id]

    monkeypatch.setattr(tracking, "list_runs", lambda uri, name=None: list(there))
    monkeypatch.setattr(tracking, "all_versions", lambda uri: [])
    monkeypatch.setattr(tracking, "delete_run", delete)
    return there
