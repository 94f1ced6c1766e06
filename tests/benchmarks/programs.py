"""The programs of `benchmarks/`, found in the folder, and what each of them promises of its last line."""

from __future__ import annotations

import importlib
import json
import math
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT

SERVICES = ("data", "overhead", "serving", "studies", "time_to_quality", "time_to_quality.guidance", "trials")
"""Those which need S3, MLflow or Ray."""
MAIN = "\ndef main(arguments: list[str] | None = None)"
RESULTS = ROOT / "benchmarks" / "results"


def programs() -> list[str]:
    """Return the names of what runs as `python -m benchmarks.NAME` and measures: whatever has a `main`."""
    found = [path for path in (ROOT / "benchmarks").rglob("*.py") if MAIN in path.read_text()]
    return sorted(
        ".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts).removesuffix(".run") for path in found
    )


def main_of(name: str) -> Callable[[list[str]], None]:
    """Return the `main` of a program."""
    module = f"benchmarks.{name}.run" if (ROOT / "benchmarks" / name).is_dir() else f"benchmarks.{name}"
    main: Callable[[list[str]], None] = importlib.import_module(module).main
    return main


def files_of_results() -> dict[str, tuple[int, int]]:
    """Return what tells whether a file of results was written to, by its path."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in RESULTS.rglob("*")}


FILES = {"time_to_quality.guidance": "guidance_scales"}
"""Programs whose results have other names than theirs."""


PROMISED_S = 180.0
"""What a program may take with `--quick`, on two cores."""


def quick(command: list[str], **options: Any) -> str:
    """Run a program with `--quick`, to its end though that be too late, and return what it printed."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            stdout, _ = process.communicate(timeout=PROMISED_S + 60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it ends the services that it has started
            raise
    assert process.returncode == 0
    seconds = time.monotonic() - began
    assert seconds <= PROMISED_S
    return stdout


def check(name: str, stdout: str, out: Path) -> None:
    """Make sure that the last line is the result, as it was written, with the figures that are published by name."""
    found, file = json.loads(stdout.strip().splitlines()[-1]), f"{FILES.get(name, name)}.json"
    assert found == json.loads((out / "benchmarks" / "results" / file).read_text())
    published = json.loads((RESULTS / file).read_text())
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
