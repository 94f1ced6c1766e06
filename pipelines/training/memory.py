"""Bytes that a training will need of its devices, hosts, nodes and disks, from its configuration alone.

Nothing is allocated: the network is on the meta device, and its forward and backward run on fake tensors. The parts and
their sum are those of the fullest moment of a step, which is either the backward or the update of the averages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ddpm.muon import hidden_matrices
from pipelines.config import Config
from pipelines.training.activations import activation_bytes
from pipelines.training.loop.hardware import Precision, weight_dtype
from pipelines.training.loop.parallel import gathered_dtype, micro_batch_count, shard_size
from pipelines.training.loop.speed import TOKENS
from pipelines.training.loop.state import make_network

MIB, GIB = 2**20, 2**30
AVERAGE = 4
"""Bytes of a value of an average, and of what it lacks: averages are float32."""
PROCESS = {"cpu": 400 * MIB, "cuda": 1500 * MIB}
"""Memory of a worker before it has a network: the interpreter, torch, Ray and MLflow, measured on a CPU; with CUDA's
libraries by their usual size, not measured here."""
CONTEXT = 700 * MIB
"""Memory of a GPU that CUDA's context, NCCL and cuDNN's workspaces take, by their usual size; not measured here."""
RAY_NODE = 800 * MIB
"""Memory of Ray's own processes on a node."""
GATHERED_UNITS, SENT_UNITS = 3, 1
"""Units that FSDP2 has whole at a time in the backward: the parameters of one and of the next, which is gathered
meanwhile, and the gradients of the one, in the dtype of gathering; and the copy of gradients that is sent."""
MATRICES_AT_ONCE = 6
"""Copies of a matrix that Muon has at a time: gathered, joined, and in the iteration that makes it orthogonal."""


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a training are.

    Attributes:
        ranks: the number of them.
        per_node: of them on one node.
        device: kind of device of each, "cpu" or "cuda".
        precision: of forward and backward.
    """

    ranks: int
    per_node: int
    device: str
    precision: Precision


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training needs, by place and, in each, by what takes them.

    Attributes:
        placement: the ranks that were assumed.
        device: of a rank; on a CPU these are part of `host`.
        host: of the process of rank 0, which has most.
        node: of all its ranks, and of what else runs there.
        disk: of temporary files on a node; the cache of shards, `data.cache_gib`, comes on top.
    """

    placement: Placement
    device: Mapping[str, int]
    host: Mapping[str, int]
    node: Mapping[str, int]
    disk: Mapping[str, int]

    @property
    def tensors(self) -> int:
        """Bytes of tensors on a device, without what the driver of a GPU takes."""
        return sum(self.device.values()) - self.device.get("context", 0)

    @property
    def places(self) -> dict[str, Mapping[str, int]]:
        """Each place by its name."""
        return {"device": self.device, "host": self.host, "node": self.node, "disk": self.disk}

    @property
    def shared(self) -> dict[str, int]:
        """Bytes of shared memory, which are part of the node's."""
        return {name: size for name, size in self.node.items() if name == "local copies"}

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Return the bytes of each part and their total, for each place."""
        return {name: {**parts, "total": sum(parts.values())} for name, parts in self.places.items()}


def in_words(parts: Mapping[str, int]) -> str:
    """Return the sum of parts in GiB, and each of them."""
    each = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"{sum(parts.values()) / GIB:.2f} GiB ({each})"


def estimate(config: Config, placement: Placement) -> MemoryEstimate:
    """Return what a training needs of memory and disk.

    Args:
        placement: where its ranks are.
    """
    with torch.device("meta"):
        network = make_network(config).to(weight_dtype(config.optim))
    state = _State(config, network, placement)
    device = _device(config, network, placement, state)
    staged = _staged(state, network, placement)
    host = {
        "process": PROCESS[placement.device],
        "batches": _batches(config, placement),
        "staging": staged,
        "backlog": config.checkpoint.backlog * staged,
    }
    if config.checkpoint.local_every is not None:
        host["staging"] += state.kept
    if placement.device == "cpu":
        host["device"] = sum(device.values())
    return MemoryEstimate(placement, device, host, _node(config, placement, state, host), _disk(state))


class _State:
    """The tensors of the state of one rank.

    Attributes:
        shards: ranks that share a copy of the network; 1 where each rank has all of it.
        replicas: copies of the network.
        parameters, optimizer: bytes on a rank.
        average: bytes of one average on a rank, with what it lacks.
        averages: bytes of all of them.
        pieces: bytes of each piece that a checkpoint copies at a time.
    """

    def __init__(self, config: Config, network: nn.Module, placement: Placement) -> None:
        cluster, ranks = config.cluster, placement.ranks
        sizes = {"ddp": 1, "fsdp": ranks, "hsdp": shard_size(ranks, cluster.shard_size or placement.per_node)}
        self.shards = sizes[cluster.parallel]
        self.replicas = ranks // self.shards
        matrices = hidden_matrices(network) if config.optim.kind == "muon" else []
        trained = [p for p in network.parameters() if p.requires_grad]
        self.parameters = sum(map(self._held, network.parameters()))
        self.optimizer = 2 * sum(map(self._held, trained)) - sum(map(self._held, matrices))
        stored = list(network.state_dict().values())
        self.average = 2 * sum(AVERAGE * self._held(t) // t.element_size() for t in stored)
        self.averages = (1 + len(config.optim.power_ema)) * self.average

    def _held(self, tensor: Tensor) -> int:
        """Return the bytes of a tensor that a rank has: FSDP2 cuts it along its first dimension into equal parts."""
        if self.shards == 1 or not tensor.shape:
            return tensor.nbytes
        return -(-tensor.shape[0] // self.shards) * math.prod(tensor.shape[1:]) * tensor.element_size()

    @property
    def total(self) -> int:
        """Bytes of all of it on a rank."""
        return self.parameters + self.optimizer + self.averages

    @property
    def sharded(self) -> bool:
        """Whether a rank has only a part, and writes that."""
        return self.shards > 1

    @property
    def kept(self) -> int:
        """Bytes of a copy in the memory of nodes that a rank makes: its share of what it and others have."""
        return -(-self.total // self.replicas)

    @property
    def written(self) -> int:
        """Bytes of a checkpoint that rank 0 writes: all, or its share of a part that others have too."""
        return self.kept if self.sharded else self.total


def _device(config: Config, network: nn.Module, placement: Placement, state: _State) -> dict[str, int]:
    """Return the bytes of a rank's device by what takes them, at the fullest moment of a step."""
    parts = micro_batch_count(config.batch_size, placement.ranks, config.micro_batch_size)
    images = -(-config.batch_size // (placement.ranks * parts))
    whole = sum(p.nbytes for p in network.parameters())
    matrices = hidden_matrices(network) if config.optim.kind == "muon" else []
    # Before the last micro-batch each rank adds up whole gradients: only that one's are reduced.
    gradients = whole if state.sharded and parts > 1 else state.parameters
    gathered = _gathered(config, network, placement) if state.sharded else 0
    dtype = gathered_dtype(config.cluster, placement.precision) if state.sharded else None
    activations = activation_bytes(config, images, placement.device, placement.precision, dtype)
    # An average is moved by two tensors of its size, when gradients are gone but for DDP's buckets.
    buckets = state.parameters if placement.ranks > 1 and not state.sharded else 0
    update = max(buckets + state.average, gradients + MATRICES_AT_ONCE * max((m.nbytes for m in matrices), default=0))
    found = {
        "parameters": state.parameters,
        "optimizer": state.optimizer,
        "averages": state.averages,
        "gradients": gradients,
        "activations": activations,
        "gathered": gathered,
        "update": max(0, update - gradients - activations - gathered),
    }
    if config.objective.loss == "consistency" and config.objective.consistency_guidance is not None:
        found["teacher"] = whole
    if placement.device == "cuda":
        found["context"] = CONTEXT
    return {name: size for name, size in found.items() if size}


def _gathered(config: Config, network: nn.Module, placement: Placement) -> int:
    """Return the bytes of what FSDP2 has whole in the backward: some units, and what is in no unit, with gradients."""
    units = cast("tuple[type[nn.Module], ...]", getattr(network, "fsdp_units", ()))
    sizes = [sum(p.nbytes for p in m.parameters()) for m in network.modules() if isinstance(m, units)]
    rest = sum(p.nbytes for p in network.parameters()) - sum(sizes)
    share = 0.5 if gathered_dtype(config.cluster, placement.precision) else 1.0
    return round((GATHERED_UNITS * share + SENT_UNITS) * max(sizes, default=0) + 2 * share * rest)


def _staged(state: _State, network: nn.Module, placement: Placement) -> int:
    """Return the bytes of the copy of a checkpoint that rank 0 makes in its host's memory."""
    if placement.device == "cpu":
        return state.written
    # Page-locked memory is taken in powers of two. Chunks of a part are nearly of such a size, whole tensors are not.
    if state.sharded:
        return round(state.written * 1.05)
    sizes = [t.nbytes for t in network.state_dict().values()]
    return round(state.written * sum(1 << (size - 1).bit_length() for size in sizes) / sum(sizes))


def _batches(config: Config, placement: Placement) -> int:
    """Return the bytes of the batches that a rank reads ahead, and of pixels that it keeps."""
    data, images = config.data, -(-config.batch_size // placement.ranks)
    floats = math.prod(data.shape) + (TOKENS + 1) * config.model.text_dim
    return 4 * images * floats * (data.prefetch_batches + 2) + round(data.memory_mib * MIB)


def _node(config: Config, placement: Placement, state: _State, host: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes of a node's memory: all its ranks, of which only rank 0 copies checkpoints that are whole."""
    copies = placement.per_node if state.sharded or config.checkpoint.local_every is not None else 1
    times = dict.fromkeys(host, placement.per_node) | {"staging": copies, "backlog": copies}
    found = {**{name: times[name] * size for name, size in host.items()}, "ray": RAY_NODE}
    if config.checkpoint.local_every is not None:
        # Of its own ranks and of one other node's, and all of them again while a new copy is being made.
        nodes = 2 if placement.ranks > placement.per_node else 1
        found["local copies"] = 2 * nodes * placement.per_node * state.kept
    return found


def _disk(state: _State) -> dict[str, int]:
    """Return the bytes of temporary files: a checkpoint that is whole is written to a file before its upload."""
    return {} if state.sharded else {"checkpoint": state.total}
