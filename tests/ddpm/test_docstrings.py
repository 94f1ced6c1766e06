"""The examples in the docstrings of the mathematics run, and give what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import pytest

import ddpm

MODULES = sorted(module.name for module in pkgutil.walk_packages(ddpm.__path__, "ddpm."))


class Finder(doctest.DocTestFinder):
    """A finder of examples that sees through decorators such as `torch.no_grad`."""

    def _from_module(self, module: ModuleType | None, object: Any) -> bool:
        return super()._from_module(module, inspect.unwrap(object))  # type: ignore[misc]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_say(name):
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for found in Finder(exclude_empty=True).find(importlib.import_module(name)):
        runner.run(found, out=report.append)
    assert not runner.failures, "".join(report)
