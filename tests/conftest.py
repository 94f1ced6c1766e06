"""Threads: one per process, waiting passively, before torch is imported (a spinning barrier ruins a busy machine)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib

import pytest

# A GPU box may have torch and pytest only, which is what the tests marked `gpu` need.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    settings.register_profile("ddpm", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("ddpm")


@pytest.fixture(autouse=True)
def _no_inherited_addresses(monkeypatch):
    """Tests never talk to services that the developer's environment names."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_TRACKING", "RAY_ADDRESS")):
            monkeypatch.delenv(name)
