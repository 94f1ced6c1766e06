import pytest
import ray
import torch

from pipelines.evaluation.devices import assigned_device, task_device

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
