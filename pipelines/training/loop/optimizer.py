"""The optimizer of a run, and its learning rate by images seen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ddpm.muon import Muon, hidden_matrices
from pipelines.config import Config, OptimConfig
from pipelines.training.loop.collectives import local_part, on_whole


def make_optimizer(
    network: nn.Module, optim: OptimConfig, muon_dtype: torch.dtype | None = None
) -> torch.optim.Optimizer:
    """Return an optimizer that has its state already, so that checkpoints of all steps have the same tensors.

    It is a fused AdamW, or RAdam with AdamW's weight decay, or Muon with AdamW for what is no hidden matrix.

    Args:
        muon_dtype: what Muon makes matrices orthogonal in; None: the dtype of the weights.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    settings: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "weight_decay": optim.weight_decay}
    optimizer: torch.optim.Optimizer
    if optim.kind == "radam":
        optimizer = torch.optim.RAdam(parameters, **settings, decoupled_weight_decay=True)
    elif optim.kind == "muon":
        matrices = hidden_matrices(network)
        ids = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in parameters if id(parameter) not in ids]
        optimizer = Muon(
            matrices, others, **settings, momentum=optim.muon_momentum, dtype=muon_dtype, on_whole=on_whole
        )
    else:
        optimizer = torch.optim.AdamW(parameters, **settings, fused=True)
    # A step with zero gradients at rate 0 creates the state and changes no weight.
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for entries in optimizer.state.values():
        for value in entries.values():
            local_part(value).zero_()
    return optimizer


def learning_rate(config: Config, images_seen: int, length: int | None = None) -> float:
    """Return the learning rate as a function of images seen: scaled by the batch, linear warm-up, then the decay.

    "linear" and "cosine" end at 2 % of it with the run; "inverse_sqrt" falls from `decay_images` on (Karras et al.
    2024, eq. 67), whatever the run's length.

    Args:
        length: of the run in images; None: as configured.
    """
    optim, images = config.optim, length or config.images
    warmup = min(1.0, (images_seen + 1) / optim.warmup_images) if optim.warmup_images else 1.0
    left = max(0.0, 1 - images_seen / images)
    decay = {
        "constant": 1.0,
        "linear": max(left, 0.02),
        "cosine": max(0.5 - 0.5 * math.cos(math.pi * left), 0.02),
        "inverse_sqrt": max(images_seen / optim.decay_images, 1.0) ** -0.5,
    }[optim.decay]
    return peak_learning_rate(config) * warmup * decay


def peak_learning_rate(config: Config) -> float:
    """Return the learning rate after the warm-up and before any decay, for the batch size of the run.

    "linear" keeps the sum of the updates over an epoch (Goyal et al. 2017, sec. 2.1, for SGD), "sqrt" what noise in the
    gradient adds to it (Malladi et al. 2022, for Adam).
    """
    if config.optim.lr_scaling is None:
        return config.optim.lr
    rule, reference = config.optim.lr_scaling
    ratio = config.batch_size / reference
    return config.optim.lr * (ratio if rule == "linear" else math.sqrt(ratio))
