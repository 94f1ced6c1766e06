"""The DDPM/ADM UNet (Ho et al. 2020, app. B; Dhariwal & Nichol 2021, sec. 3).

It has the parameters of diffusers' `UNet2DModel` under the same names, so that weights can be exchanged unchanged. A
class-conditional network has one more embedding row than classes: the last is its null condition. Features that
diffusers' network lacks (text, the clear context of inpainting) add parameters and change none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.conditioning import Conditioning
from ddpm.models.base import check_conditions, class_rows, extend_first_layer, text_vectors, with_context
from ddpm.models.blocks import (
    Attention,
    BlockConfig,
    CrossAttention,
    Downsample,
    MidBlock,
    ResnetBlock,
    Text,
    TimestepEmbedding,
    UNetStage,
    Upsample,
    timestep_embedding,
)
from ddpm.settings import setting

__all__ = ["UNet", "UNetConfig", "UNetEncoder", "timestep_embedding"]


@dataclass(frozen=True)
class UNetConfig(BlockConfig):
    """The shape of a `UNet`.

    The way down has one level per entry of `channels`, finest first, with `layers_per_block` residual blocks (one more
    on the way up); the resolution halves between levels. Text tokens are attended to wherever there is self-attention,
    the pooled embedding joins that of time. With `context_channels` the first convolution sees x_t, the mask of what is
    known, and the known pixels.

    Examples:
        >>> config = UNetConfig(channels=(8, 16), attention=(False, False), norm_groups=4, head_dim=None)
        >>> config.downsampling, config.build()(torch.zeros(2, 3, 8, 8), torch.zeros(2)).shape
        (2, torch.Size([2, 3, 8, 8]))
    """

    channels: tuple[int, ...] = setting((128, 256, 256, 256), "width of each resolution level, finest first", ge=1)
    layers_per_block: int = setting(2, "residual blocks per level on the way down", ge=1)
    attention: tuple[bool, ...] = setting(
        (False, True, False, False), "for each level, whether its residual blocks are followed by self-attention"
    )
    flip_sin_to_cos: bool = setting(
        True, "cosines before sines in the time embedding; false, as in the code of Ho et al.: sines first"
    )
    freq_shift: int = setting(
        0, "the k-th of n frequencies is 10000^(-k / (n - freq_shift)); 1, as in the code of Ho et al.", ge=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.channels) != len(self.attention) or not self.channels:
            raise ValueError(
                f"attention needs one entry per level: {len(self.channels)} widths, {len(self.attention)} entries"
            )
        if self.channels[0] % 2:
            raise ValueError(f"channels[0] = {self.channels[0]} is odd: half of it are sines of t, and half cosines")
        for level, (width, attends) in enumerate(zip(self.channels, self.attention, strict=True)):
            if width % self.norm_groups:
                raise ValueError(f"channels[{level}] = {width} is not divisible by norm_groups = {self.norm_groups}")
            if (attends or level == len(self.channels) - 1) and self.head_dim is not None and width % self.head_dim:
                raise ValueError(f"channels[{level}] = {width} is not divisible by head_dim = {self.head_dim}")
        if not self.freq_shift < self.channels[0] // 2:
            raise ValueError(f"freq_shift = {self.freq_shift} must be below half of channels[0] = {self.channels[0]}")

    @property
    def downsampling(self) -> int:
        """Height and width must be multiples of this."""
        return 2 ** (len(self.channels) - 1)

    @property
    def downsampling_reason(self) -> str:
        """See `NetworkConfig`."""
        return f"model.channels has {len(self.channels)} levels; use fewer levels"

    def build(self) -> UNet:
        """See `NetworkConfig`."""
        return UNet(self)

    def extend_for_inpainting(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `NetworkConfig`."""
        return extend_first_layer(self, weights, "conv_in.weight")


class UNetEncoder(nn.Module):
    """The way down: first convolution, time embedding, residual blocks of every level, middle block.

    Attributes:
        skip_widths: channels of the skip connections, in the order in which they are computed.
        fsdp_units: the classes of the modules that FSDP2 shards one by one.
    """

    fsdp_units: ClassVar[tuple[type[nn.Module], ...]] = (ResnetBlock, Attention, CrossAttention)

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, time_dim = config.channels, 4 * config.channels[0]
        self.conv_in = nn.Conv2d(config.input_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_dim)
        self.down_blocks = nn.ModuleList()
        self.skip_widths, width = [widths[0]], widths[0]
        for level, out in enumerate(widths):
            pairs = [(width if i == 0 else out, out) for i in range(config.layers_per_block)]
            stage = UNetStage(config, pairs, time_dim, config.attention[level])
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
        """Return the output of the middle block for an input of the first convolution, and the skips."""
        x = self.conv_in(x)
        skips = [x]
        for stage in cast("Iterable[UNetStage]", self.down_blocks):
            for i in range(len(stage.resnets)):
                x = stage.block(i, x, activated_time, text)
                skips.append(x)
            if stage.downsamplers is not None:
                x = stage.downsamplers[0](x)
                skips.append(x)
        return self.mid_block(x, activated_time, text), skips


class UNet(UNetEncoder):
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
            self.null_text = nn.Parameter(torch.empty(config.text_dim))
            nn.init.normal_(self.null_text)

        skips, width = list(self.skip_widths), widths[-1]
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            out = widths[level]
            pairs = []
            for _ in range(config.layers_per_block + 1):
                pairs.append((width + skips.pop(), out))
                width = out
            stage = UNetStage(config, pairs, time_dim, config.attention[level])
            if level > 0:
                stage.upsamplers = nn.ModuleList([Upsample(out)])
            self.up_blocks.append(stage)

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        """One forward pass.

        Args:
            x_t: noisy images [B, C, H, W].
            t: time as seen in training, [B]; the table index for a discrete schedule.
            cond: the condition; missing or dropped labels and texts are replaced by the null condition, and without
            mask and context no pixel is known.

        Raises:
            ValueError: a condition of a kind that this network does not have.
        """
        cond = Conditioning() if cond is None else cond
        check_conditions(self.config, cond)
        emb = self.embed_time(t, x_t.dtype)
        if self.config.num_classes:
            emb = emb + self.class_embedding(class_rows(self.config, cond, x_t)).to(emb.dtype)
        text: Text | None = None
        if self.config.text_dim:
            tokens, mask, pooled = text_vectors(cond, self.null_text, x_t)
            text = tokens, mask
            emb = emb + self.pooled_projection(pooled)
        emb = F.silu(emb)

        x, skips = self.encode(with_context(self.config, x_t, cond), emb, text)
        for stage in cast("Iterable[UNetStage]", self.up_blocks):
            for i in range(len(stage.resnets)):
                x = stage.block(i, torch.cat([x, skips.pop()], dim=1), emb, text)
            if stage.upsamplers is not None:
                x = stage.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
