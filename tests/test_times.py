"""What JUnit files record of tests and fixtures, and in which order modules are taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests import conftest
from tests.times import GROUPS, RECORDED, ROOT, longest_first, read, seconds_of_modules

TESTS = """
import time
import pytest

@pytest.fixture(scope="module")
def slow():
    time.sleep(0.2)

def test_first(slow): ...

def test_second(slow):
    sum(range(10_000_000))
"""


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """What is recorded of two tests that share a fixture."""
    folder = tmp_path_factory.mktemp("timed")
    (folder / "test_timed.py").write_text(TESTS)
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", "timed.xml"]
    subprocess.run(
        [*command, f"--rootdir={folder}", str(folder)],
        cwd=folder,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return {test.name: test for test in read([folder / "timed.xml"])}


def test_a_fixture_of_several_tests_counts_where_it_is_made(timed):
    ((name, seconds),) = timed["test_first"].fixtures.items()
    assert name.endswith("::slow")
    assert 0.2 <= seconds <= timed["test_first"].seconds
    assert timed["test_second"].fixtures == {}


def test_cpu_seconds_are_those_of_the_test_and_not_of_its_waits(timed):
    assert timed["test_first"].cpu < 0.15
    assert timed["test_second"].cpu > 0.05


def test_seconds_are_summed_by_module(timed):
    assert sum(seconds_of_modules(timed.values()).values()) == pytest.approx(sum(t.seconds for t in timed.values()))


def test_streams_begin_with_new_modules_and_then_with_those_that_take_longest():
    recorded = {module: seconds for module, seconds in json.loads(RECORDED.read_text()).items() if module not in GROUPS}
    slow, quick = max(recorded, key=recorded.get), min(recorded, key=recorded.get)
    assert longest_first([quick, slow, "tests/new.py"]) == ["tests/new.py", slow, quick]


def test_modules_of_a_group_stay_together_and_take_as_long_as_all_of_them():
    order = longest_first(json.loads(RECORDED.read_text()))
    places = [order.index(module) for module in GROUPS if GROUPS[module] == "digits"]
    assert max(places) - min(places) == len(places) - 1
    assert longest_first(["tests/integration/test_gate.py", "tests/integration/test_flow.py"])[0].endswith("flow.py")


def test_every_module_that_is_named_is_there():
    named = [*json.loads(RECORDED.read_text()), *GROUPS]
    assert [module for module in named if not (ROOT / module).is_file()] == []


def test_one_stream_runs_all_files_of_a_group(pytestconfig, monkeypatch):
    monkeypatch.setattr(pytestconfig.option, "dist", "loadfile", raising=False)
    monkeypatch.setattr(pytestconfig.option, "tx", ["2*popen"], raising=False)
    scheduler = conftest.pytest_xdist_make_scheduler(pytestconfig, None)
    flow, gate, other = (
        scheduler._split_scope(f"tests/integration/test_{n}.py::test") for n in ("flow", "gate", "search")
    )
    assert flow == gate != other
    monkeypatch.setattr(pytestconfig.option, "dist", "load")
    assert conftest.pytest_xdist_make_scheduler(pytestconfig, None) is None  # pytest-xdist's own
