"""Threads: one per process, waiting passively, before torch is imported (a spinning barrier ruins a busy machine)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import gc
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.times import CPU, FIXTURE, ROOT, group_of, longest_first

# A shell starts what it runs in the background without SIGINT, and commands that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A GPU box may have torch and pytest only, which is what the tests marked `gpu` need.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    quick = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("ddpm", quick)
    # The same examples each time, so that what lands does not hang on luck; `thorough` is how new ones are looked for.
    settings.register_profile("ci", quick, derandomize=True)
    settings.register_profile("thorough", quick, max_examples=1000)
    settings.load_profile("ci" if os.environ.get("CI") else "ddpm")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector from what the test modules import: a million objects, which stay until the end.

    Each of its full passes would walk over all of them, for most of a second.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let streams that share integration tests by their files begin with those that take longest."""
    if "PYTEST_XDIST_WORKER" in os.environ and all(item.get_closest_marker("integration") for item in items):
        files = {item.path: item.path.relative_to(ROOT).as_posix() for item in items}
        order = longest_first(files.values())
        items.sort(key=lambda item: order.index(files[item.path]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one stream have all files of a group, which share what one of them has made."""
    from xdist.scheduler import LoadFileScheduling

    class ByGroup(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(super()._split_scope(nodeid))

    return ByGroup(config, log) if config.getvalue("dist") == "loadfile" else None


BEGAN = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> Iterator[None]:
    """Record what a fixture of more than one test takes, with the test that is the first to need it."""
    began = time.perf_counter()
    try:
        return (yield)
    finally:
        if fixturedef.scope != "function":
            name = f"{FIXTURE}{fixturedef.baseid}::{fixturedef.argname}"
            request._pyfuncitem.user_properties.append((name, f"{time.perf_counter() - began:.3f}"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[BEGAN] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    try:
        return (yield)
    finally:
        if nextitem is not None and nextitem.path != item.path:
            # Caches and late imports, which stay, grow to two million objects that every full pass would walk over.
            gc.collect()
            gc.freeze()
        item.user_properties.append((CPU, f"{cpu_seconds() - item.stash[BEGAN]:.3f}"))


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


@pytest.fixture(autouse=True)
def _no_inherited_addresses(_no_ray_in_unit_tests, monkeypatch):  # which looks at Ray after monkeypatch is undone
    """Tests never talk to services that the developer's environment names."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_TRACKING", "RAY_ADDRESS")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_ray_in_unit_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """A unit test starts no Ray, which would be there for all that run after it, and do their work elsewhere."""
    yield
    ray = sys.modules.get("ray")
    marked = any(request.node.get_closest_marker(mark) for mark in ("integration", "chaos"))
    if ray is not None and not marked and ray.is_initialized():
        ray.shutdown()
        pytest.fail("this unit test has started Ray or connected to it: mark it as integration, or do without")
