"""The DDPM/ADM UNet (Ho et al. 2020, app. B; Dhariwal & Nichol 2021, sec. 3).

Parameter for parameter the network of diffusers' `UNet2DModel`, names included, so that weights pass between the two
unchanged. A class-conditional network has one embedding row more than classes: the last is its null condition.
What diffusers' network does not know (text, the clear context of inpainting) adds parameters and changes none.
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

Text = tuple[Tensor, Tensor]
"""Token embeddings [B, L, D] and which of them are there, bool [B, L]."""


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a `UNet`.

    Attributes:
        in_channels: channels of x_t.
        out_channels: channels of the output; 2 in_channels where the reverse variance is learned.
        channels: width of each resolution level, finest first; the resolution halves between levels.
        layers_per_block: residual blocks per level on the way down (one more on the way up).
        attention: for each level, whether its residual blocks are followed by self-attention.
        head_dim: channels per attention head; None for one head per block, as wide as the block.
        norm_groups: groups of every group norm; divides every width.
        scale_shift: time embedding scales and shifts the second norm (ADM) instead of being added (DDPM).
        dropout: in every residual block.
        num_classes: class labels, 0 for none.
        text_dim: width of text embeddings, 0 for none. Tokens are attended to wherever there is self-attention, the
            pooled embedding joins that of time.
        context_channels: channels of the clear context, 0 for none: the first convolution then sees x_t, the mask of
            what is known, and the known pixels (inpainting).
        flip_sin_to_cos: cosines before sines in the time embedding. False, as in the code of Ho et al.: sines first.
        freq_shift: the k-th of n frequencies is 10000^(-k / (n - freq_shift)). 1, as in the code of Ho et al.: the
            last is 1/10000.
        norm_eps: added to the variance in every group norm.
        downsample_padding: of the strided convolutions, on all sides. 0, as in the code of Ho et al.: one row at the
            bottom and one column at the right only (TensorFlow's SAME).
    """

    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 256, 256)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (False, True, False, False)
    head_dim: int | None = 64
    norm_groups: int = 32
    scale_shift: bool = False
    dropout: float = 0.0
    num_classes: int = 0
    text_dim: int = 0
    context_channels: int = 0
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    norm_eps: float = 1e-5
    downsample_padding: int = 1

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.attention) or not self.channels:
            raise ValueError(
                f"attention needs one entry per level: {len(self.channels)} widths, {len(self.attention)} entries"
            )
        for level, (width, attends) in enumerate(zip(self.channels, self.attention, strict=True)):
            if width % self.norm_groups:
                raise ValueError(f"channels[{level}] = {width} is not divisible by norm_groups = {self.norm_groups}")
            if (attends or level == len(self.channels) - 1) and self.head_dim is not None and width % self.head_dim:
                raise ValueError(f"channels[{level}] = {width} is not divisible by head_dim = {self.head_dim}")
        if self.layers_per_block < 1 or not 0 <= self.dropout < 1:
            raise ValueError("need layers_per_block >= 1 and 0 <= dropout < 1")
        if min(self.num_classes, self.text_dim, self.context_channels) < 0:
            raise ValueError("need num_classes, text_dim and context_channels >= 0")
        if not 0 <= self.freq_shift < self.channels[0] // 2:
            raise ValueError(
                f"freq_shift = {self.freq_shift} must be >= 0 and below half of channels[0] = {self.channels[0]}"
            )
        if self.norm_eps <= 0 or self.downsample_padding not in (0, 1):
            raise ValueError(
                f"need norm_eps > 0 and downsample_padding 0 or 1, got {self.norm_eps} and {self.downsample_padding}"
            )

    @property
    def downsampling(self) -> int:
        """Height and width must be multiples of this."""
        return 2 ** (len(self.channels) - 1)

    def heads(self, width: int) -> int:
        """Attention heads of a block of this width."""
        return 1 if self.head_dim is None else width // self.head_dim


def timestep_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: int = 0) -> Tensor:
    """Sinusoidal embedding of t [B], float32 [B, dim], frequencies 1 .. 1/10000 (DDPM, app. B); see `UNetConfig`."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps / (half - freq_shift))[None]
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=-1)


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
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, 2 * out_channels if config.scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, eps=config.norm_eps)
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
        self.heads = config.heads(channels)
        self.group_norm = nn.GroupNorm(config.norm_groups, channels, eps=config.norm_eps) if norm else None
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


class CrossAttention(nn.Module):
    """Multi-head attention from positions to text tokens, with a residual path that starts at zero.

    Starting at zero, text can be added to a trained network without disturbing it.
    """

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.heads = config.heads(channels)
        self.group_norm = nn.GroupNorm(config.norm_groups, channels, eps=config.norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(config.text_dim, 2 * channels)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q = self.to_q(tokens).view(batch, height * width, self.heads, -1).transpose(1, 2)
        k, v = self.to_kv(text).view(batch, text.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=text_mask[:, None, None, :])
        attended = attended.transpose(1, 2).reshape(batch, height * width, channels)
        return x + self.to_out(attended).transpose(1, 2).reshape(batch, channels, height, width)


class Downsample(nn.Module):
    """Strided convolution that halves height and width."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
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


class Stage(nn.Module):
    """The residual blocks of one level, each followed by attention where the level has it."""

    def __init__(self, config: UNetConfig, widths: list[tuple[int, int]], time_dim: int, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(config, i, o, time_dim) for i, o in widths])
        self.attentions = nn.ModuleList([Attention(config, o) for _, o in widths]) if attends else None
        reads = attends and config.text_dim > 0
        self.cross_attentions = nn.ModuleList([CrossAttention(config, o) for _, o in widths]) if reads else None
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def block(self, i: int, x: Tensor, activated_time: Tensor, text: Text | None) -> Tensor:
        """The i-th residual block with its attention."""
        x = self.resnets[i](x, activated_time)
        if self.attentions is not None:
            x = self.attentions[i](x)
        if self.cross_attentions is not None and text is not None:
            x = self.cross_attentions[i](x, *text)
        return x


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, config: UNetConfig, channels: int, time_dim: int) -> None:
        super().__init__()
        # diffusers leaves this norm out where the time embedding scales and shifts; the parameters have to match.
        self.attentions = nn.ModuleList([Attention(config, channels, norm=not config.scale_shift)])
        self.cross_attentions = nn.ModuleList([CrossAttention(config, channels)]) if config.text_dim else None
        self.resnets = nn.ModuleList([ResnetBlock(config, channels, channels, time_dim) for _ in range(2)])

    def forward(self, x: Tensor, activated_time: Tensor, text: Text | None) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, activated_time))
        if self.cross_attentions is not None and text is not None:
            x = self.cross_attentions[0](x, *text)
        return self.resnets[1](x, activated_time)


class Encoder(nn.Module):
    """The way down: first convolution, time embedding, residual blocks of every level, middle block.

    Attributes:
        skip_widths: channels of the tensors that the way up takes over, in the order of their making.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, time_dim = config.channels, 4 * config.channels[0]
        extra = 1 + config.context_channels if config.context_channels else 0
        self.conv_in = nn.Conv2d(config.in_channels + extra, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_dim)
        self.down_blocks = nn.ModuleList()
        self.skip_widths, width = [widths[0]], widths[0]
        for level, out in enumerate(widths):
            pairs = [(width if i == 0 else out, out) for i in range(config.layers_per_block)]
            stage = Stage(config, pairs, time_dim, config.attention[level])
            self.skip_widths += [out] * config.layers_per_block
            if level < len(widths) - 1:
                stage.downsamplers = nn.ModuleList([Downsample(config, out)])
                self.skip_widths.append(out)
            self.down_blocks.append(stage)
            width = out
        self.mid_block = MidBlock(config, width, time_dim)

    def embed_time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The embedding of t [B], [B, time_dim]."""
        config = self.config
        waves = timestep_embedding(
            t, config.channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        return self.time_embedding(waves.to(dtype))

    def encode(self, x: Tensor, activated_time: Tensor, text: Text | None = None) -> tuple[Tensor, list[Tensor]]:
        """What the middle block makes of the input of the first convolution, and the skips."""
        x = self.conv_in(x)
        skips = [x]
        for stage in cast("Iterable[Stage]", self.down_blocks):
            for i in range(len(stage.resnets)):
                x = stage.block(i, x, activated_time, text)
                skips.append(x)
            if stage.downsamplers is not None:
                x = stage.downsamplers[0](x)
                skips.append(x)
        return self.mid_block(x, activated_time, text), skips


class UNet(Encoder):
    """Maps (x_t [B, C, H, W], table index [B], condition) to an output [B, out_channels, H, W].

    H and W must be multiples of `config.downsampling`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths, time_dim = config.channels, 4 * config.channels[0]
        if config.num_classes:
            self.class_embedding = nn.Embedding(config.num_classes + 1, time_dim)
        if config.text_dim:
            self.pooled_projection = nn.Linear(config.text_dim, time_dim)
            self.null_text = nn.Parameter(torch.randn(config.text_dim))

        skips, width = list(self.skip_widths), widths[-1]
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

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        """One forward pass.

        Args:
            x_t: noisy images [B, C, H, W].
            t: what the network was trained to see as time, [B]; the table index for a discrete schedule.
            cond: the condition; what is missing or dropped of label and text is the null condition, and without mask
                and context nothing of the image is known.

        Raises:
            ValueError: a condition of a kind that this network does not have.
        """
        cond = Conditioning() if cond is None else cond
        self._check(cond)
        emb = self.embed_time(t, x_t.dtype)
        if self.config.num_classes:
            emb = emb + self.class_embedding(self.class_index(cond, len(x_t), x_t.device)).to(emb.dtype)
        text: Text | None = None
        if self.config.text_dim:
            tokens, mask, pooled = self.text_embedding(cond, len(x_t), x_t.dtype)
            text = tokens, mask
            emb = emb + self.pooled_projection(pooled)
        emb = F.silu(emb)

        x, skips = self.encode(self.with_context(x_t, cond), emb, text)
        for stage in cast("Iterable[Stage]", self.up_blocks):
            for i in range(len(stage.resnets)):
                x = stage.block(i, torch.cat([x, skips.pop()], dim=1), emb, text)
            if stage.upsamplers is not None:
                x = stage.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def class_index(self, cond: Conditioning, batch: int, device: torch.device) -> Tensor:
        """The embedding row of each sample, int64 [B]; dropped and absent labels take the null row."""
        null = self.config.num_classes
        if cond.label is None:
            return torch.full((batch,), null, dtype=torch.long, device=device)
        return cond.label if cond.drop is None else torch.where(cond.drop, null, cond.label)

    def text_embedding(self, cond: Conditioning, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens [B, L, D], mask [B, L], pooled [B, D]); dropped and absent text is the one null token.

        Every vector is brought to unit variance, because encoders differ in scale by far: a pooled one of unit length
        would hardly be heard.

        Raises:
            ValueError: tokens without their pooled embedding, or the reverse.
        """
        null = F.layer_norm(self.null_text, (self.config.text_dim,)).to(dtype)
        if cond.text is None and cond.pooled is None:
            return null.expand(batch, 1, -1), null.new_ones(batch, 1).bool(), null.expand(batch, -1)
        if cond.text is None or cond.pooled is None:
            raise ValueError("text needs both its tokens (text) and their pooled embedding (pooled)")
        tokens, pooled = (F.layer_norm(e, (self.config.text_dim,)).to(dtype) for e in (cond.text, cond.pooled))
        there = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        mask = there if cond.text_mask is None else cond.text_mask.bool()
        if cond.drop is not None:
            first = there.cumsum(1) == 1
            tokens = torch.where(cond.drop[:, None, None], null, tokens)
            mask = torch.where(cond.drop[:, None], first, mask)
            pooled = torch.where(cond.drop[:, None], null, pooled)
        return tokens, mask, pooled

    def with_context(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        """The input of the first convolution: x_t, and for an inpainting network mask and known pixels beside it.

        Raises:
            ValueError: a mask without its context, or the reverse.
        """
        channels = self.config.context_channels
        if channels == 0:
            return x_t
        if cond.mask is None and cond.context is None:
            batch, _, height, width = x_t.shape
            return torch.cat([x_t, x_t.new_zeros(batch, 1 + channels, height, width)], dim=1)
        if cond.mask is None or cond.context is None:
            raise ValueError("inpainting needs both the mask of what is known (mask) and the clear image (context)")
        mask = cond.mask.to(x_t.dtype)
        return torch.cat([x_t, mask, mask * cond.context.to(x_t.dtype)], dim=1)

    def _check(self, cond: Conditioning) -> None:
        config = self.config
        needs = {
            "label": ("num_classes", config.num_classes),
            "text": ("text_dim", config.text_dim),
            "pooled": ("text_dim", config.text_dim),
            "mask": ("context_channels", config.context_channels),
            "context": ("context_channels", config.context_channels),
        }
        for kind, (option, there) in needs.items():
            if getattr(cond, kind) is not None and not there:
                raise ValueError(f"{kind} was given to a network without: set {option}, or pass no {kind}")
