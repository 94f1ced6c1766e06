"""Publishing of benchmark results, with the commit they were measured on."""

from __future__ import annotations

import json
import subprocess
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
