"""The names of Ray's that are no part of its interface: every release may change them, so they are counted."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import ray

ROOT = Path(__file__).parents[4]
KNOWN = {
    "ray.train.v2._internal.callbacks.datasets": "an actor for Ray Data, which is not started",
    "ray.train.v2._internal.execution.callback": "a worker's start, and what its group has reserved at the end",
    "ray.train.v2._internal.execution.controller.state": "why the workers are started again, for the ledger",
    "ray.train.v2._internal.exceptions": "a worker that is lost, beside those that fail with it",
    "ray.train.v2._internal.execution.context": "which node is about to be preempted, without a barrier of all ranks",
    "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator": "what a killed driver had reserved",
}


def test_the_private_modules_of_ray_are_these_and_the_pinned_release_has_them():
    used = set()
    for path in (ROOT / "pipelines").rglob("*.py"):
        used |= set(re.findall(r"(?:from|import) (ray\.[\w.]*\._\w+[\w.]*)", path.read_text()))
    assert used == KNOWN.keys()
    (pin,) = [d for d in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] if "ray" in d]
    least, below = re.findall(r"\d+\.\d+", pin)
    assert tuple(map(int, least.split("."))) <= tuple(map(int, ray.__version__.split(".")[:2]))
    assert tuple(map(int, ray.__version__.split(".")[:2])) < tuple(map(int, below.split(".")))
