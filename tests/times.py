"""What tests and their fixtures cost, as pytest's own JUnit files have recorded it, and which module to begin with.

    python -m tests.times [FILE …]

prints the slowest modules, tests and fixtures of `build/times/*.xml`, which `make test` writes, and the tests that
compute most. With `--record` it writes the seconds of each module of the integration tests into `tests/times.json`, by
which the streams share them.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "times.json"
FIXTURE = "fixture "
"""How a property of a test begins that says how long a fixture took, which it was the first to need."""
CPU = "cpu"
"""The property that says what CPU time a test took, with that of the processes that it has waited for."""
SHOWN = 25
GROUPS = {
    "tests/integration/test_benchmarks.py": "digits",
    "tests/integration/test_flow.py": "digits",
    "tests/integration/test_gate.py": "digits",
    "tests/chaos/test_chaos.py": "arena",
    "tests/chaos/test_takeover.py": "arena",
}
"""Modules that share a fixture, after which a group is named: one stream runs them, one after the other."""


@dataclass(frozen=True)
class Timed:
    """A test that has run.

    Attributes:
        module: path of its file, from the root of the checkout.
        seconds: what it took, its fixtures included.
        cpu: CPU seconds of its process, and of those that it has waited for.
        fixtures: seconds of each fixture that it was the first to need.
    """

    module: str
    name: str
    seconds: float
    cpu: float
    fixtures: Mapping[str, float]


def read(files: Iterable[Path]) -> Iterator[Timed]:
    """Yield the tests that JUnit files of pytest record."""
    for file in files:
        for case in ET.parse(file).iter("testcase"):
            said = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
            fixtures = {n.removeprefix(FIXTURE): float(v) for n, v in said.items() if n.startswith(FIXTURE)}
            module, name = file_of(case.get("classname", "")), case.get("name", "")
            yield Timed(module, name, float(case.get("time", 0)), float(said.get(CPU, 0)), fixtures)


def file_of(dotted: str) -> str:
    """Return the path of a test's file, whose JUnit name may end with a class."""
    parts = dotted.split(".")
    while parts and not (ROOT / Path(*parts)).with_suffix(".py").is_file():
        parts.pop()
    return "/".join(parts) + ".py" if parts else dotted


def seconds_of_modules(tests: Iterable[Timed]) -> Counter[str]:
    """Return the seconds of each module."""
    found: Counter[str] = Counter()
    for test in tests:
        found[test.module] += test.seconds
    return found


def group_of(module: str) -> str:
    """Return the name of the group that a module is of: its own, where it shares nothing with another one."""
    return GROUPS.get(module, module)


def longest_first(modules: Iterable[str]) -> list[str]:
    """Return modules by the seconds that are recorded of their groups; those that are new come first.

    Those of a group stay together.
    """
    there = set(modules)
    recorded: dict[str, float] = json.loads(RECORDED.read_text())
    seconds: Counter[str] = Counter()
    for module in there:
        seconds[group_of(module)] += recorded.get(module, float("inf"))
    return sorted(there, key=lambda module: (-seconds[group_of(module)], group_of(module), module))


def main(arguments: list[str]) -> None:
    files = [Path(a) for a in arguments if not a.startswith("--")] or sorted((ROOT / "build" / "times").glob("*.xml"))
    tests = list(read(files))
    modules = seconds_of_modules(tests)
    if "--record" in arguments:
        slow = {name: round(seconds) for name, seconds in sorted(modules.items()) if seconds >= 1}
        RECORDED.write_text(json.dumps(slow, indent=1) + "\n")
    fixtures: Counter[str] = Counter()
    for test in tests:
        fixtures.update(test.fixtures)
    rows: dict[str, list[tuple[str, float]]] = {
        f"{len(tests):,} tests, {sum(modules.values()):,.0f} s; the slowest modules": modules.most_common(SHOWN),
        "the slowest tests": [
            (f"{t.module}::{t.name}", t.seconds) for t in sorted(tests, key=lambda t: -t.seconds)[:SHOWN]
        ],
        "the tests that compute most": [
            (f"{t.module}::{t.name}", t.cpu) for t in sorted(tests, key=lambda t: -t.cpu)[:SHOWN]
        ],
        "the fixtures that cost most": fixtures.most_common(SHOWN),
    }
    for title, lines in rows.items():
        print(title)
        for name, seconds in lines:
            print(f"{seconds:8.1f} s  {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
