"""The diffusion transformer DiT with adaLN-zero blocks (Peebles & Xie 2023, sec. 3).

The image is cut into patches, a transformer goes over them, and the condition scales, shifts and gates every block.
Everything that a block adds is gated by 0 in a fresh network, which is thus the identity on its patches and has output
0. Text, which the paper's networks do not know, is attended to as in PixArt-alpha (Chen et al. 2024, sec. 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.conditioning import Conditioning
from ddpm.models.base import (
    NetworkConfig,
    check_conditions,
    class_rows,
    extend_first_layer,
    text_vectors,
    with_context,
)
from ddpm.models.blocks import Block, Text, TimestepEmbedding, timestep_embedding
from ddpm.settings import setting

TIME_FREQUENCIES = 256
"""Sines and cosines of the time embedding, at every width of network as in the authors' code."""
NORM_EPS = 1e-6
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines by which the channels of a head's queries and keys are rotated, [N, channels / 2] each."""


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """The shape of a `DiT`; the defaults are those of DiT-S/2 (table 1).

    Height and width may differ from image to image: positions are computed from them. Text tokens are attended to in
    every block, the pooled embedding joins that of time. With `context_channels` a patch has the pixels of x_t, of the
    mask of what is known, and of the known image.

    Examples:
        >>> network = DiTConfig(width=8, depth=1, heads=2, patch_size=4).build()
        >>> network(torch.zeros(2, 3, 8, 16), torch.zeros(2)).shape  # of any size that patches fill
        torch.Size([2, 3, 8, 16])
    """

    patch_size: int = setting(2, "height and width of a patch in pixels", ge=1)
    width: int = setting(384, "channels of every patch; a multiple of heads and of 4", ge=4)
    depth: int = setting(12, "number of transformer blocks", ge=1)
    heads: int = setting(6, "attention heads of a block", ge=1)
    mlp_ratio: float = setting(4.0, "hidden channels of a block's perceptron, as a multiple of width", ge=0.5)
    dropout: float = setting(
        0.0,
        "after attention and perceptron; 0 keeps the loss trace independent of the number of workers",
        ge=0,
        lt=1,
    )
    checkpointing: bool = setting(
        False, "compute the activations of a block again in the backward pass instead of keeping them: slower, smaller"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is not divisible by heads = {self.heads}")
        if self.width % 4:
            raise ValueError(
                f"width = {self.width} is not divisible by 4: positions are sines and cosines of row and column"
            )

    @property
    def downsampling(self) -> int:
        """Height and width must be multiples of this."""
        return self.patch_size

    @property
    def downsampling_reason(self) -> str:
        """See `NetworkConfig`."""
        return f"model.patch_size is {self.patch_size}; use smaller patches"

    def build(self) -> DiT:
        """See `NetworkConfig`."""
        return DiT(self)

    def extend_for_inpainting(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `NetworkConfig`."""
        return extend_first_layer(self, weights, "patch_embedding.weight")


def grid_angles(rows: int, columns: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each patch times each of so many frequencies, float32 [rows * columns, count].

    Patches go row by row. Frequencies are 1 .. 1/10000 (Vaswani et al. 2017, sec. 3.5, in two dimensions).

    Examples:
        >>> down, across = grid_angles(rows=2, columns=3, count=1, device=torch.device("cpu"))
        >>> down.flatten().tolist(), across.flatten().tolist()
        ([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 0.0, 1.0, 2.0])
    """
    frequencies = torch.exp(-math.log(10000) * torch.arange(count, dtype=torch.float32, device=device) / count)
    down, across = (torch.arange(n, dtype=torch.float32, device=device)[:, None] * frequencies for n in (rows, columns))
    return down.repeat_interleave(columns, 0), across.repeat(rows, 1)


def position_embedding(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Return sines and cosines of each patch's column, then of its row, float32 [rows * columns, width].

    Examples:
        >>> positions = position_embedding(rows=2, columns=3, width=8, device=torch.device("cpu"))
        >>> positions.shape, torch.equal(positions[0, :4], positions[3, :4])  # the same column
        (torch.Size([6, 8]), True)
    """
    down, across = grid_angles(rows, columns, width // 4, device)
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1)


def modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return normalised patches [B, N, W], scaled and shifted by the condition, [B, W] each (adaLN).

    Examples:
        >>> normed = torch.tensor([[[-1.0, 1.0]]])
        >>> modulated(normed, shift=torch.full((1, 2), 10.0), scale=torch.full((1, 2), 4.0)).tolist()
        [[[5.0, 15.0]]]
    """
    return normed * (1 + scale[:, None]) + shift[:, None]


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Return queries or keys [B, heads, N, D] with channel i and channel i + D / 2 of each patch rotated together.

    Examples:
        >>> quarter_turn = torch.zeros(1, 1), torch.ones(1, 1)
        >>> rotated(torch.tensor([[[[1.0, 2.0]]]]), quarter_turn).tolist()
        [[[[-2.0, 1.0]]]]
    """
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class PatchAttention(nn.Module):
    """Multi-head self-attention over patches.

    Args:
        width: channels of a patch.
        heads: attention heads.
        norm: makes what normalises the queries and keys of a head, from its number of channels.
    """

    def __init__(self, width: int, heads: int, norm: Callable[[int], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = norm(width // heads), norm(width // heads)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.norm_q(q), self.norm_k(k)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TextAttention(nn.Module):
    """Multi-head attention from patches to text tokens, whose output starts at zero."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_q = nn.Linear(config.width, config.width)
        self.to_kv = nn.Linear(config.text_dim, 2 * config.width)
        self.to_out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        tokens, mask = text
        q = self.to_q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(tokens).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.to_out(attended.transpose(1, 2).flatten(2))


class DiTBlock(Block):
    """Self-attention, attention to text where there is some, and a perceptron, on residual paths (fig. 3).

    It maps patches [B, N, W], the activated embedding of the condition [B, W], the text, and the rotation of positions,
    to patches.

    Args:
        config: settings of the network.
        attention: self-attention over patches.
        mlp: perceptron on each patch.
        norm: makes the norm before each of the three.
    """

    def __init__(
        self,
        config: DiTConfig,
        attention: PatchAttention,
        mlp: nn.Module,
        norm: Callable[[], nn.Module],
        dropout: float,
    ) -> None:
        super().__init__(config.checkpointing)
        self.modulation = nn.Linear(config.width, 6 * config.width)
        self.norm_1, self.attention = norm(), attention
        self.norm_text = norm() if config.text_dim else None
        self.text_attention = TextAttention(config) if config.text_dim else None
        self.norm_2, self.mlp = norm(), mlp
        self.dropout = nn.Dropout(dropout)

    def _forward(self, x: Tensor, emb: Tensor, text: Text | None, rotation: Rotation | None = None) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(emb).chunk(6, dim=1)
        attended = self.attention(modulated(self.norm_1(x), shift_1, scale_1), rotation)
        x = x + gate_1[:, None] * self.dropout(attended)
        if self.norm_text is not None and self.text_attention is not None and text is not None:
            x = x + self.dropout(self.text_attention(self.norm_text(x), text))
        return x + gate_2[:, None] * self.dropout(self.mlp(modulated(self.norm_2(x), shift_2, scale_2)))


class DiT(nn.Module):
    """Maps (x_t [B, C, H, W], table index [B], condition) to an output [B, out_channels, H, W].

    H and W must be multiples of `config.patch_size`. A class-conditional network has one embedding row more than
    classes: the last is its null condition.

    Attributes:
        fsdp_units: the classes of the modules that FSDP2 shards one by one.
    """

    fsdp_units: ClassVar[tuple[type[nn.Module], ...]] = (DiTBlock,)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        patch, width = config.patch_size, config.width
        self.patch_embedding = self._patch_embedding()
        self.time_embedding = TimestepEmbedding(TIME_FREQUENCIES, width)
        if config.num_classes:
            self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        if config.text_dim:
            self.pooled_projection = nn.Linear(config.text_dim, width)
            self.null_text = nn.Parameter(torch.empty(config.text_dim))
            nn.init.normal_(self.null_text)
        self.blocks = nn.ModuleList([self._block(number) for number in range(config.depth)])
        self.norm_out = self._norm()
        self.modulation_out = nn.Linear(width, 2 * width)
        self.linear_out = nn.Linear(width, patch * patch * config.out_channels)
        self._initialize()

    def _patch_embedding(self) -> nn.Module:
        config = self.config
        return nn.Conv2d(config.input_channels, config.width, config.patch_size, stride=config.patch_size)

    def _norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.width, eps=NORM_EPS, elementwise_affine=False)

    def _block(self, number: int) -> DiTBlock:
        config, hidden = self.config, int(self.config.width * self.config.mlp_ratio)
        mlp = nn.Sequential(
            nn.Linear(config.width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, config.width)
        )
        return DiTBlock(config, PatchAttention(config.width, config.heads), mlp, self._norm, config.dropout)

    def _initialize(self) -> None:
        """Set fresh weights as the authors' code does, zeros of adaLN-zero included."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.patch_embedding.modules():
            if isinstance(module, nn.Conv2d):  # a linear layer on patches
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (self.time_embedding.linear_1, self.time_embedding.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        if self.config.num_classes:
            nn.init.normal_(self.class_embedding.weight, std=0.02)
        blocks = list(cast("Iterable[DiTBlock]", self.blocks))
        of_text = [block.text_attention.to_out for block in blocks if block.text_attention is not None]
        for zero in [*(block.modulation for block in blocks), *of_text, self.modulation_out, self.linear_out]:
            nn.init.zeros_(zero.weight)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        """One forward pass.

        Args:
            x_t: noisy images [B, C, H, W].
            t: what the network was trained to see as time, [B]; the table index for a discrete schedule.
            cond: the condition; what is missing or dropped of label and text is the null condition, and without mask
                and context nothing of the image is known.

        Raises:
            ValueError: a condition of a kind that this network does not have, or an image that patches do not fill.
        """
        cond = Conditioning() if cond is None else cond
        check_conditions(self.config, cond)
        patch, (height, width) = self.config.patch_size, x_t.shape[2:]
        if height % patch or width % patch:
            raise ValueError(
                f"images of {height} x {width} pixels are not made of patches of patch_size = {patch}: "
                f"height and width must be multiples of {patch}"
            )
        rows, columns = height // patch, width // patch
        time = self.time_embedding(timestep_embedding(t, TIME_FREQUENCIES).to(x_t.dtype))
        given, text = self._given(x_t, cond)
        emb = F.silu(sum(given, start=time))
        # Patch after patch in memory, which what is added to them keeps: every norm would copy another order.
        x = self.patch_embedding(with_context(self.config, x_t, cond)).flatten(2).transpose(1, 2).contiguous()
        x = x + position_embedding(rows, columns, self.config.width, x_t.device).to(x_t.dtype)
        x = self._transformed(x, emb, given, text, (rows, columns))
        x = self.linear_out(modulated(self.norm_out(x), *self.modulation_out(emb).chunk(2, dim=1)))
        x = x.unflatten(1, (rows, columns)).unflatten(3, (patch, patch, -1))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, width)

    def _transformed(
        self, x: Tensor, emb: Tensor, given: list[Tensor], text: Text | None, grid: tuple[int, int]
    ) -> Tensor:
        """Return what the blocks make of the patches, [B, N, W].

        Args:
            x: patches of a grid of (rows, columns), row by row, [B, N, W].
            emb: activated embedding of time and condition, [B, W].
            given: embeddings of the class and of the pooled text, [B, W] each, of a network with them.
            text: tokens and their mask, for a network on text.
            grid: rows and columns of patches.
        """
        for block in self.blocks:
            x = block(x, emb, text)
        return x

    def _given(self, x_t: Tensor, cond: Conditioning) -> tuple[list[Tensor], Text | None]:
        """Return the embeddings of class and pooled text, [B, W] each, and the text's tokens and mask."""
        given: list[Tensor] = []
        text: Text | None = None
        if self.config.num_classes:
            given.append(self.class_embedding(class_rows(self.config, cond, x_t)).to(x_t.dtype))
        if self.config.text_dim:
            tokens, mask, pooled = text_vectors(cond, self.null_text, x_t)
            text = tokens, mask
            given.append(self.pooled_projection(pooled))
        return given, text
