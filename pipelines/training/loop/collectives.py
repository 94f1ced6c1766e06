"""Values and tensors between ranks. Every function here is called by all ranks, in the same order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pipelines.checkpoints.parts import TensorRows
from pipelines.presentation.errors import PipelineError

T = TypeVar("T")


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


def from_rank_0(call: Callable[[], T]) -> T:
    """Return on every rank what a call returns on rank 0, where alone it is made; it must pickle.

    Raises:
        PipelineError: on every rank, what the call raised.
    """
    found: T | None = None
    error: PipelineError | None = None
    if this_rank() == 0:
        try:
            found = call()
        except PipelineError as failure:
            error = failure
    found, error = broadcast_object((found, error))
    if error is not None:
        raise error
    return cast("T", found)


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


def all_gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values of all ranks on every rank, in their order; they must pickle.

    Args:
        group: of all ranks; the default one where not given.
    """
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group)
    return found


def group_store() -> Store | None:
    """Return a connection of its own to the store of the process group; None without one."""
    if world_size() == 1:
        return None
    store: Store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return store


@torch.no_grad()
def copies_on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies in CPU memory.

    Those of GPU tensors are in page-locked memory: all transfers are issued at once, and waited for together.
    """
    copies = {}
    for name, tensor in tensors.items():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor, non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies


@dataclass(frozen=True)
class _Place:
    """Which rows of a tensor this rank holds, and which of the ranks that hold the same ones it is.

    Attributes:
        first: index of the first row.
        replica: 0..replicas - 1.
        replicas: the number of ranks that hold the same rows.
    """

    first: int
    replica: int
    replicas: int


def _place(tensor: Tensor) -> _Place:
    """Return the place of this rank's part of a tensor.

    Args:
        tensor: whole, or in parts along its first dimension as FSDP2 cuts it: all of as many rows as the first, but for
            the last ones, which may have fewer or none.
    """
    if not isinstance(tensor, DTensor):
        return _Place(0, this_rank(), world_size())
    mesh, count = tensor.device_mesh, tensor.shape[0]
    first, replica, replicas = 0, 0, 1
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            assert placement == Shard(0), f"parts along {placement}, where FSDP2 cuts along the first dimension"
            first = min(mesh.get_local_rank(dim) * -(-count // mesh.size(dim)), count)
        else:
            replica, replicas = replica * mesh.size(dim) + mesh.get_local_rank(dim), replicas * mesh.size(dim)
    return _Place(first, replica, replicas)


def held_rows(tensors: Mapping[str, Tensor]) -> list[TensorRows]:
    """Return the rows that this rank holds of tensors, to overwrite in place; none where it holds none."""
    held = [TensorRows(n, tuple(t.shape), _place(t).first, local_part(t.detach())) for n, t in tensors.items()]
    return [rows for rows in held if rows.values.numel()]


@torch.no_grad()
def written_rows(tensors: Mapping[str, Tensor]) -> list[TensorRows]:
    """Return copies in CPU memory of the rows that this rank writes: every row of every tensor is written by one rank.

    Ranks that hold the same rows share them, chunk by chunk.

    Args:
        tensors: whole tensors or DTensors; the same names on every rank.
    """
    chosen: dict[str, TensorRows] = {}
    turns: Counter[int] = Counter()
    for rows in held_rows(tensors):
        place = _place(tensors[rows.name])
        for chunk in rows.chunks():
            if turns[place.replicas] % place.replicas == place.replica:
                chosen[f"{chunk.name}@{chunk.first}"] = chunk
            turns[place.replicas] += 1
    copies = copies_on_cpu({key: chunk.values for key, chunk in chosen.items()})
    return [replace(chunk, values=copies[key]) for key, chunk in chosen.items()]


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

    Every rank gathers the whole tensor from the ranks that hold other parts of it, and computes the function of it.

    Args:
        function: whose result has the shape of its argument.
        tensor: whole, or in parts as in `_place`.
    """
    if not isinstance(tensor, DTensor):
        return function(tensor)
    mesh = tensor.device_mesh
    part, count, first = tensor.to_local(), tensor.shape[0], _place(tensor).first
    sharded = next(dim for dim, placement in enumerate(tensor.placements) if placement.is_shard())
    parts = _all_gather(part, -(-count // mesh.size(sharded)), mesh.get_group(sharded))
    result = function(torch.cat(parts)[:count])
    return DTensor.from_local(
        result[first : first + len(part)].contiguous(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _all_gather(mine: Tensor, rows: int, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the rows of every rank of a group, of all ranks by default, each padded with zeros to this many."""
    padded = _padded(mine, rows)
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, padded, group)
    return parts
