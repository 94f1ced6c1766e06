"""What every network is told by the data and the task, and what it has to offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm.settings import Settings, setting


@dataclass(frozen=True)
class NetworkConfig(Settings):
    """The shape of a network; every kind of network has a subclass with fields of its own.

    A network maps (x_t [B, C, H, W], table index [B], condition) to an output [B, out_channels, H, W]. What is missing
    or dropped of label and text is its own null condition. Its attribute `fsdp_units` names the classes of modules that
    FSDP2 shards one by one.
    """

    in_channels: int = setting(3, "channels of x_t", ge=1)
    out_channels: int = setting(3, "channels of the output; twice in_channels where the variance is learned", ge=1)
    num_classes: int = setting(0, "class labels; 0 for none", ge=0)
    text_dim: int = setting(0, "width of the dataset's text embeddings; 0: not conditioned on text", ge=0)
    context_channels: int = setting(0, "channels of the clear image that inpainting shows; 0 for none", ge=0)

    @property
    def downsampling(self) -> int:
        """Height and width must be multiples of this."""
        raise NotImplementedError

    @property
    def downsampling_reason(self) -> str:
        """Which of the settings `downsampling` follows from, and what to change, for messages."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """Return a network of this shape with fresh weights."""
        raise NotImplementedError

    def extend_for_inpainting(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a network without context for this one, which has `context_channels`.

        The extended network computes what the other did, whatever mask and context: fine-tuning starts out from the
        trained model (GLIDE, Nichol et al. 2021, "Image Inpainting"). Tensors that stay are shared, not copied.

        Args:
            weights: of a network of this shape but for `context_channels`, which are 0.

        Raises:
            ValueError: this configuration has no context, or they are not such weights, or already extended ones.
        """
        raise NotImplementedError


def extend_first_layer(config: NetworkConfig, weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the weights with inputs for mask and context behind those of x_t in the first convolution, all 0.

    Args:
        config: of the network with context.
        weights: of the one without.
        name: of the convolution's weight [width, C, K, K].

    Raises:
        ValueError: see `NetworkConfig.extend_for_inpainting`.
    """
    if config.context_channels < 1:
        raise ValueError(
            f"context_channels must be >= 1 (the image's channels) to inpaint, got {config.context_channels}"
        )
    if name not in weights:
        raise ValueError(f"not the weights of such a network: {name} missing; pass network.state_dict()")
    first = weights[name]
    if first.shape[1] != config.in_channels:
        raise ValueError(
            f"{name} takes {first.shape[1]} channels where the image has {config.in_channels}: these weights are "
            "extended already; load them into a network with context_channels as they are"
        )
    zeros = first.new_zeros(len(first), 1 + config.context_channels, *first.shape[2:])
    return {**weights, name: torch.cat([first, zeros], dim=1)}
