"""What all benchmarks have in common: how much they measure, where they write, the commit, and means over seeds."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[1]
T = TypeVar("T")
Rows = list[dict[str, Any]]

LINE, ROW = 120, 360
"""The longest line of a file of results, and the longest one that is a row of a table."""


class Size(Enum):
    """How much a benchmark measures: all that is published, what takes three minutes, or the least of everything."""

    FULL = "full"
    QUICK = "quick"
    SMOKE = "smoke"

    def of(self, full: T, quick: T, smoke: T) -> T:
        """Return the one of three values that is for this size."""
        return {Size.FULL: full, Size.QUICK: quick, Size.SMOKE: smoke}[self]


def make_parser(program: str, doc: str | None, quick: str, keeps: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of the options that benchmarks share.

    Args:
        program: its name in `benchmarks`.
        doc: its docstring, of which the first line describes it.
        quick: what is less with `--quick`, which ends within three minutes on two cores.
        keeps: what it keeps in its work folder, if it has one.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=(doc or "").splitlines()[0])
    parser.set_defaults(size=Size.FULL)
    sizes = parser.add_mutually_exclusive_group()
    for size, means in (
        (Size.QUICK, quick),
        (Size.SMOKE, "the least of everything, which measures nothing: a test of all parts"),
    ):
        sizes.add_argument(f"--{size.value}", action="store_const", dest="size", const=size, help=means)
    parser.add_argument(
        "--out", type=Path, help="written to as if it were the checkout; default: that, or build/benchmarks if not full"
    )
    parser.add_argument("--json", action="store_true", help="print the result as the last line (always done)")
    if keeps is not None:
        work = Path(os.environ.get("DDPM_HOME", ROOT / ".ddpm")) / program.partition(".")[0]
        parser.add_argument("--work", type=Path, default=work, help=f"folder that keeps {keeps}")
    return parser


def work_folder(options: argparse.Namespace, *parts: str) -> Path:
    """Return the folder that keeps what a benchmark of this size need not make again."""
    folder = Path(options.work, *parts, options.size.value).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def out_folder(options: argparse.Namespace, published: str) -> Path:
    """Return the folder that is written to in place of one of the checkout; the full size writes to that itself."""
    own = ROOT if options.size is Size.FULL else ROOT / "build" / "benchmarks" / options.size.value
    folder = Path(options.out or own, published)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(result: dict[str, Any], name: str, options: argparse.Namespace) -> None:
    """Write a result to `benchmarks/results/`, or where the options say, and print it as one line."""
    result = rounded(result)
    (out_folder(options, "benchmarks/results") / f"{name}.json").write_text(to_text(result))
    print(json.dumps(result))


def with_earlier(options: argparse.Namespace, name: str, table: str, rows: Rows, cases: Rows) -> Rows:
    """Return new rows, and for cases that were not measured this time those that were published before, in their order.

    Args:
        name: of the file of results.
        table: name of the table in it.
        rows: what was measured; each has the keys of its case.
        cases: all that there are, in the order of the table.
    """
    file = out_folder(options, "benchmarks/results") / f"{name}.json"
    before = json.loads(file.read_text()).get(table, []) if file.exists() else []
    found: Rows = []
    for case in cases:
        of = [[row for row in each if case.items() <= row.items()] for each in (rows, before)]
        found += of[0] or of[1]
    return found


def rounded(value: Any) -> Any:
    """Return a JSON value with its floats rounded to six significant digits, more than any measurement here has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def to_text(result: Any) -> str:
    """Return a JSON value as a text that people can read and compare: each row of a table is a line."""
    return _lines(result, LINE, "") + "\n"


def _lines(value: Any, width: int, indent: str) -> str:
    """Return a value on one line where it fits into the width, else each of its parts below the other."""
    line = json.dumps(value)
    if len(line) <= width or not isinstance(value, dict | list | tuple):
        return line
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_lines(each, width, inner)}" for key, each in value.items()]
        return "{\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}}}"
    parts = [_lines(each, ROW, inner) for each in value]
    return "[\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}]"


def python_m(module: str) -> list[str]:
    """Return the command that runs a module in a process of its own.

    Tests name an interpreter that has imported torch before, in the environment.
    """
    return [*shlex.split(os.environ.get("DDPM_BENCHMARK_PYTHON", sys.executable)), "-m", module]


def ddpm() -> list[str]:
    """Return the command `ddpm`; tests name another, as for `python_m`."""
    return shlex.split(os.environ.get("DDPM_BENCHMARK_DDPM", str(Path(sys.executable).with_name("ddpm"))))


def commit() -> str:
    """Return the short hash of the checked-out commit."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return a mean over seeds, and its standard error where there are two of them or more."""
    found = {name: statistics.fmean(values)}
    if len(values) > 1:
        found[f"{name}_standard_error"] = statistics.stdev(values) / len(values) ** 0.5
    return found
