"""A network on several ranks, replicated (DDP) or sharded (FSDP2), and the micro-batches of a step."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pipelines.config import ClusterConfig
from pipelines.shards.read import Batch
from pipelines.training.loop.collectives import world_size
from pipelines.training.loop.hardware import Precision


def gathered_dtype(cluster: ClusterConfig, precision: Precision) -> torch.dtype | None:
    """Return the dtype in which a sharded network gathers its weights; None for their own."""
    return torch.bfloat16 if cluster.param_dtype == "bf16" and precision == "bf16" else None


def apply_fsdp(
    network: nn.Module, cluster: ClusterConfig, device: torch.device, gathered: torch.dtype | None = None
) -> None:
    """Shard a network's parameters over the ranks, in place, where the configuration asks for FSDP2 or HSDP.

    Modules of the classes in the network's attribute `fsdp_units` are sharded one by one: their parameters are gathered
    for their own forward and backward, and freed afterwards. A network without the attribute is one unit.

    Args:
        gathered: dtype in which weights are gathered; None for their own. Gradients are reduced in float32.
    """
    if world_size() == 1 or cluster.parallel == "ddp":
        return
    mesh = _mesh(cluster, device)
    # Inputs stay as they are: a timestep in bf16 would be another one, and autocast converts where it has to.
    policy = MixedPrecisionPolicy(gathered, gathered and torch.float32, cast_forward_inputs=False)
    units = cast("tuple[type[nn.Module], ...]", getattr(network, "fsdp_units", ()))
    for unit in [module for module in network.modules() if isinstance(module, units)]:
        if cluster.compile:  # inside the hooks that gather and free, which a compiled graph could not hold
            unit.compile()
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)


def _mesh(cluster: ClusterConfig, device: torch.device) -> DeviceMesh:
    """Return the mesh of the ranks: all in a row, or for HSDP a row for each copy of the network."""
    if cluster.parallel == "fsdp":
        return init_device_mesh(device.type, (world_size(),))
    # Ranks are numbered node by node, so that those of a row are on one node.
    wanted = cluster.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    size = shard_size(world_size(), wanted)
    return init_device_mesh(device.type, (world_size() // size, size), mesh_dim_names=("replicate", "shard"))


def shard_size(world: int, wanted: int) -> int:
    """Return over how many ranks a copy of the network is sharded: the wanted ones, or the fewest above that divide
    them all, so that no rank holds more of it than expected."""
    return next(size for size in range(min(wanted, world), world + 1) if world % size == 0)


def wrap(network: nn.Module, cluster: ClusterConfig, device: torch.device) -> nn.Module:
    """Return the module that a step calls: the network, compiled and wrapped by DDP as the configuration asks."""
    if isinstance(network, FSDPModule):
        return network
    wrapped = cast("nn.Module", torch.compile(network)) if cluster.compile else network
    if world_size() == 1:
        return wrapped
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(wrapped, device_ids=device_ids, gradient_as_bucket_view=True)


@contextmanager
def gradient_sync(wrapped: nn.Module, enabled: bool) -> Iterator[None]:
    """Run forward and backward of one micro-batch; gradients are averaged over the ranks only where enabled."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(enabled)
        wrapped.set_is_last_backward(enabled)
        yield
    elif isinstance(wrapped, DistributedDataParallel) and not enabled:
        with wrapped.no_sync():
            yield
    else:
        yield


def micro_batches(
    batch: Batch, global_size: int, world_size: int, at_most: int | None
) -> Iterator[tuple[Batch, float, bool]]:
    """Yield (part, weight, is last): nearly equal parts of a rank's piece, equally many on every rank.

    Pieces of a global batch differ by one sample; where a rank has fewer samples than there are parts, a part repeats
    a sample at weight 0, because all ranks must take part in every forward and backward.

    Args:
        batch: this rank's piece.
        global_size: samples of the global batch.
        world_size: the number of ranks.
        at_most: the largest number of samples in a part; None for one part.
    """
    parts = micro_batch_count(global_size, world_size, at_most)
    count = len(batch.ordinals)
    bounds = [i * count // parts for i in range(parts + 1)]
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        span, weight = (slice(start, stop), 1.0) if stop > start else (slice(0, 1), 0.0)
        yield batch[span], weight, i == parts - 1


def micro_batch_count(global_size: int, world_size: int, at_most: int | None) -> int:
    """Return the number of parts in which `micro_batches` yields the piece of every rank; arguments are the same."""
    largest = -(-global_size // world_size)
    return -(-largest // min(at_most or largest, largest))
