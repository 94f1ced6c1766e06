"""The settings of a machine for training: precision, memory layout, cache of compiled code, and peak speed."""

from __future__ import annotations

import os
import resource
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm.prediction import computes_bf16
from pipelines.config import Config, OptimConfig

Precision = Literal["bf16", "fp16", "tf32", "fp32", "fp64"]
"""The dtype of forward and backward; weights are float64 under "fp64" and float32 under all others."""
AUTOCAST: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = (7, 0)
"""The compute capability of the V100, the first with tensor cores, which make fp16 fast."""
# Dense bf16 peaks, from the makers' data sheets; the first key that is part of the card's name counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
}


def configure_process(config: Config, cache: Path) -> None:
    """Set precision and compile cache of this process; called before the first computation.

    Args:
        cache: the node's folder, below which torch.compile keeps its results for the next start.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    tf32 = config.optim.precision in ("auto", "bf16", "fp16", "tf32")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def weight_dtype(optim: OptimConfig) -> torch.dtype:
    """Return the dtype of weights, gradients and optimizer state; "fp64" is for tests of exactness."""
    return torch.float64 if optim.precision == "fp64" else torch.float32


def resolve_precision(optim: OptimConfig, device: torch.device) -> Precision:
    """Return the precision of the configuration, or for "auto" the fastest one that the device supports natively."""
    if optim.precision != "auto":
        return optim.precision
    if computes_bf16(device):
        return "bf16"
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= TENSOR_CORES
    return "fp16" if tensor_cores else "fp32"


def precision_change(before: str | None, now: Precision) -> str | None:
    """Return a warning where a run goes on in another precision than its checkpoint's; None where it does not.

    Args:
        before: None in checkpoints of releases that did not record it.
    """
    if before is None or before == now:
        return None
    return (
        f"the run was computed in {before} so far and goes on in {now}, which optim.precision=auto means on this "
        "machine: its losses differ by rounding. A precision that is set by name is the same on every machine"
    )


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the autocast context of forward and backward; weights stay float32 under bf16 and fp16."""
    return torch.autocast(device.type, AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)


def channels_last(device: torch.device) -> bool:
    """Return whether activations are channels last: faster on tensor cores, and slower on CPUs, with AMX or without."""
    return device.type == "cuda"


def place_network(network: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """Return the network on its device; FSDP2 shards contiguous weights only: their layout stays."""
    if channels_last(device) and config.cluster.parallel == "ddp":
        return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.to(device)


def to_device(images: Tensor, config: Config, device: torch.device) -> Tensor:
    """Return images on the device, in the network's precision and layout."""
    layout = torch.channels_last if channels_last(device) else torch.contiguous_format
    return images.to(device, weight_dtype(config.optim), non_blocking=True, memory_format=layout)


def flops_per_image(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Return the FLOPs of one image's forward and backward (twice the forward), multiply and add counted as two.

    Args:
        network: on the meta device: shapes are counted, nothing is computed.
        shape: (C, H, W) of an image.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta"))
    return 3 * int(counter.get_total_flops())


def peak_flops(config: Config, device: torch.device) -> float | None:
    """Return the dense bf16 peak of the device in FLOP/s, or None where it is not known."""
    if config.cluster.peak_tflops is not None:
        return config.cluster.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for card, peak in PEAK_TFLOPS.items() if card in name), None)


def memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: of tensors on the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
