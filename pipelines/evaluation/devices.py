"""Where a Ray task or actor computes: on the GPU that Ray has assigned to it, or on the CPU, if it holds the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray
import torch

from pipelines.remote.tasks import TaskError


def task_device() -> torch.device:
    """Return the device of this process: Ray's choice inside a cluster, else the first GPU, if there is one.

    `torch.cuda.is_available()` alone does not tell: Ray no longer hides GPUs from a task that has asked for none, and
    the first one belongs to somebody else.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not ray.is_initialized():
        return torch.device("cuda", 0)
    return assigned_device([str(gpu) for gpu in ray.get_gpu_ids()], os.environ.get("CUDA_VISIBLE_DEVICES"))


def assigned_device(gpu_ids: Sequence[str], visible: str | None) -> torch.device:
    """Return the first of the GPUs that Ray has assigned, numbered as CUDA does in this process.

    Args:
        gpu_ids: as `ray.get_gpu_ids()` names them; none for a task that has asked for none.
        visible: `CUDA_VISIBLE_DEVICES` of this process, None where it is not set: CUDA counts the GPUs in its order.

    Raises:
        ValueError: CUDA does not see the assigned GPU.
    """
    if not gpu_ids:
        return torch.device("cpu")
    if visible is None:
        return torch.device("cuda", int(gpu_ids[0]))
    names = [name.strip() for name in visible.split(",")]
    if gpu_ids[0] not in names:
        raise ValueError(
            f"Ray has assigned GPU {gpu_ids[0]} to this process, and CUDA_VISIBLE_DEVICES = {visible!r} hides it: "
            "do not set that variable in a task or in the runtime environment"
        )
    return torch.device("cuda", names.index(gpu_ids[0]))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, on which the same numbers come out every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seen_gpus() -> list[int]:
    """Return the bytes of memory of each GPU that this process sees."""
    return [torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count())]


def actors_that_hold(
    weights: int, asked: int | None, nodes: Sequence[Mapping[str, float]], gpus: Sequence[int] | None
) -> int:
    """Return how many actors draw from a model: as many as are asked for, else as many as nodes have memory for.

    Memory is counted for weights alone, so that what passes may still not fit with its activations. Ray does not say
    how much memory GPUs have: those of other machines are not checked.

    Args:
        weights: bytes of the model's weights, which each actor holds.
        asked: `evaluation.actors`.
        nodes: resources of the live nodes of the cluster, by Ray's names.
        gpus: memory of the GPUs that this process sees, where each actor has a GPU; None where they draw on CPUs.

    Raises:
        TaskError: no device holds the weights, or not those of as many actors; names the setting that helps.
    """
    total = int(sum(node.get("CPU" if gpus is None else "GPU", 0) for node in nodes))
    size = f"the model's weights of {weights / 2**30:.2f} GiB"
    if gpus is not None:
        if gpus and len(gpus) >= total and weights > max(gpus):
            raise TaskError(
                f"no GPU of the Ray cluster holds {size}: the largest has {max(gpus) / 2**30:.2f} GiB; "
                "cluster.gpus_per_worker=0 draws on CPUs"
            )
        return asked or max(total, 1)
    processors = [(int(node.get("CPU", 0)), node.get("memory")) for node in nodes if node.get("CPU", 0) >= 1]
    room = sum(cpus if memory is None else min(cpus, int(memory // weights)) for cpus, memory in processors)
    if processors and not room:
        largest = max(memory for _, memory in processors if memory is not None)
        raise TaskError(
            f"no node of the Ray cluster holds {size}: Ray has {largest / 2**30:.2f} GiB on the largest one; add one "
            "with more (`ray start --memory`), or draw on GPUs by cluster.gpus_per_worker=1"
        )
    if processors and asked is not None and min(asked, total) > room:
        raise TaskError(
            f"evaluation.actors={asked} would each hold {size}, and the nodes of the Ray cluster have memory for "
            f"{room}: set evaluation.actors={room}"
        )
    return asked or max(min(total, room), 1)
