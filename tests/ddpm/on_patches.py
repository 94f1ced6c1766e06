"""Small networks on patches, and inputs for them."""

import torch
from torch import Tensor, nn

from ddpm.conditioning import Conditioning
from ddpm.models.base import NetworkConfig
from ddpm.models.dit import DiTConfig
from ddpm.models.jit import JiTConfig

SMALL = {"in_channels": 1, "out_channels": 1, "patch_size": 2, "width": 32, "depth": 2, "heads": 4}
KINDS = {
    "dit": (DiTConfig, {}),
    "jit": (JiTConfig, {"bottleneck": 4, "class_tokens": 3, "class_tokens_from": 1}),
}


def small(kind: str, **changes) -> NetworkConfig:
    config, settings = KINDS[kind]
    return config(**{**SMALL, **settings, **changes})


def fresh(kind: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    return small(kind, **changes).build().eval()


def make(kind: str, **changes) -> nn.Module:
    """A network whose zeros are numbers, as after a training."""
    network = fresh(kind, **changes)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def batch(count: int = 4, channels: int = 1, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, height, width, generator=generator), torch.arange(count) * 250.0


def captions(n: int, length: int = 5) -> Conditioning:
    mask = torch.arange(length)[None] < torch.tensor([2, 5, 3, 4])[:n, None]
    return Conditioning(text=torch.randn(n, length, 12), text_mask=mask, pooled=torch.randn(n, 12))
