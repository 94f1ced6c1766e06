"""The DDPM/ADM UNet (Ho et al. 2020, app. B; Dhariwal & Nichol 2021, sec. 3).

Parameter for parameter the network of diffusers' `UNet2DModel`, names included, so that weights pass between the two
unchanged. A class-conditional network has one embedding row more than classes: the last is its null condition.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.prediction import Conditioning


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a `UNet`.

    Attributes:
        in_channels: channels of x_t.
        out_channels: channels of the output.
        channels: width of each resolution level, finest first; the resolution halves between levels.
        layers_per_block: residual blocks per level on the way down (one more on the way up).
        attention: for each level, whether its residual blocks are followed by self-attention.
        head_dim: channels per attention head.
        norm_groups: groups of every group norm; divides every width.
        scale_shift: time embedding scales and shifts the second norm (ADM) instead of being added (DDPM).
        dropout: in every residual block.
        num_classes: class labels, 0 for an unconditional network.
    """

    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 256, 256)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (False, True, False, False)
    head_dim: int = 64
    norm_groups: int = 32
    scale_shift: bool = False
    dropout: float = 0.0
    num_classes: int = 0

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.attention) or not self.channels:
            raise ValueError(
                f"attention needs one entry per level: {len(self.channels)} widths, {len(self.attention)} entries"
            )
        for level, (width, attends) in enumerate(zip(self.channels, self.attention, strict=True)):
            if width % self.norm_groups:
                raise ValueError(f"channels[{level}] = {width} is not divisible by norm_groups = {self.norm_groups}")
            if (attends or level == len(self.channels) - 1) and width % self.head_dim:
                raise ValueError(f"channels[{level}] = {width} is not divisible by head_dim = {self.head_dim}")
        if self.layers_per_block < 1 or self.num_classes < 0 or not 0 <= self.dropout < 1:
            raise ValueError("need layers_per_block >= 1, num_classes >= 0 and 0 <= dropout < 1")

    @property
    def downsampling(self) -> int:
        """Height and width must be multiples of this."""
        return 2 ** (len(self.channels) - 1)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of t [B], float32 [B, dim]: cosines first, frequencies 1 .. 1/10000 (DDPM, app. B)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron on the sinusoids."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution twice, with the time embedding in between and a residual path."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.scale_shift = config.scale_shift
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, 2 * out_channels if config.scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, eps=1e-5)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, activated_time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        emb = self.time_emb_proj(activated_time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.conv2(self.dropout(F.silu(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    """Multi-head self-attention over positions, with a residual path."""

    def __init__(self, config: UNetConfig, channels: int, *, norm: bool = True) -> None:
        super().__init__()
        self.heads = channels // config.head_dim
        self.group_norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-5) if norm else None
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = (x if self.group_norm is None else self.group_norm(x)).flatten(2).transpose(1, 2)
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        bias = torch.cat([self.to_q.bias, self.to_k.bias, self.to_v.bias])
        qkv = F.linear(tokens, weight, bias).view(batch, height * width, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height * width, channels)
        return x + self.to_out[0](attended).transpose(1, 2).reshape(batch, channels, height, width)


class Downsample(nn.Module):
    """Strided convolution that halves height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """The residual blocks of one level, each followed by attention where the level has it."""

    def __init__(self, config: UNetConfig, widths: list[tuple[int, int]], time_dim: int, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(config, i, o, time_dim) for i, o in widths])
        self.attentions = nn.ModuleList([Attention(config, o) for _, o in widths]) if attends else None
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def block(self, i: int, x: Tensor, activated_time: Tensor) -> Tensor:
        """The i-th residual block with its attention."""
        x = self.resnets[i](x, activated_time)
        return x if self.attentions is None else self.attentions[i](x)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, config: UNetConfig, channels: int, time_dim: int) -> None:
        super().__init__()
        # diffusers leaves this norm out where the time embedding scales and shifts; the parameters have to match.
        self.attentions = nn.ModuleList([Attention(config, channels, norm=not config.scale_shift)])
        self.resnets = nn.ModuleList([ResnetBlock(config, channels, channels, time_dim) for _ in range(2)])

    def forward(self, x: Tensor, activated_time: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, activated_time)), activated_time)


class UNet(nn.Module):
    """Maps (x_t [B, C, H, W], table index [B], condition) to an output [B, out_channels, H, W].

    H and W must be multiples of `config.downsampling`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, time_dim = config.channels, 4 * config.channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_dim)
        if config.num_classes:
            self.class_embedding = nn.Embedding(config.num_classes + 1, time_dim)

        self.down_blocks = nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for level, out in enumerate(widths):
            pairs = [(width if i == 0 else out, out) for i in range(config.layers_per_block)]
            stage = Stage(config, pairs, time_dim, config.attention[level])
            skips += [out] * config.layers_per_block
            if level < len(widths) - 1:
                stage.downsamplers = nn.ModuleList([Downsample(out)])
                skips.append(out)
            self.down_blocks.append(stage)
            width = out

        self.mid_block = MidBlock(config, width, time_dim)

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            out = widths[level]
            pairs = []
            for _ in range(config.layers_per_block + 1):
                pairs.append((width + skips.pop(), out))
                width = out
            stage = Stage(config, pairs, time_dim, config.attention[level])
            if level > 0:
                stage.upsamplers = nn.ModuleList([Upsample(out)])
            self.up_blocks.append(stage)

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        """One forward pass.

        Args:
            x_t: noisy images [B, C, H, W].
            t: what the network was trained to see as time, [B]; the table index for a discrete schedule.
            cond: labels; None, or dropped ones, mean the null condition.
        """
        emb = self.time_embedding(timestep_embedding(t, self.config.channels[0]).to(x_t.dtype))
        if self.config.num_classes:
            emb = emb + self.class_embedding(self.class_index(cond, len(x_t), x_t.device)).to(emb.dtype)
        elif cond is not None and cond.label is not None:
            raise ValueError("labels were given to a network without classes: set num_classes, or pass no labels")
        emb = F.silu(emb)

        x = self.conv_in(x_t)
        skips = [x]
        for stage in cast("Iterable[Stage]", self.down_blocks):
            for i in range(len(stage.resnets)):
                x = stage.block(i, x, emb)
                skips.append(x)
            if stage.downsamplers is not None:
                x = stage.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, emb)
        for stage in cast("Iterable[Stage]", self.up_blocks):
            for i in range(len(stage.resnets)):
                x = stage.block(i, torch.cat([x, skips.pop()], dim=1), emb)
            if stage.upsamplers is not None:
                x = stage.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def class_index(self, cond: Conditioning | None, batch: int, device: torch.device) -> Tensor:
        """The embedding row of each sample, int64 [B]; dropped and absent labels take the null row.

        Raises:
            ValueError: a label outside [0, num_classes).
        """
        null = self.config.num_classes
        if cond is None or cond.label is None:
            return torch.full((batch,), null, dtype=torch.long, device=device)
        label = cond.label
        if cond.drop is not None:
            label = torch.where(cond.drop, null, label)
        return label
