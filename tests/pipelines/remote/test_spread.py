"""Whether tasks can do some work, without the cluster that would."""

import pytest
import ray
from ray.exceptions import NodeDiedError, RayTaskError

from pipelines.remote import spread
from pipelines.remote.spread import OverRay, obstacle_to_tasks
from pipelines.remote.tasks import TaskError

NODE = {"Alive": True, "Resources": {"CPU": 4.0}}
LOST = {"Alive": False, "Resources": {"CPU": 4.0}}
S3, FILES = "s3://bucket/data", "file:///data"


@pytest.fixture
def cluster(monkeypatch):
    """Says that this process is connected to a cluster of some nodes."""

    def connected(nodes, cpus=8):
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus)} if cpus else {})

    return connected


@pytest.mark.parametrize(
    "nodes, cpus, addresses, obstacle",
    [
        ([NODE], 4, [S3, FILES], None),
        ([NODE, LOST], 4, [FILES], None),
        ([NODE, NODE], 8, [S3], None),
        ([NODE, NODE], 8, [S3, FILES], "the Ray cluster's other nodes do not see /data"),
        ([NODE], 0, [S3], "the Ray cluster has no CPUs"),
    ],
)
def test_tasks_work_where_all_nodes_see_the_addresses(cluster, nodes, cpus, addresses, obstacle):
    cluster(nodes, cpus)
    assert obstacle_to_tasks(addresses) == obstacle


def test_without_a_connection_nobody_asked_for_tasks():
    assert obstacle_to_tasks([S3]) == ""


class Task:
    """Calls a function where Ray would on another machine."""

    def __init__(self, function):
        self.function = function

    def remote(self, *arguments):
        return lambda: self.function(*arguments)


@pytest.fixture
def here(monkeypatch, cluster):
    """Tasks that run here, the last of those that were submitted first."""
    cluster([NODE])

    def finished(calls, needs, what, *, at_once, stalled_s, notice):
        assert needs == {"CPU": 1}
        assert at_once == 16
        for place, call in reversed(list(enumerate(calls))):
            yield place, call()

    monkeypatch.setattr(ray, "remote", lambda **options: Task)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(spread, "finished", finished)


def work(item, advance):
    advance(item)
    advance(1)
    return item * 10


def test_results_come_with_their_places_and_what_was_counted_once_they_are_there(here):
    counted = []
    assert list(OverRay("count")(work, [3, 5], counted.append)) == [(1, 50), (0, 30)]
    assert counted == [6, 4]
    assert OverRay("count").where == "as Ray tasks on 8 CPUs"


def test_an_error_of_the_work_is_raised_as_it_is(here):
    def failing(item, advance):
        raise RayTaskError("work", "trace", ValueError("no such bucket"))

    with pytest.raises(ValueError, match="no such bucket"):
        list(OverRay("count")(failing, [1], lambda count: None))


def test_a_task_that_is_lost_with_every_node_ends_the_work_with_what_to_do(here):
    def lost(item, advance):
        raise NodeDiedError("gone")

    with pytest.raises(TaskError, match=r"Ray has lost a task of those that count again and again \(NodeDiedError\)"):
        list(OverRay("count")(lost, [1], lambda count: None))
