"""What Ray Train is asked for; no cluster is needed to say it."""

from __future__ import annotations

import gc
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from ray import cloudpickle
from ray.train.torch import TorchTrainer

from pipelines.config import ClusterConfig, compose
from pipelines.training.ray_train import worker
from pipelines.training.ray_train.trainer import make_trainer, torch_config


def cluster(*overrides: str) -> ClusterConfig:
    return compose(["+experiment=digits", *(f"cluster.{o}" for o in overrides)]).cluster


def test_workers_have_the_arrays_of_what_they_are_given_where_ray_stores_them():
    shards = np.arange(1000)
    call = make_trainer(print, {"shards": shards, "name": "r"}, cluster(), "r").train_loop_config
    assert len(call["pickled"]) < shards.nbytes  # it is a few bytes for each of the workers
    found = worker.given(call)
    assert found["name"] == "r"
    np.testing.assert_array_equal(found["shards"], shards)
    assert any(np.shares_memory(found["shards"], stored) for stored in call["buffers"])


def failure_config(*overrides: str):
    return make_trainer(print, {}, cluster(*overrides), "r").run_config.failure_config


@pytest.mark.parametrize(("given", "attempts"), [(None, 7), ("60", 3)])
def test_rays_failure_config_has_what_the_cluster_configuration_says(monkeypatch, given, attempts):
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    asked = ["max_failures=5", "max_preemption_failures=7", "preemption_grace_s=90", "patience_s=121"]
    found = failure_config(*asked)
    assert (found.max_failures, found.max_preemption_failures, found.preemption_grace_s) == (5, 7, 90)
    assert found.controller_failure_limit == attempts


def test_by_default_preemptions_are_not_counted_and_end_the_others_at_once():
    found = failure_config()
    assert (found.max_preemption_failures, found.preemption_grace_s) == (-1, 0)


@pytest.mark.parametrize(("seconds", "group_timeout"), [("600", 660), ("0.5", 61), ("0", 1800), ("null", 1800)])
def test_a_collective_outlasts_the_watchdog_which_can_say_where_it_hangs(seconds, group_timeout):
    assert torch_config(cluster(f"step_timeout_s={seconds}")).timeout_s == group_timeout


def test_of_ray_trains_default_callbacks_only_that_of_datasets_is_left_out():
    trainer = make_trainer(print, {}, cluster(), "r")
    found = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    usual = {type(callback).__name__ for callback in TorchTrainer._create_default_callbacks(trainer)}
    assert usual - found == {"DatasetsCallback"}
    assert found < usual


@pytest.mark.parametrize(("actor", "collects"), [("a1", False), (None, True)])
def test_the_callback_turns_off_the_garbage_collector_in_actors_only_and_before_torch_is_imported(
    monkeypatch, actor, collects
):
    context = make_trainer(print, {}, cluster(), "r").train_run_context
    names = list(vars(context))
    assert names.index("run_config") < names.index("backend_config")  # which imports torch
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: actor))
    try:
        (quick_start, _) = pickle.loads(cloudpickle.dumps(context)).run_config.callbacks
        assert gc.isenabled() is collects
        quick_start.after_controller_start(None)
        assert gc.isenabled()
    finally:
        gc.enable()
