"""The programs of `benchmarks/`, found in the folder, and what each of them promises of its last line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT

SERVICES = ("data", "overhead", "serving", "studies", "time_to_quality", "trials")
"""Those which need S3, MLflow or Ray."""
RESULTS = ROOT / "benchmarks" / "results"


def programs() -> list[str]:
    """Return the names of what runs as `python -m benchmarks.NAME` and measures: whatever has a `main`."""
    files = {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    files |= {path.parent.name: path for path in (ROOT / "benchmarks").glob("*/run.py")}
    return sorted(name for name, path in files.items() if "\ndef main(" in path.read_text())


def module_of(name: str) -> str:
    """Return the module which has the `main` of a program."""
    return f"benchmarks.{name}.run" if (ROOT / "benchmarks" / name).is_dir() else f"benchmarks.{name}"


def files_of_results() -> dict[str, tuple[int, int]]:
    """Return what tells whether a file of results was written to, by its path."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in RESULTS.rglob("*")}


def check(name: str, stdout: str, out: Path) -> None:
    """Make sure that the last line is the result, as it was written, with the figures that are published by name."""
    found = json.loads(stdout.strip().splitlines()[-1])
    assert found == json.loads((out / "benchmarks" / "results" / f"{name}.json").read_text())
    published = json.loads((RESULTS / f"{name}.json").read_text())
    assert [path for path, value in numbers(found) if not math.isfinite(value)] == []
    assert found.keys() <= published.keys() | {"quick"}
    lacking = {key for key in published if key not in found and not key.startswith("speedup_")}
    assert lacking == set()
    ratios = {path.rpartition(".")[2] for path, _ in numbers(found) if "speedup" in path}
    assert ratios <= {path.rpartition(".")[2] for path, _ in numbers(published) if "speedup" in path}


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of a result, with the keys that lead to it."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from numbers(each, f"{path}.{key}")
    elif isinstance(value, list):
        for each in value:
            yield from numbers(each, path)
    elif isinstance(value, int | float):
        yield path, value
