"""Threads: one per process, waiting passively, before torch is imported (a spinning barrier ruins a busy machine)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import signal
import sys
from collections.abc import Iterator

import pytest

# A shell starts what it runs in the background without SIGINT, and commands that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A GPU box may have torch and pytest only, which is what the tests marked `gpu` need.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    settings.register_profile("ddpm", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("ddpm")


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
