"""What a step asks of the network: timesteps, conditions and losses, all functions of (seed, ordinal)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.gaussian import q_sample
from ddpm.inpainting import inpainting_condition, random_mask
from ddpm.noise import Purpose, normal, uniform
from ddpm.objectives import ImportanceTimesteps, stratified_timesteps, uniform_timesteps
from ddpm.prediction import Conditioning
from ddpm.schedule import NoiseSchedule
from pipelines.config import Config, training_objective
from pipelines.shards.read import Batch
from pipelines.training.loop.hardware import to_device


def timesteps(
    ordinals: Tensor, config: Config, schedule: NoiseSchedule, importance: ImportanceTimesteps | None
) -> tuple[Tensor, Tensor]:
    """(t int64 [B], weight of its loss float64 [B])."""
    ones = torch.ones_like(ordinals, dtype=torch.float64)
    if importance is not None:
        return importance.sample(config.seed, ordinals)
    if config.objective.timesteps == "stratified":
        return stratified_timesteps(config.seed, ordinals, schedule.num_steps, config.batch_size), ones
    return uniform_timesteps(config.seed, ordinals, schedule.num_steps), ones


def losses(
    called: nn.Module, schedule: NoiseSchedule, batch: Batch, t: Tensor, config: Config, device: torch.device
) -> Tensor:
    """Loss of each sample, [B]."""
    n = batch.ordinals.to(device)
    x_0 = to_device(batch.images, config, device)
    if config.data.flip:
        mirrored = uniform(config.seed, n, Purpose.FLIP)[:, 0] < 0.5
        x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
    eps = normal(config.seed, n, Purpose.NOISE, tuple(x_0.shape[1:])).to(x_0)
    if config.task == "classifier":
        assert batch.labels is not None
        # Not `class_loss`, whose call of the classifier would go around what wraps it here.
        scores = called(q_sample(x_0, t, eps, schedule), (t - 1).float())
        return F.cross_entropy(scores, batch.labels.to(device), reduction="none")
    cond = conditions(batch, x_0, config, device)
    return training_objective(config).losses(called, schedule, x_0, t, eps, cond)


def conditions(batch: Batch, x_0: Tensor, config: Config, device: torch.device) -> Conditioning | None:
    """What the network is told about each sample; label and text are dropped together, known pixels never."""
    model, n = config.model, batch.ordinals.to(device)
    told = describe(batch, config, device)
    cond = None
    if told is not None:
        cond = told.dropped(uniform(config.seed, n, Purpose.LABEL_DROP)[:, 0] < config.objective.label_drop)
    if model.inpainting:
        mask = random_mask(config.seed, n, (x_0.shape[2], x_0.shape[3]), config.objective.mask)
        cond = inpainting_condition(x_0, mask, cond)
    return cond


def describe(batch: Batch, config: Config, device: torch.device) -> Conditioning | None:
    """Label and text of each sample, as far as the network takes them.

    Raises:
        ValueError: text embeddings of another width than the network's.
    """
    model = config.model
    if not model.class_conditional and model.text_dim == 0:
        return None
    label = batch.labels if model.class_conditional else None
    if model.text_dim == 0:
        return Conditioning(label=label).to(device)
    text, pooled = batch.text, batch.pooled
    assert text is not None and pooled is not None  # noqa: PT018 - the reader was asked for them
    if {text.shape[-1], pooled.shape[-1]} != {model.text_dim}:
        raise ValueError(
            f"model.text_dim = {model.text_dim}, and the samples' text embeddings have {text.shape[-1]} (tokens) and "
            f"{pooled.shape[-1]} (pooled) numbers: set model.text_dim to the encoder's width"
        )
    return Conditioning(label=label, text=text, text_mask=batch.text_mask, pooled=pooled).to(device)
