"""Publishing of benchmark results, with the commit they were measured on; means over seeds."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def commit() -> str:
    """Return the short hash of the checked-out commit."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def publish(result: dict[str, Any], name: str, quick: bool) -> None:
    """Write a result to `benchmarks/results/` (a quick one to a file that git ignores) and print it as one line."""
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}{'-quick' if quick else ''}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return a mean over seeds, and its standard error where there are two of them or more."""
    found = {name: statistics.fmean(values)}
    if len(values) > 1:
        found[f"{name}_standard_error"] = statistics.stdev(values) / len(values) ** 0.5
    return found
