"""What Ray Train is asked for; no cluster is needed to say it."""

from __future__ import annotations

import pytest

from pipelines.config import ClusterConfig, compose
from pipelines.training.ray_train.trainer import torch_config


def cluster(*overrides: str) -> ClusterConfig:
    return compose(["+experiment=digits", *(f"cluster.{o}" for o in overrides)]).cluster


@pytest.mark.parametrize(("seconds", "group_timeout"), [("600", 660), ("0.5", 61), ("0", 1800), ("null", 1800)])
def test_a_collective_outlasts_the_watchdog_which_can_say_where_it_hangs(seconds, group_timeout):
    assert torch_config(cluster(f"step_timeout_s={seconds}")).timeout_s == group_timeout
