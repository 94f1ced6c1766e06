"""Where a node keeps copies of checkpoints, and how large that is."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.environment import limits
from pipelines.environment.limits import NODE_FOLDER, SMALLEST, copies_folder, shared_bytes


@pytest.fixture
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Shared memory whose size and free space a test decides."""
    usage = SimpleNamespace(total=4 * SMALLEST, free=4 * SMALLEST)
    monkeypatch.delenv(NODE_FOLDER, raising=False)
    monkeypatch.setattr(limits, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    return usage


def test_copies_of_a_run_that_goes_on_take_nothing_from_what_shared_memory_holds(shared_memory):
    shared_memory.free = 0
    assert shared_bytes() == 4 * SMALLEST


def test_copies_are_kept_in_shared_memory_where_it_is_large_else_where_they_are_told(
    shared_memory, tmp_path, monkeypatch
):
    assert copies_folder() == tmp_path
    shared_memory.total = SMALLEST - 1
    assert (copies_folder(), shared_bytes()) == (None, None)
    monkeypatch.setattr(limits, "SHARED_MEMORY", tmp_path / "none")
    assert (copies_folder(), shared_bytes()) == (None, None)
    shared_memory.total = 4 * SMALLEST
    monkeypatch.setenv(NODE_FOLDER, str(tmp_path / "disk"))
    assert (copies_folder(), shared_bytes()) == (tmp_path / "disk", None)
