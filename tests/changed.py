"""Which unit tests a change touches, by the imports: `python -m tests.changed [REF]` prints their files.

What is changed is what differs from REF (default: HEAD, so what is not committed yet). A test is touched by a module
that it imports, or that is imported by one that it imports, and by those of the folder that its own mirrors: tests that
are farther away, of which a change in `ddpm/` has nearly all, are left to `make test-unit`. Pages and other files are
covered by the tests of `tests/docs/` and those that `OTHERS` names.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import grimp

from tests.times import ROOT

STEPS = 2
"""From a test to a changed module, at most."""
OTHERS = {
    "conf/": ("tests/pipelines/config/test_config.py", "tests/pipelines/config/test_fields.py", "tests/docs"),
    "docs/": ("tests/docs",),
    "benchmarks/": ("tests/docs", "tests/benchmarks"),
    "infra/": ("tests/infra", "tests/pipelines/launch"),
    "": ("tests/docs",),
}
"""Tests of files that nobody imports, by the beginning of their path; the first that fits counts."""


def changed_files(ref: str) -> list[str]:
    """Return the files that differ from a commit, those that git does not know included."""
    asked = (["diff", "--name-only", "--relative", ref], ["ls-files", "--others", "--exclude-standard"])
    return [
        line
        for command in asked
        for line in subprocess.check_output(["git", *command], cwd=ROOT, text=True).splitlines()
    ]


def dotted_name(path: str) -> str:
    """Return the dotted name of a file of Python."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class Imports:
    """The tests of the checkout, and what they import."""

    def __init__(self) -> None:
        self._graph = grimp.build_graph("ddpm", "pipelines", "benchmarks", "tests", cache_dir=None)

    def of(self, paths: Iterable[str]) -> set[str]:
        """Return the files and folders of tests that changed files touch."""
        found: set[str] = set()
        for path in paths:
            module = dotted_name(path)
            if path.endswith("conftest.py"):
                found.add(str(Path(path).parent))
            elif path.endswith(".py") and module in self._graph.modules:
                found |= self._importers(module)
                found |= {str(each.relative_to(ROOT)) for each in (ROOT / "tests" / path).parent.glob("test_*.py")}
            else:
                found |= set(next(tests for start, tests in OTHERS.items() if path.startswith(start)))
        return {path for path in found if (ROOT / path).exists()}

    def _importers(self, module: str) -> set[str]:
        reached = near = {module}
        for _ in range(STEPS):
            near = {other for each in near for other in self._graph.find_modules_that_directly_import(each)}
            reached = reached | near
        tests = (each for each in reached if each.startswith("tests.") and each.rpartition(".")[2].startswith("test_"))
        return {each.replace(".", "/") + ".py" for each in tests}


def main(ref: str = "HEAD") -> None:
    print(*sorted(Imports().of(changed_files(ref))), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
