"""Whether the workers of a run fit into a cluster."""

from __future__ import annotations

from pipelines.config import compose
from pipelines.training.ray_train.resources import per_worker, possible_workers, shortage


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
