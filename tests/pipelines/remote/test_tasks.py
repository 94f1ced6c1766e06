"""Waiting for tasks, without the cluster that would run them."""

import time

import pytest
import ray

from pipelines.remote.tasks import TaskError, finished

GPU_NODE = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}
CPU_NODE = {"Alive": True, "Resources": {"CPU": 8.0}}
DEAD_GPU_NODE = {**GPU_NODE, "Alive": False}


class Cluster:
    """What a cluster would answer: at each look, the tasks that have finished and the nodes that are there."""

    def __init__(self, monkeypatch, looks):
        self.looks, self.now, self.cancelled, self.most = list(looks), 0.0, [], 0
        monkeypatch.setattr(ray, "wait", self.wait)
        monkeypatch.setattr(ray, "get", str.upper)
        monkeypatch.setattr(ray, "cancel", self.cancelled.append)
        monkeypatch.setattr(ray, "nodes", lambda: self.nodes)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def wait(self, waiting, num_returns, timeout):
        assert num_returns == 1
        self.most = max(self.most, len(waiting))
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
    cluster = Cluster(monkeypatch, [("a", [GPU_NODE])] + [("", [CPU_NODE, DEAD_GPU_NODE])] * 100)
    results = finished(["a", "b"], {"CPU": 1, "GPU": 1}, "draw samples", patience_s=60)
    assert next(results) == (0, "A")
    with pytest.raises(
        TaskError, match=r"tasks that draw samples, 1 of them, wait for 1 CPU and 1 GPU on one node.* 60 s"
    ):
        next(results)
    assert cluster.cancelled == ["b"]


def test_a_node_that_comes_back_in_time_is_waited_for_anew(monkeypatch):
    away, back = ("", [CPU_NODE]), ("", [GPU_NODE])
    Cluster(monkeypatch, [*[away] * 5, back, *[away] * 5, ("a", [GPU_NODE])])
    assert list(finished(["a"], {"GPU": 1}, "draw", patience_s=60)) == [(0, "A")]


def test_a_task_that_has_a_deadline_is_waited_for_until_then_with_a_line(monkeypatch):
    said = []
    cluster = Cluster(monkeypatch, [("a", [CPU_NODE])] + [("", [CPU_NODE])] * 100)
    results = finished(["a", "b"], {"CPU": 1}, "write shards", stalled_s=300, notice=said.append)
    assert next(results) == (0, "A")
    with pytest.raises(
        TaskError, match=r"write shards 1 are left, and none has finished for 300 s: see with `ray status`"
    ):
        next(results)
    assert said == ["no task of those that write shards has finished for 60 s: it waits for 1"]
    assert cluster.cancelled == ["b"]


def test_every_finished_task_begins_the_deadline_anew(monkeypatch):
    late = [look for task in "abc" for look in (*[("", [CPU_NODE])] * 20, (task, [CPU_NODE]))]
    Cluster(monkeypatch, late)
    assert len(list(finished(["a", "b", "c"], {"CPU": 1}, "write shards", stalled_s=300))) == 3


def test_so_many_are_taken_at_once_and_another_one_as_each_finishes(monkeypatch):
    taken = []
    cluster = Cluster(monkeypatch, [(task, [CPU_NODE]) for task in "bacd"])

    def tasks():
        for task in "abcd":
            taken.append(task)
            yield task

    results = finished(tasks(), {"CPU": 1}, "draw", at_once=2)
    assert next(results) == (1, "B")
    assert taken == ["a", "b", "c"]
    assert [*results] == [(0, "A"), (2, "C"), (3, "D")]
    assert (cluster.most, cluster.cancelled) == (2, [])


def test_tasks_that_nobody_waits_for_are_cancelled(monkeypatch):
    cluster = Cluster(monkeypatch, [("a", [CPU_NODE])])
    results = finished(["a", "b", "c"], {"CPU": 1}, "draw")
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert cluster.cancelled == ["b", "c"]
