"""The examples in the docstrings of the mathematics run, and give what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import ddpm
from ddpm.settings import Settings

MODULES = sorted(module.name for module in pkgutil.walk_packages(ddpm.__path__, "ddpm."))
WITHOUT = {
    "ddpm.bound.variational_bounds": "is variational_bound, which has one, for several variances at a time",
    "ddpm.diffusers.folder.import_diffusers": "is the second half of the example of export_diffusers",
    "ddpm.model.load_classifier": "reads the folder of a trained classifier",
    "ddpm.model.load_model": "is the second half of the example of save_model",
    "ddpm.models.base.NetworkConfig": "is the base of what a user builds, UNetConfig and DiTConfig",
    "ddpm.models.blocks.BlockConfig": "is the base of what a user builds, UNetConfig",
    "ddpm.prediction.computes_bf16": "depends on the machine",
    "ddpm.samplers.base.SteppedSampler": "is the base of what a user calls, the samplers",
}
"""Functions and settings without an example of their own -> why."""


class Finder(doctest.DocTestFinder):
    """A finder of examples that sees through decorators such as `torch.no_grad`."""

    def _from_module(self, module: ModuleType | None, object: Any) -> bool:
        return super()._from_module(module, inspect.unwrap(object))  # type: ignore[misc]


def examples(name: str) -> list[doctest.DocTest]:
    return Finder().find(importlib.import_module(name), name)


def called_by_users(name: str) -> Iterator[str]:
    """Yield what a module defines for its users to call: its public functions, and the settings of its algorithms."""
    for own, value in vars(importlib.import_module(name)).items():
        if own.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        settings = inspect.isclass(value) and issubclass(value, Settings)
        if settings or inspect.isfunction(inspect.unwrap(value) if callable(value) else value):
            yield f"{name}.{own}"


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_say(name):
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for found in examples(name):
        runner.run(found, out=report.append)
    assert not runner.failures, "".join(report)


def test_every_function_has_an_example_or_a_reason_for_having_none():
    shown = {found.name for name in MODULES for found in examples(name) if found.examples}
    called = {each for name in MODULES for each in called_by_users(name)}
    assert len(called) > 150
    assert called - shown == WITHOUT.keys()
