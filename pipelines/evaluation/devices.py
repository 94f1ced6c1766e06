"""Where a Ray task or actor computes: on the GPU that Ray has assigned to it, or on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
import torch


def task_device() -> torch.device:
    """Return the device of this process: Ray's choice inside of a cluster, else the first GPU, if there is one.

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
