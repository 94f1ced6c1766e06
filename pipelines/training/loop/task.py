"""The loss of each sample of a batch: noise, flips, masks and dropped conditions are functions of (seed, ordinal)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.conditioning import Conditioning
from ddpm.gaussian import q_sample
from ddpm.masks import inpainting_condition, random_mask
from ddpm.noise import Purpose, normal, uniform
from pipelines.shards.read import Batch
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.hardware import to_device


def losses(context: RunContext, network: nn.Module, batch: Batch, t: Tensor) -> Tensor:
    """Return the loss of each sample, [B].

    Args:
        network: the module that the step calls.
        batch: B samples.
        t: their timesteps in 1..T, int64 [B].
    """
    config, device = context.config, context.device
    n = batch.ordinals.to(device)
    x_0 = to_device(batch.images, config, device)
    if config.data.flip:
        mirrored = uniform(config.seed, n, Purpose.FLIP)[:, 0] < 0.5
        x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
    eps = normal(config.seed, n, Purpose.NOISE, tuple(x_0.shape[1:])).to(x_0)
    if config.task == "classifier":
        assert batch.labels is not None
        # Not `class_loss`: it would call the classifier itself, without the DDP or FSDP2 around it.
        scores = network(q_sample(x_0, t, eps, context.schedule), (t - 1).float())
        return F.cross_entropy(scores, batch.labels.to(device), reduction="none")
    return context.objective.losses(network, context.schedule, x_0, t, eps, conditions(context, batch, x_0))


def conditions(context: RunContext, batch: Batch, x_0: Tensor) -> Conditioning | None:
    """Return what the network is conditioned on; label and text are dropped together, known pixels never are.

    Args:
        x_0: the images of the batch as they are trained on, [B, C, H, W].
    """
    config, n = context.config, batch.ordinals.to(context.device)
    cond = label_and_text(context, batch)
    if cond is not None:
        cond = cond.dropped(uniform(config.seed, n, Purpose.LABEL_DROP)[:, 0] < config.objective.label_drop)
    if config.model.inpainting:
        mask = random_mask(config.seed, n, (x_0.shape[2], x_0.shape[3]), config.objective.mask)
        cond = inpainting_condition(x_0, mask, cond)
    return cond


def label_and_text(context: RunContext, batch: Batch) -> Conditioning | None:
    """Return the label and text of each sample, as far as the network is conditioned on them.

    Raises:
        ValueError: the text embeddings are of another width than the network's.
    """
    model = context.config.model
    if not model.class_conditional and model.text_dim == 0:
        return None
    label = batch.labels if model.class_conditional else None
    if model.text_dim == 0:
        return Conditioning(label=label).to(context.device)
    text, pooled = batch.text, batch.pooled
    assert text is not None and pooled is not None  # noqa: PT018 - the reader was asked for them
    if {text.shape[-1], pooled.shape[-1]} != {model.text_dim}:
        raise ValueError(
            f"model.text_dim = {model.text_dim}, and the samples' text embeddings have {text.shape[-1]} (tokens) and "
            f"{pooled.shape[-1]} (pooled) numbers: set model.text_dim to the encoder's width"
        )
    return Conditioning(label=label, text=text, text_mask=batch.text_mask, pooled=pooled).to(context.device)
