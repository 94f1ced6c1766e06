"""Whether the workers of a run fit into a cluster."""

from __future__ import annotations

import pytest
import ray

from pipelines.config import ClusterConfig, compose
from pipelines.training import resources
from pipelines.training.resources import has_room_beside, per_worker, possible_workers, shortage


def test_a_worker_does_not_span_two_nodes():
    worker = {"CPU": 4.0, "GPU": 1.0}
    assert possible_workers([{"CPU": 8, "GPU": 8}, {"CPU": 16, "GPU": 2}], worker) == 2 + 2
    assert possible_workers([{"CPU": 3, "GPU": 1}, {"CPU": 3, "GPU": 1}], worker) == 0
    assert possible_workers([], worker) == 0


def test_a_shortage_says_what_is_needed_what_is_there_and_what_to_do():
    cluster = compose(["+experiment=digits", "cluster.num_workers=[2,8]", "cluster.cpus_per_worker=4"]).cluster
    assert per_worker(cluster) == {"CPU": 4.0}
    assert shortage(cluster, [{"CPU": 4}, {"CPU": 4}]) is None
    text = shortage(cluster, [{"CPU": 7}])
    assert text is not None
    assert "too small for 2 workers: each needs 4 CPU on one node, 1 node with 7 CPU in all hold 1" in text
    assert "cluster.num_workers" in text


@pytest.mark.parametrize(
    "workers, nodes, room",
    [
        (1, [{"CPU": 2.0}], True),
        (2, [{"CPU": 2.0}], False),
        (2, [{"CPU": 2.0}, {"CPU": 1.0}], True),
        (3, [{"CPU": 2.0}, {"CPU": 1.0}], False),
        (1, [{"CPU": 1.5}], False),  # half a core is not one
        ((1, 4), [{"CPU": 4.0}], False),  # an elastic run may grow
        ((1, 4), [{"CPU": 4.0}, {"CPU": 1.0}], True),
        (1, [], False),
    ],
)
def test_an_evaluation_has_room_where_all_workers_fit_beside_it(workers, nodes, room):
    assert has_room_beside(ClusterConfig(num_workers=workers), nodes, {"CPU": 1.0}) == room


def test_an_evaluation_on_a_gpu_needs_one_that_no_worker_wants():
    cluster = ClusterConfig(num_workers=2, gpus_per_worker=1)
    needs = {"CPU": 1.0, "GPU": 1.0}
    assert not has_room_beside(cluster, [{"CPU": 16.0, "GPU": 2.0}], needs)
    assert has_room_beside(cluster, [{"CPU": 16.0, "GPU": 3.0}], needs)
    assert not has_room_beside(cluster, [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0}], needs)


@pytest.mark.parametrize(
    "address, told", [("10.0.0.7:6379", "10.0.0.7:6379"), ("auto", None), ("ray://10.0.0.7:10001", None)]
)
def test_processes_of_a_training_know_which_cluster_is_theirs(monkeypatch, address, told):
    """There may be two on a machine, and Ray's own helpers ask for the only one."""
    settings = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **given: settings.update(given))
    resources.connect_ray(compose([f"cluster.address={address}"]))
    assert settings["runtime_env"]["env_vars"].get("RAY_ADDRESS") == told
