"""What a change touches has the tests that notice it."""

from __future__ import annotations

import pytest

from tests.changed import Imports
from tests.faults.seeded import FAULTS


@pytest.fixture(scope="module")
def tests() -> Imports:
    return Imports()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_in_a_file_is_caught_by_tests_that_the_change_of_the_file_touches(tests, fault):
    touched = tests.of([fault.path])
    assert touched & {node.split("::")[0] for node in fault.tests}


def test_a_change_of_a_page_touches_the_tests_of_the_docs_and_one_of_a_fixture_its_folder(tests):
    assert tests.of(["docs/search.md"]) == tests.of(["README.md"]) == {"tests/docs"}
    assert tests.of(["tests/pipelines/training/conftest.py"]) == {"tests/pipelines/training"}
    assert "tests/pipelines/config/test_config.py" in tests.of(["conf/experiment/digits.yaml"])


def test_a_changed_test_touches_itself(tests):
    assert "tests/ddpm/test_ema.py" in tests.of(["tests/ddpm/test_ema.py"])
