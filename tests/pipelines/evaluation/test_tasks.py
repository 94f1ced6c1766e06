"""Waiting for tasks, without the cluster that would run them."""

import pytest
import ray

from pipelines.evaluation import tasks
from pipelines.evaluation.tasks import TaskError, finished

GPU_NODE = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}
CPU_NODE = {"Alive": True, "Resources": {"CPU": 8.0}}
DEAD_GPU_NODE = {**GPU_NODE, "Alive": False}


class Cluster:
    """What a cluster would answer: at each look, the tasks that have finished and the nodes that are there."""

    def __init__(self, monkeypatch, looks):
        self.looks, self.now = list(looks), 0.0
        monkeypatch.setattr(ray, "wait", self.wait)
        monkeypatch.setattr(ray, "get", str.upper)
        monkeypatch.setattr(ray, "nodes", lambda: self.nodes)
        monkeypatch.setattr(tasks.time, "monotonic", lambda: self.now)

    def wait(self, waiting, num_returns, timeout):
        assert num_returns == 1
        self.now += timeout
        done, self.nodes = self.looks.pop(0)
        return [task for task in done if task in waiting], []


def test_results_come_as_tasks_finish_with_their_places(monkeypatch):
    Cluster(monkeypatch, [("b", [CPU_NODE]), ("", [CPU_NODE]), ("a", [CPU_NODE]), ("c", [CPU_NODE])])
    assert list(finished(["a", "b", "c"], {"CPU": 1}, "draw")) == [(1, "B"), (0, "A"), (2, "C")]


def test_a_task_that_runs_for_hours_is_waited_for(monkeypatch):
    Cluster(monkeypatch, [("", [GPU_NODE])] * 1000 + [("a", [GPU_NODE])])
    assert list(finished(["a"], {"CPU": 1, "GPU": 1}, "draw")) == [(0, "A")]


def test_a_task_that_no_node_can_hold_is_not(monkeypatch):
    # The node with the GPU has gone; a second one would have come in time, had it come.
    Cluster(monkeypatch, [("a", [GPU_NODE])] + [("", [CPU_NODE, DEAD_GPU_NODE])] * 100)
    results = finished(["a", "b"], {"CPU": 1, "GPU": 1}, "draw samples", patience_s=60)
    assert next(results) == (0, "A")
    with pytest.raises(TaskError, match=r"1 of 2 tasks that draw samples wait for 1 CPU and 1 GPU on one node.* 60 s"):
        next(results)


def test_a_node_that_comes_back_in_time_is_waited_for_anew(monkeypatch):
    away, back = ("", [CPU_NODE]), ("", [GPU_NODE])
    Cluster(monkeypatch, [*[away] * 5, back, *[away] * 5, ("a", [GPU_NODE])])
    assert list(finished(["a"], {"GPU": 1}, "draw", patience_s=60)) == [(0, "A")]
