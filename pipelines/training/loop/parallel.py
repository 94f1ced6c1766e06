"""A network over several ranks: copies (DDP) or parts (FSDP2), and whole tensors of either for checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pipelines.config import ClusterConfig
from pipelines.shards.read import Batch

def world() -> int:
    """The number of ranks of this training."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(network: nn.Module, cluster: ClusterConfig, device: torch.device) -> None:
    """Cut a network's parameters into one part per rank, in place, where the configuration says so."""
    if world() == 1 or cluster.parallel == "ddp":
        return
    mesh = init_device_mesh(device.type, (world(),))
    # Their parameters are gathered for their own forward and backward, and given back afterwards.
    units = cast("tuple[type[nn.Module], ...]", getattr(network, "fsdp_units", ()))
    for unit in [m for m in network.modules() if isinstance(m, units)]:
        if cluster.compile:  # inside the hooks that gather and give back, which a compiled graph could not hold
            unit.compile()
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)


def trainable(network: nn.Module, cluster: ClusterConfig, device: torch.device) -> nn.Module:
    """What the training step calls: the network, compiled and with its gradients shared as the configuration says."""
    if isinstance(network, FSDPModule):
        return network
    called = cast("nn.Module", torch.compile(network)) if cluster.compile else network
    if world() == 1:
        return called
    return DistributedDataParallel(
        called, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


@contextmanager
def accumulating(called: nn.Module, last: bool) -> Iterator[None]:
    """Forward and backward of one micro-batch; gradients are shared in the last one's backward."""
    if isinstance(called, FSDPModule):
        called.set_requires_gradient_sync(last)
        called.set_is_last_backward(last)
        yield
    elif isinstance(called, DistributedDataParallel) and not last:
        with called.no_sync():
            yield
    else:
        yield


def micro_batches(batch: Batch, global_size: int, at_most: int | None) -> Iterator[tuple[Batch, float, bool]]:
    """(part, weight, is last): nearly equal parts of a rank's piece, as many on every rank.

    Pieces of a global batch differ by one sample; where a rank has fewer samples than there are parts, a part repeats
    a sample at weight 0, because all ranks must take part in every forward and backward.

    Args:
        batch: this rank's piece.
        global_size: samples of the global batch.
        at_most: samples of a part; None for one part.
    """
    largest = -(-global_size // world())
    parts = -(-largest // min(at_most or largest, largest))
    count = len(batch.ordinals)
    bounds = [i * count // parts for i in range(parts + 1)]
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        span, weight = (slice(start, stop), 1.0) if stop > start else (slice(0, 1), 0.0)
        yield batch[span], weight, i == parts - 1


@torch.no_grad()
def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies in CPU memory, on rank 0; nothing elsewhere. Called by every rank with the same names.

    Copies from a GPU go through page-locked memory, all under way at once.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    copies = {}
    on_gpu = False
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank == 0:
            on_gpu |= whole.is_cuda
            copy = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.is_cuda)
            copies[name] = copy.copy_(whole, non_blocking=True)
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return copies


@torch.no_grad()
def spread(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Rank 0's whole tensors into every rank's, in place. Called by every rank with the same `tensors`.

    Args:
        values: on rank 0, one for each of `tensors`, of its shape; not looked at elsewhere.
        tensors: what is overwritten, whole or in parts.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    for name, tensor in tensors.items():
        if world() == 1:
            tensor.copy_(values[name])
            continue
        if rank == 0:
            whole = values[name].to(device, tensor.dtype).contiguous()
        else:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements).to_local())
        else:
            dist.broadcast(whole, 0)
            tensor.copy_(whole)


def share(value: Any) -> Any:
    """Rank 0's value, on every rank; it must pickle."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
