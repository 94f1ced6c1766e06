"""The common base of all networks: their settings, and how they take a condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.conditioning import Conditioning
from ddpm.settings import Settings, setting


@dataclass(frozen=True)
class NetworkConfig(Settings):
    """The shape of a network; each kind of network has a subclass with more fields.

    A network maps (x_t [B, C, H, W], table index [B], condition) to an output [B, out_channels, H, W]. It has its own
    null condition for labels and texts that are missing or dropped. Its attribute `fsdp_units` names the classes of
    modules that FSDP2 shards one by one.
    """

    in_channels: int = setting(3, "channels of x_t", ge=1)
    out_channels: int = setting(3, "channels of the output; twice in_channels where the variance is learned", ge=1)
    num_classes: int = setting(0, "class labels; 0 for none", ge=0)
    text_dim: int = setting(0, "width of the dataset's text embeddings; 0: not conditioned on text", ge=0)
    context_channels: int = setting(0, "channels of the clear image that inpainting shows; 0 for none", ge=0)

    @property
    def input_channels(self) -> int:
        """Channels of the first layer's input: x_t, and for inpainting the mask and the clear image."""
        return self.in_channels + (1 + self.context_channels if self.context_channels else 0)

    @property
    def downsampling(self) -> int:
        """Height and width must be multiples of this."""
        raise NotImplementedError

    @property
    def downsampling_reason(self) -> str:
        """The setting that determines `downsampling`, and what to change, for error messages."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """Return a network of this shape with fresh weights."""
        raise NotImplementedError

    def extend_for_inpainting(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a network without context for this one, which has `context_channels`.

        The extended network computes the same as the original for every mask and context: fine-tuning starts from the
        trained model (GLIDE, Nichol et al. 2021, "Image Inpainting"). Tensors that stay are shared, not copied.

        Args:
            weights: weights of a network of this shape with `context_channels` = 0.

        Raises:
            ValueError: this configuration has no context, or the weights are of another network or already extended.
        """
        raise NotImplementedError


def extend_first_layer(config: NetworkConfig, weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the weights with zero-initialized inputs for mask and context appended to those of x_t in the first layer.

    Args:
        config: configuration of the network with context.
        weights: weights of the network without.
        name: name of the first layer's weight, [width, C, K, K].

    Raises:
        ValueError: see `NetworkConfig.extend_for_inpainting`.

    Examples:
        >>> config = NetworkConfig(in_channels=3, context_channels=3)
        >>> extended = extend_first_layer(config, {"conv_in.weight": torch.ones(8, 3, 3, 3)}, "conv_in.weight")
        >>> extended["conv_in.weight"].sum((0, 2, 3)).tolist()  # mask and known image: 0
        [72.0, 72.0, 72.0, 0.0, 0.0, 0.0, 0.0]
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


def check_conditions(config: NetworkConfig, cond: Conditioning) -> None:
    """Refuse conditions of a kind that the network does not have.

    Raises:
        ValueError: there is one; the message names the setting that adds this kind to a network.

    Examples:
        >>> check_conditions(NetworkConfig(), Conditioning(label=torch.tensor([0])))
        Traceback (most recent call last):
            ...
        ValueError: label was given to a network without: set num_classes, or pass no label
    """
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


def class_rows(config: NetworkConfig, cond: Conditioning, x_t: Tensor) -> Tensor:
    """Return the row of each sample in a class embedding, int64 [B]; dropped and absent labels take the last, null.

    Examples:
        >>> cond = Conditioning(label=torch.tensor([3, 7, -1]), drop=torch.tensor([False, True, False]))
        >>> class_rows(NetworkConfig(num_classes=10), cond, torch.zeros(3, 3, 8, 8)).tolist()
        [3, 10, 10]
    """
    null = config.num_classes
    if cond.label is None:
        return torch.full((len(x_t),), null, dtype=torch.long, device=x_t.device)
    absent = cond.label < 0 if cond.drop is None else (cond.label < 0) | cond.drop
    return torch.where(absent, null, cond.label)


def text_vectors(cond: Conditioning, null_text: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens [B, L, D], mask [B, L], pooled [B, D]); dropped and absent text is the one null token.

    Every vector is scaled to unit variance, because the scales of encoders differ widely: a pooled vector of unit
    length would have hardly any effect.

    Args:
        null_text: the network's null token, [D].
        x_t: the input of the network, [B, C, H, W], whose dtype the vectors get.

    Raises:
        ValueError: tokens without their pooled embedding, or the reverse.

    Examples:
        >>> tokens, mask, pooled = text_vectors(Conditioning(), torch.arange(4.0), torch.zeros(2, 3, 8, 8))
        >>> tokens.shape, mask.tolist(), pooled.shape  # the null token alone
        (torch.Size([2, 1, 4]), [[True], [True]], torch.Size([2, 4]))
    """
    width, dtype, batch = null_text.shape, x_t.dtype, len(x_t)
    null = F.layer_norm(null_text, width).to(dtype)
    if cond.text is None and cond.pooled is None:
        return null.expand(batch, 1, -1), null.new_ones(batch, 1).bool(), null.expand(batch, -1)
    if cond.text is None or cond.pooled is None:
        raise ValueError("text needs both its tokens (text) and their pooled embedding (pooled)")
    tokens, pooled = (F.layer_norm(e, width).to(dtype) for e in (cond.text, cond.pooled))
    there = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    mask = there if cond.text_mask is None else cond.text_mask.bool()
    if cond.drop is not None:
        first = there.cumsum(1) == 1
        tokens = torch.where(cond.drop[:, None, None], null, tokens)
        mask = torch.where(cond.drop[:, None], first, mask)
        pooled = torch.where(cond.drop[:, None], null, pooled)
    return tokens, mask, pooled


def with_context(config: NetworkConfig, x_t: Tensor, cond: Conditioning) -> Tensor:
    """Return the input of the first layer: x_t, and for an inpainting network mask and known pixels beside it.

    Raises:
        ValueError: a mask without its context, or the reverse.

    Examples:
        >>> with_context(NetworkConfig(context_channels=3), torch.zeros(2, 3, 8, 8), Conditioning()).shape
        torch.Size([2, 7, 8, 8])
    """
    channels = config.context_channels
    if channels == 0:
        return x_t
    if cond.mask is None and cond.context is None:
        batch, _, height, width = x_t.shape
        return torch.cat([x_t, x_t.new_zeros(batch, 1 + channels, height, width)], dim=1)
    if cond.mask is None or cond.context is None:
        raise ValueError("inpainting needs both the mask of what is known (mask) and the clear image (context)")
    mask = cond.mask.to(x_t.dtype)
    return torch.cat([x_t, mask, mask * cond.context.to(x_t.dtype)], dim=1)
