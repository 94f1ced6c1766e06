"""Values and tensors between ranks. Every function here is called by all ranks, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank; it must pickle."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


@torch.no_grad()
def broadcast(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Overwrite every rank's tensors in place with rank 0's values.

    Args:
        values: on rank 0, the whole tensor for each name in `tensors`; ignored on the other ranks.
        tensors: the tensors to overwrite, whole or DTensors; the same names on every rank.
        device: where the process group's backend communicates.
    """
    for name, tensor in tensors.items():
        if world_size() == 1:
            tensor.copy_(values[name])
            continue
        if this_rank() == 0:
            whole = values[name].to(device, tensor.dtype).contiguous()
        else:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, DTensor):
            local_part(tensor).copy_(local_part(distribute_tensor(whole, tensor.device_mesh, tensor.placements)))
        else:
            dist.broadcast(whole, 0)
            tensor.copy_(whole)


@torch.no_grad()
def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole copies in CPU memory on rank 0, and nothing on the other ranks.

    Copies from a GPU go through page-locked memory, all of them at once.

    Args:
        tensors: whole tensors or DTensors; the same names on every rank.
    """
    copies = {}
    on_gpu = False
    for name, tensor in tensors.items():
        whole = _gather_parts(tensor) if isinstance(tensor, DTensor) else tensor
        if whole is not None and this_rank() == 0:
            on_gpu |= whole.is_cuda
            copy = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.is_cuda)
            copies[name] = copy.copy_(whole, non_blocking=True)
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return copies


def _gather_parts(tensor: DTensor) -> Tensor | None:
    """Join the parts of all ranks to a whole tensor on rank 0; return None on the other ranks.

    `DTensor.full_tensor` sends every part to every rank. And with gloo it may end the process: whichever of gloo's two
    threads has finished a collective writes its name into a string that both share, without a lock (torch 2.13,
    `ProcessGroupGloo::runLoop`). A name of more than 15 characters, which is only that of `full_tensor`'s collective,
    is on the heap, where two writes at once free the same memory twice.

    Args:
        tensor: in parts along its first dimension, as FSDP2 cuts it: all of them of as many rows as the first, but for
            the last ones, which may have fewer or none.
    """
    rows = -(-tensor.shape[0] // world_size())
    part = _padded(tensor.to_local(), rows)
    if this_rank() != 0:
        dist.gather(part, dst=0)
        return None
    whole = part.new_empty(rows * world_size(), *tensor.shape[1:])
    dist.gather(part, list(whole.split(rows)), dst=0)
    return whole[: tensor.shape[0]]


def _padded(part: Tensor, rows: int) -> Tensor:
    """Return a part padded with zeros to this many rows: all ranks send equally many."""
    missing = rows - len(part)
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part.contiguous()


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, or a whole tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rank_indices(count: int, rank: int) -> Tensor:
    """Return which of `count` items this rank works on, int64 [ceil(count / world_size)].

    All ranks get equally many, because all ranks of FSDP2 must call the network equally often; where `count` does not
    divide evenly, some items are computed twice.
    """
    each = -(-count // world_size())
    return torch.arange(rank, each * world_size(), world_size()) % count


def all_gather_items(mine: Tensor, count: int) -> Tensor:
    """Return the results of all ranks for the items of `rank_indices` in order, [count, ...], on every rank."""
    if world_size() == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)[:count]


@torch.no_grad()
def all_gather_pieces(mine: Tensor, total: int) -> Tensor:
    """Return the rows of all ranks, [total, ...], on every rank, of pieces that differ by one row."""
    ranks = world_size()
    if ranks == 1:
        return mine
    counts = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(ranks)]
    dist.all_gather(counts, torch.tensor([len(mine)], device=mine.device))
    parts = _all_gather(mine, -(-total // ranks))
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


@torch.no_grad()
def on_whole(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return a function of a whole tensor; of a DTensor, the part of the result that this rank holds.

    Every rank gathers the whole tensor and computes the function of it.

    Args:
        function: whose result has the shape of its argument.
        tensor: whole, or in parts as in `_gather_parts`.
    """
    if not isinstance(tensor, DTensor):
        return function(tensor)
    part, count = tensor.to_local(), tensor.shape[0]
    rows = -(-count // world_size())
    result = function(torch.cat(_all_gather(part, rows))[:count])
    start = min(this_rank() * rows, count)
    return DTensor.from_local(
        result[start : start + len(part)].contiguous(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _all_gather(mine: Tensor, rows: int) -> list[Tensor]:
    """Return the rows of every rank, each padded with zeros to this many."""
    padded = _padded(mine, rows)
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return parts
