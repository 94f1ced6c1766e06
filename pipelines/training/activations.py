"""What forward and backward keep in memory beside parameters and gradients, found without computing anything.

Forward and backward run on fake tensors, which have shapes and dtypes but no bytes. A dispatch mode adds up the sizes
of the storages that are alive, as an allocator would see them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm.conditioning import Conditioning
from ddpm.models.base import NetworkConfig
from pipelines.config import Config, network_config
from pipelines.training.loop.hardware import AUTOCAST, Precision, weight_dtype
from pipelines.training.loop.speed import TOKENS
from pipelines.training.loop.state import make_network

IMAGES_KEPT = 6
"""Tensors of the size of the images that a loss has at a time beside the network's: x_0, noise, x_t, target and two
of their combinations."""


def activation_bytes(
    config: Config, images: int, device: str, precision: Precision, gathered: torch.dtype | None = None
) -> int:
    """Return the most bytes that forward and backward of one micro-batch take beside parameters and their gradients.

    Activations that the backward computes again (`model.checkpointing`) are counted where they are alive, and so are
    the copies of weights in bf16 that autocast keeps for the backward.

    Args:
        images: of the micro-batch.
        device: "cpu" or "cuda", whose rules for autocast count; neither has to be there.
        gathered: dtype of the weights in forward and backward; None for that of the configuration.
    """
    data, dtype = config.data, weight_dtype(config.optim)
    case = _Case((images, *data.shape), dtype, gathered, device, precision)
    key = f"{config.task} {network_config(config)!r}", case
    if key not in _known:
        with torch.device("meta"):
            network = make_network(config).to(gathered or dtype)
        _known[key] = _measured(network, network_config(config), case)
    return _known[key]


@dataclass(frozen=True)
class _Case:
    """A micro-batch and how it is computed: images [B, C, H, W] of a dtype, and as in `activation_bytes`."""

    batch: tuple[int, int, int, int]
    dtype: torch.dtype
    gathered: torch.dtype | None
    device: str
    precision: Precision


_known: dict[tuple[str, _Case], int] = {}
"""What was found before, by network and case: remedies and trials of a study ask for the same ones again."""


def _measured(network: nn.Module, shape: NetworkConfig, case: _Case) -> int:
    mode, live = FakeTensorMode(), _LiveBytes()

    def fake(*shape: int, dtype: torch.dtype) -> Tensor:
        return FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))

    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            made = nn.Parameter(fake(*parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
            live.leave_out(made)
            made.register_post_accumulate_grad_hook(lambda each: live.leave_out(each.grad))
            module._parameters[name] = made
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = fake(*buffer.shape, dtype=buffer.dtype)
    real = partial(fake, dtype=case.dtype)
    x_t, t, cond = real(*case.batch), real(case.batch[0]), _condition(shape, case.batch, real, fake)
    with mode, live:
        with _autocast(case.device, case.precision):
            output = network(x_t, t) if cond is None else network(x_t, t, cond)
        output.float().square().mean().backward()
    return live.most + IMAGES_KEPT * x_t.untyped_storage().nbytes()


def _condition(
    shape: NetworkConfig, batch: tuple[int, int, int, int], real: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> Conditioning | None:
    """Return a condition of every kind that the network takes; None where it takes none."""
    images, _, height, width = batch
    found: dict[str, Tensor] = {}
    if shape.num_classes:
        found["label"] = fake(images, dtype=torch.int64)
    if shape.text_dim:
        found["text"] = real(images, TOKENS, shape.text_dim)
        found["text_mask"] = fake(images, TOKENS, dtype=torch.bool)
        found["pooled"] = real(images, shape.text_dim)
    if shape.context_channels:
        found["mask"] = real(images, 1, height, width)
        found["context"] = real(images, shape.context_channels, height, width)
    return Conditioning(**found) if found else None


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still alive.

    Attributes:
        now: at present.
        most: at their peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._counted: dict[int, int] = {}  # address of a storage -> its bytes

    def leave_out(self, tensor: Tensor | None) -> None:
        """Do not count a tensor, from now on: it is a parameter or a gradient, or none."""
        if tensor is not None:
            storage = tensor.untyped_storage()
            self._watch(storage, 0)
            self.now -= self._counted[storage._cdata]
            self._counted[storage._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self._watch(storage, storage.nbytes())
        self.most = max(self.most, self.now)
        return found

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        address = storage._cdata
        if address not in self._counted:
            self._counted[address] = size
            self.now += size
            weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.now -= self._counted.pop(address)


@contextmanager
def _autocast(device: str, precision: Precision) -> Iterator[None]:
    """Autocast as on a device of this kind; fake tensors are always on the CPU, whose rules differ for norms."""
    if precision not in AUTOCAST:
        yield
        return
    with torch.autocast("cpu", AUTOCAST[precision]):
        if device == "cpu":
            yield
            return
        with _NormsInFloat32():
            yield


class _NormsInFloat32(TorchFunctionMode):
    """Norms in float32 whatever comes in, as autocast computes them on GPUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))
