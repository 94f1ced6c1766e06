"""The loss of each sample of a batch: noise, flips, masks and dropped conditions are functions of (seed, ordinal)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.conditioning import Conditioning
from ddpm.consistency import ConsistencyTuning
from ddpm.gaussian import q_sample
from ddpm.masks import inpainting_condition, random_mask
from ddpm.models.classifier import match_losses
from ddpm.noise import Purpose, uniform
from ddpm.noise_choice import nearest_noise
from ddpm.prediction import NetworkDenoiser
from pipelines.shards.read import Batch
from pipelines.training.loop.collectives import all_gather_pieces
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.hardware import to_device


def batch_texts(context: RunContext, batch: Batch) -> Tensor | None:
    """Return the texts of a global batch, to which a classifier of texts matches its images; None for other tasks.

    They are the same on any number of ranks but for their order, so that the loss is as well. Called by every rank.

    Args:
        batch: this rank's piece.

    Returns:
        Pooled embeddings [M, D] on the device.
    """
    config = context.config
    if config.task != "classifier" or not config.model.text_dim:
        return None
    return all_gather_pieces(_pooled(context, batch), config.batch_size)


def losses(context: RunContext, network: nn.Module, batch: Batch, t: Tensor, texts: Tensor | None = None) -> Tensor:
    """Return the loss of each sample, [B].

    Args:
        network: the module that the step calls.
        batch: B samples.
        t: their timesteps in 1..T, int64 [B]; consistency tuning draws levels of its own instead.
        texts: what `batch_texts` gave for the global batch that they are of.
    """
    config, device = context.config, context.device
    n = batch.ordinals.to(device)
    x_0 = to_device(batch.images, config, device)
    if config.data.flip:
        mirrored = uniform(config.seed, n, Purpose.FLIP)[:, 0] < 0.5
        x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
    eps = nearest_noise(x_0, config.seed, n, config.objective.noise_candidates).to(x_0)
    if config.task == "classifier":
        # Not `class_loss` or `text_loss`: they would call the classifier itself, without the DDP or FSDP2 around it.
        scores = network(q_sample(x_0, t, eps, context.schedule), (t - 1).float())
        if texts is not None:
            return match_losses(scores, _pooled(context, batch), texts)
        assert batch.labels is not None
        return F.cross_entropy(scores, batch.labels.to(device), reduction="none")
    cond, schedule, objective = conditions(context, batch, x_0), context.schedule, context.objective
    if isinstance(objective, ConsistencyTuning):
        # On the CPU: a level is found by a search, of which every step would wait for the device.
        pairs = objective.pairs(schedule, config.seed, batch.ordinals, config.images).to(device)
        denoiser = NetworkDenoiser(network, schedule, config.objective.prediction)
        return objective.losses(denoiser, schedule, x_0, eps, pairs, cond, context.teacher)
    return objective.losses(network, schedule, x_0, t, eps, cond)


def conditions(context: RunContext, batch: Batch, x_0: Tensor) -> Conditioning | None:
    """Return the condition of each sample; label and text are dropped together, known pixels never are.

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
    """Return the label and text of each sample, where the network is conditioned on them.

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
    _check_widths(model.text_dim, text, pooled)
    return Conditioning(label=label, text=text, text_mask=batch.text_mask, pooled=pooled).to(context.device)


def _pooled(context: RunContext, batch: Batch) -> Tensor:
    """Return the embeddings of the samples' texts [B, D] on the device."""
    assert batch.pooled is not None  # the reader was asked for them
    _check_widths(context.config.model.text_dim, batch.pooled)
    return batch.pooled.to(context.device)


def _check_widths(text_dim: int, *embeddings: Tensor) -> None:
    """Check the width of text embeddings; only those of the first sample were checked before the training.

    Raises:
        ValueError: a width differs from `text_dim`.
    """
    widths = {embedding.shape[-1] for embedding in embeddings}
    if widths != {text_dim}:
        raise ValueError(
            f"model.text_dim = {text_dim}, and the samples' text embeddings have {' and '.join(map(str, widths))} "
            "numbers: set model.text_dim to the encoder's width"
        )
