"""The pixel transformer JiT (Li & He 2025, "Back to Basics: Let Denoising Generative Models Denoise").

A DiT on large patches of pixels, which predicts the image: a patch of 16 x 16 pixels has 768 numbers, of which noise
fills all and an image few, so that a narrow layer may stand between the patch and the transformer. To the DiT it adds
what language models have since: RMSNorm, norms of queries and keys, rotary positions, SwiGLU, and tokens of the class
beside the patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.models.base import extend_first_layer
from ddpm.models.blocks import Text
from ddpm.models.dit import NORM_EPS, DiT, DiTBlock, DiTConfig, PatchAttention, Rotation, grid_angles
from ddpm.settings import setting


@dataclass(frozen=True)
class JiTConfig(DiTConfig):
    """The shape of a `JiT`; the defaults are those of JiT-B/16 (table 9).

    Examples:
        >>> network = JiTConfig(width=8, depth=2, heads=2, patch_size=4, bottleneck=4, class_tokens_from=1).build()
        >>> network(torch.zeros(2, 3, 8, 16), torch.zeros(2)).shape  # of any size that patches fill
        torch.Size([2, 3, 8, 16])
    """

    patch_size: int = setting(16, "height and width of a patch in pixels", ge=1)
    width: int = setting(768, "channels of every patch; a multiple of 4 * heads", ge=4)
    heads: int = setting(12, "attention heads of a block", ge=1)
    mlp_ratio: float = setting(
        4.0, "hidden channels of a block's perceptron, of which SwiGLU has 2/3, as a multiple of width", ge=0.5
    )
    dropout: float = setting(
        0.0,
        "after attention and perceptron of the middle half of the blocks; 0 keeps the loss trace independent of the "
        "number of workers",
        ge=0,
        lt=1,
    )
    bottleneck: int = setting(128, "channels between the pixels of a patch and the transformer", ge=1)
    class_tokens: int = setting(
        32, "tokens of the class, and of the pooled text, beside the patches; 0: they scale and shift alone", ge=0
    )
    class_tokens_from: int = setting(4, "first block with those tokens, counted from 0; less than depth", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width // self.heads % 4:
            raise ValueError(
                f"width = {self.width} / heads = {self.heads} is not divisible by 4: row and column rotate pairs "
                "of a head's channels each"
            )
        if self.class_tokens and self.class_tokens_from >= self.depth:
            raise ValueError(
                f"class_tokens_from = {self.class_tokens_from} is no block of depth = {self.depth}: "
                f"write 0 to {self.depth - 1}, or class_tokens = 0"
            )

    def build(self) -> JiT:
        """See `NetworkConfig`."""
        return JiT(self)

    def extend_for_inpainting(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `NetworkConfig`."""
        return extend_first_layer(self, weights, "patch_embedding.0.weight")


def rotary_positions(rows: int, columns: int, channels: int, unrotated: int, device: torch.device) -> Rotation:
    """Return the rotation of each patch's queries and keys by its row and its column, so that a product of a query and
    a key depends on the offset of their patches (Su et al. 2021, RoPE, eq. 16, in two dimensions).

    Half of a head's pairs of channels turn with the row and half with the column, at frequencies 1 .. 1/10000.

    Args:
        rows: rows of patches.
        columns: columns of patches.
        channels: channels of a head.
        unrotated: tokens before the patches that are at no place.
        device: where the result is.

    Examples:
        >>> cos, sin = rotary_positions(rows=2, columns=3, channels=8, unrotated=1, device=torch.device("cpu"))
        >>> cos.shape, sin[:2].any().item()  # the token and the first patch are not rotated
        (torch.Size([7, 4]), False)
    """
    angles = F.pad(torch.cat(grid_angles(rows, columns, channels // 4, device), dim=1), (0, 0, unrotated, 0))
    return angles.cos(), angles.sin()


class RMSNorm(nn.RMSNorm):
    """The norm by the root mean square of the channels (Zhang & Sennrich 2019), in the precision of what it norms.

    PyTorch's kernel wants weights of the same precision, and sums in float32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """A perceptron whose hidden channels are gated by SiLU of as many others (Shazeer 2020, eq. 6), with biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class JiT(DiT):
    """Maps (x_t [B, C, H, W], time [B], condition) to an output [B, out_channels, H, W], as `DiT` does.

    Attributes:
        class_tokens: what distinguishes the tokens of the class, [class_tokens, W].
    """

    config: JiTConfig

    def __init__(self, config: JiTConfig) -> None:
        super().__init__(config)
        if config.class_tokens and (config.num_classes or config.text_dim):
            self.class_tokens = nn.Parameter(torch.empty(config.class_tokens, config.width))
            nn.init.normal_(self.class_tokens, std=0.02)

    def _patch_embedding(self) -> nn.Module:
        config, patch = self.config, self.config.patch_size
        return nn.Sequential(
            nn.Conv2d(config.input_channels, config.bottleneck, patch, stride=patch, bias=False),
            nn.Conv2d(config.bottleneck, config.width, 1),
        )

    def _norm(self) -> nn.Module:
        return RMSNorm(self.config.width)

    def _block(self, number: int) -> DiTBlock:
        config, quarter = self.config, self.config.depth // 4
        attention = PatchAttention(config.width, config.heads, RMSNorm)
        mlp = SwiGLU(config.width, int(config.width * config.mlp_ratio) * 2 // 3)
        dropout = config.dropout if quarter <= number < 3 * quarter else 0.0
        return DiTBlock(config, attention, mlp, self._norm, dropout)

    def _transformed(
        self, x: Tensor, emb: Tensor, given: list[Tensor], text: Text | None, grid: tuple[int, int]
    ) -> Tensor:
        config, patches = self.config, x.shape[1]
        count = config.class_tokens if given else 0
        cos, sin = rotary_positions(*grid, config.width // config.heads, count, x.device)
        rotation = cos[count:], sin[count:]
        for number, block in enumerate(self.blocks):
            if count and number == config.class_tokens_from:
                tokens = torch.stack(given).sum(0)[:, None] + self.class_tokens.to(x.dtype)
                x, rotation = torch.cat([tokens, x], dim=1), (cos, sin)
            x = block(x, emb, text, rotation)
        return x[:, -patches:]
