"""The list of seeded faults fits the sources and the tests of today, and the tests catch all of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.faults.run import ROOT
from tests.faults.seeded import FAULTS, Fault


def each_fault() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)


def named(fault: Fault) -> Iterator[tuple[ast.Module, ast.FunctionDef]]:
    """Yield the module and the function of each test of a fault."""
    for test in fault.tests:
        path, name = test.partition("[")[0].split("::")
        module = ast.parse((ROOT / path).read_text())
        found = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert len(found) == 1, f"{test} is no test"
        yield module, found[0]


def test_there_are_many_and_each_has_a_name_of_its_own():
    assert len(FAULTS) >= 30
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({fault.promise for fault in FAULTS}) == len(FAULTS)


@each_fault()
def test_a_fault_is_another_program_in_the_place_of_a_text_that_occurs_once(fault):
    source = (ROOT / fault.path).read_text()
    assert source.count(fault.before) == 1
    assert ast.dump(ast.parse(fault.apply(source))) != ast.dump(ast.parse(source))
    assert fault.path.startswith(("ddpm/", "pipelines/"))


@each_fault()
def test_the_tests_of_a_fault_exist_and_take_seconds(fault):
    assert 1 <= len(fault.tests) <= 2
    for module, function in named(fault):
        for_all = [node for node in module.body if "pytestmark" in ast.unparse(node).partition("=")[0]]
        marks = " ".join(ast.unparse(node) for node in (*function.decorator_list, *for_all))
        assert "mark.slow" not in marks


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tests_catch_every_fault():
    done = subprocess.run([sys.executable, "-m", "tests.faults.run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
