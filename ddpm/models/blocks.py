"""The parts of a UNet: residual and attention blocks, and the stages built from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from ddpm.models.base import NetworkConfig
from ddpm.settings import setting

Text = tuple[Tensor, Tensor]
"""Token embeddings [B, L, D] and their mask, bool [B, L], True for real tokens."""


@dataclass(frozen=True)
class BlockConfig(NetworkConfig):
    """The settings shared by all blocks of a UNet."""

    head_dim: int | None = setting(64, "channels per attention head; null for one head with all channels", ge=1)
    norm_groups: int = setting(32, "groups of every group norm; divides every width", ge=1)
    scale_shift: bool = setting(
        False, "time embedding scales and shifts the second norm (ADM) instead of being added (DDPM)"
    )
    dropout: float = setting(
        0.0, "dropout probability; 0 keeps the loss trace independent of the number of workers", ge=0, lt=1
    )
    norm_eps: float = setting(1e-5, "added to the variance in every group norm", gt=0)
    downsample_padding: Literal[0, 1] = setting(
        1, "padding of strided convolutions, on all sides; 0 pads bottom and right only, as in the code of Ho et al."
    )

    checkpointing: bool = setting(
        False, "compute the activations of a block again in the backward pass instead of keeping them: slower, smaller"
    )

    def heads(self, width: int) -> int:
        """Return the number of attention heads of a block of this width."""
        return 1 if self.head_dim is None else width // self.head_dim


def timestep_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: int = 0) -> Tensor:
    """Return the sinusoidal embedding of t [B], float32 [B, dim], frequencies 1 .. 1/10000 (DDPM, app. B).

    Examples:
        >>> timestep_embedding(torch.tensor([0.0]), 6).tolist()  # cosines, then sines
        [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps / (half - freq_shift))[None]
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=-1)


class TimestepEmbedding(nn.Module):
    """A two-layer perceptron on the sinusoidal embedding."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Block(nn.Module):
    """A module that keeps its inputs alone for the backward pass, and computes the rest again, where it is asked to.

    It does so inside its own forward, not around it: FSDP2 gathers its parameters once for the whole of it.

    Args:
        checkpointing: whether to.
    """

    _forward: Callable[..., Tensor]

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing

    def forward(self, *inputs: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return cast("Tensor", checkpoint(self._forward, *inputs, use_reentrant=False))
        return self._forward(*inputs)


class ResnetBlock(Block):
    """A residual block of two times norm, SiLU and convolution, with the time embedding in between."""

    def __init__(self, config: BlockConfig, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__(config.checkpointing)
        self.scale_shift = config.scale_shift
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, 2 * out_channels if config.scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def _forward(self, x: Tensor, activated_time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        emb = self.time_emb_proj(activated_time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.conv2(self.dropout(F.silu(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(Block):
    """Multi-head self-attention over positions, with a residual path."""

    def __init__(self, config: BlockConfig, channels: int, *, norm: bool = True) -> None:
        super().__init__(config.checkpointing)
        self.heads = config.heads(channels)
        self.group_norm = nn.GroupNorm(config.norm_groups, channels, eps=config.norm_eps) if norm else None
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def _forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = (x if self.group_norm is None else self.group_norm(x)).flatten(2).transpose(1, 2)
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        bias = torch.cat([self.to_q.bias, self.to_k.bias, self.to_v.bias])
        qkv = F.linear(tokens, weight, bias).view(batch, height * width, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height * width, channels)
        return x + self.to_out[0](attended).transpose(1, 2).reshape(batch, channels, height, width)


class CrossAttention(Block):
    """Multi-head attention from positions to text tokens, with a residual path that starts at zero.

    Starting at zero, text can be added to a trained network without disturbing it.
    """

    def __init__(self, config: BlockConfig, channels: int) -> None:
        super().__init__(config.checkpointing)
        self.heads = config.heads(channels)
        self.group_norm = nn.GroupNorm(config.norm_groups, channels, eps=config.norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(config.text_dim, 2 * channels)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def _forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q = self.to_q(tokens).view(batch, height * width, self.heads, -1).transpose(1, 2)
        k, v = self.to_kv(text).view(batch, text.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=text_mask[:, None, None, :])
        attended = attended.transpose(1, 2).reshape(batch, height * width, channels)
        return x + self.to_out(attended).transpose(1, 2).reshape(batch, channels, height, width)


class Downsample(nn.Module):
    """Strided convolution that halves height and width."""

    def __init__(self, config: BlockConfig, channels: int) -> None:
        super().__init__()
        self.pad = (0, 1, 0, 1) if config.downsample_padding == 0 else None
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=config.downsample_padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.pad is None else F.pad(x, self.pad))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNetStage(nn.Module):
    """The residual blocks of one level, each followed by attention where the level has it."""

    def __init__(self, config: BlockConfig, widths: list[tuple[int, int]], time_dim: int, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(config, i, o, time_dim) for i, o in widths])
        self.attentions = nn.ModuleList([Attention(config, o) for _, o in widths]) if attends else None
        reads = attends and config.text_dim > 0
        self.cross_attentions = nn.ModuleList([CrossAttention(config, o) for _, o in widths]) if reads else None
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def block(self, i: int, x: Tensor, activated_time: Tensor, text: Text | None) -> Tensor:
        """Return the output of the i-th residual block and its attention."""
        x = self.resnets[i](x, activated_time)
        if self.attentions is not None:
            x = self.attentions[i](x)
        if self.cross_attentions is not None and text is not None:
            x = self.cross_attentions[i](x, *text)
        return x


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, config: BlockConfig, channels: int, time_dim: int) -> None:
        super().__init__()
        # diffusers omits this norm if the time embedding scales and shifts; the parameters have to match.
        self.attentions = nn.ModuleList([Attention(config, channels, norm=not config.scale_shift)])
        self.cross_attentions = nn.ModuleList([CrossAttention(config, channels)]) if config.text_dim else None
        self.resnets = nn.ModuleList([ResnetBlock(config, channels, channels, time_dim) for _ in range(2)])

    def forward(self, x: Tensor, activated_time: Tensor, text: Text | None) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, activated_time))
        if self.cross_attentions is not None and text is not None:
            x = self.cross_attentions[0](x, *text)
        return self.resnets[1](x, activated_time)
