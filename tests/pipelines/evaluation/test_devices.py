import pytest
import ray
import torch

from pipelines.evaluation.devices import actors_that_hold, assigned_device, task_device
from pipelines.remote.tasks import TaskError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "gpu_ids, visible, found",
    [
        ([], None, CPU),
        ([], "0,1", CPU),  # Ray shows them to a task that has asked for none
        (["2"], None, torch.device("cuda", 2)),
        (["2"], "2", torch.device("cuda", 0)),  # what Ray sets for a task with a GPU
        (["3"], "1, 3", torch.device("cuda", 1)),  # what Ray Train sets for the workers of a node
        (["3", "1"], "1,3", torch.device("cuda", 1)),
        (["GPU-b"], "GPU-a,GPU-b", torch.device("cuda", 1)),
    ],
)
def test_the_device_is_the_one_that_ray_has_assigned(gpu_ids, visible, found):
    assert assigned_device(gpu_ids, visible) == found


def test_an_assigned_gpu_that_is_hidden_is_an_error_and_not_another_gpu():
    with pytest.raises(ValueError, match="GPU 2 to this process, and CUDA_VISIBLE_DEVICES = '0,1' hides it"):
        assigned_device(["2"], "0,1")


def test_a_task_without_a_gpu_leaves_those_of_others_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert task_device() == torch.device("cuda", 0)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    assert task_device() == CPU
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [1])
    assert task_device() == torch.device("cuda", 1)


def test_without_a_gpu_everything_is_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert task_device() == CPU


GIB = 2**30
NODES = [{"CPU": 8.0, "memory": 10.0 * GIB}, {"CPU": 2.0, "memory": 20.0 * GIB}, {"memory": 99.0 * GIB}]


@pytest.mark.parametrize(
    "weights, asked, count",
    [
        (GIB // 10, None, 10),  # a processor each
        (GIB // 10, 3, 3),
        (GIB // 10, 50, 50),  # they begin as processors are free
        (4 * GIB, None, 4),  # two on each node
        (4 * GIB, 4, 4),
        (15 * GIB, None, 1),
    ],
)
def test_as_many_actors_draw_as_nodes_have_processors_and_memory_for(weights, asked, count):
    assert actors_that_hold(weights, asked, NODES, None) == count


def test_actors_of_a_model_that_no_node_holds_are_refused_before_they_start():
    with pytest.raises(TaskError, match=r"no node .* weights of 21.00 GiB: Ray has 20.00 GiB on the largest"):
        actors_that_hold(21 * GIB, None, NODES, None)
    with pytest.raises(TaskError, match=r"evaluation.actors=5 .* 4.00 GiB, .* memory for 4: set evaluation.actors=4"):
        actors_that_hold(4 * GIB, 5, NODES, None)
    for unknown in ([], [{"GPU": 1.0}], [{"CPU": 1.0}]):  # nobody says how much memory there will be
        assert actors_that_hold(21 * GIB, None, unknown, None) == 1


def test_a_model_that_is_too_large_for_every_gpu_is_refused_where_all_of_them_are_seen():
    nodes = [{"CPU": 8.0, "GPU": 2.0}]
    assert actors_that_hold(23 * GIB, None, nodes, [8 * GIB, 24 * GIB]) == 2
    with pytest.raises(TaskError, match=r"no GPU .* 25.00 GiB: the largest has 24.00 GiB; cluster.gpus_per_worker=0"):
        actors_that_hold(25 * GIB, None, nodes, [8 * GIB, 24 * GIB])
    assert actors_that_hold(25 * GIB, 1, nodes, [24 * GIB]) == 1  # the other may be larger
    assert actors_that_hold(25 * GIB, None, nodes, []) == 2
