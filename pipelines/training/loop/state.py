"""The state of a run that a checkpoint stores and restores: network, optimizer, averages, timestep history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ddpm.ema import EMA, PowerEMA
from ddpm.first_weights import build_on_meta
from ddpm.learned_weight import LearnedWeight
from ddpm.model import make_classifier
from ddpm.models.unet import UNetConfig
from ddpm.timesteps import TimestepSampler
from pipelines.config import Config, learned_weight, network_config, timestep_sampler
from pipelines.training.loop.collectives import broadcast, held_rows, local_part
from pipelines.training.loop.hardware import Precision, place_network, weight_dtype
from pipelines.training.loop.loss_scale import LossScale
from pipelines.training.loop.optimizer import make_optimizer
from pipelines.training.loop.parallel import apply_fsdp, gathered_dtype, wrap

RESIDUAL, LOSS_SCALE = "residual.", "loss_scale"
ADDED = (RESIDUAL, LOSS_SCALE)
"""Prefixes of tensors that were added later, and are 0 in checkpoints without them: what averages lack in float32, and
the state of a loss scale."""


@dataclass
class TrainingState:
    """The state of a run on one rank.

    Attributes:
        network: the bare network, whole or (FSDP2) this rank's part of it.
        wrapped: the module that a step calls: the network compiled, inside DDP, or (FSDP2) itself.
        optimizer: AdamW, RAdam or Muon.
        ema: the average of the weights that samples.
        power_ema: averages whose width is chosen after the training, where the configuration asks for them.
        timesteps: the timestep sampler, with its history where it learns from the losses.
        learned_weight: the weight of the loss that is learned, where the configuration asks for one.
        loss_scale: the factor of the loss, 1 unless the precision is fp16.
        length: images after which the run ends, as far as is known now: `config.images`, or what fits the seconds that
            it may train.
        gathered: dtype in which a sharded network gathers its weights; None for their own.
        images_seen: the ordinal of the next batch's first sample.
        optimizer_steps: the number of updates made.
        skipped: the number of updates left out because a loss or gradient was not finite.
        trained_s: seconds that the run has trained when it was saved; rank 0 knows them.
    """

    network: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    power_ema: PowerEMA | None
    timesteps: TimestepSampler
    learned_weight: LearnedWeight | None
    loss_scale: LossScale
    length: int
    gathered: torch.dtype | None = None
    images_seen: int = 0
    optimizer_steps: int = 0
    skipped: int = 0
    trained_s: float = 0.0

    @property
    def learns_from_losses(self) -> bool:
        """Whether something beside the network learns, from the loss of every sample of the global batch."""
        return self.timesteps.learns or self.learned_weight is not None

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the state by its name in a checkpoint: live ones, to read or overwrite in place."""
        found = {f"network.{name}": tensor.detach() for name, tensor in self.network.state_dict().items()}
        found |= {f"ema.{name}": tensor for name, tensor in self.ema.shadow.items()}
        found |= {f"{RESIDUAL}ema.{name}": tensor for name, tensor in self.ema.residual.items()}
        for name, parameter in self.network.named_parameters():
            entries = self.optimizer.state.get(parameter, {})
            found |= {f"optimizer.{key}.{name}": value for key, value in entries.items()}
        if self.power_ema is not None:
            for i, (shadow, low) in enumerate(zip(self.power_ema.shadows, self.power_ema.residuals, strict=True)):
                found |= {f"power.{i}.{name}": tensor for name, tensor in shadow.items()}
                found |= {f"{RESIDUAL}power.{i}.{name}": tensor for name, tensor in low.items()}
        if self.learned_weight is not None:
            found |= {f"learned_weight.{name}": tensor for name, tensor in self.learned_weight.state_dict().items()}
        found[LOSS_SCALE] = self.loss_scale.state
        return found | {f"timesteps.{name}": tensor for name, tensor in self.timesteps.state_dict().items()}

    def set_counters(self, images_seen: int, optimizer_steps: int, skipped: int) -> None:
        """Set the counters to those of a checkpoint."""
        self.images_seen, self.optimizer_steps, self.skipped = images_seen, optimizer_steps, skipped
        if self.power_ema is not None:
            self.power_ema.images_seen = images_seen

    def update_averages(self, batch_size: int) -> None:
        """Move the averages towards the weights, after a step over `batch_size` images."""
        self.ema.update(self.network, self.images_seen, batch_size)
        if self.power_ema is not None:
            self.power_ema.update(self.network, self.images_seen, batch_size)


def make_state(config: Config, device: torch.device, precision: Precision) -> TrainingState:
    """Return a fresh network, the same on any number of ranks, with its optimizer and averages.

    No rank ever holds more of a sharded network than its part.

    Args:
        precision: what forward and backward compute in.
    """
    optim = config.optim
    network, distributions = build_on_meta(lambda: make_network(config))
    network = network.to(weight_dtype(optim))
    gathered = gathered_dtype(config.cluster, precision)
    apply_fsdp(network, config.cluster, device, gathered)
    network = place_network(network.to_empty(device=device), config, device)
    for rows in held_rows(dict(network.named_parameters())):
        distributions[rows.name].fill(rows.values, config.seed, rows.name, rows.shape, rows.first)
    return TrainingState(
        network,
        wrap(network, config.cluster, device),
        make_optimizer(network, optim, torch.bfloat16 if precision == "bf16" and device.type == "cuda" else None),
        EMA(network, optim.ema_half_life),
        PowerEMA(network, optim.power_ema) if optim.power_ema else None,
        timestep_sampler(config),
        learned_weight(config),
        LossScale(enabled=precision == "fp16"),
        config.images,
        gathered,
    )


def make_network(config: Config) -> nn.Module:
    """Return a new network for the task of the configuration."""
    shape = network_config(config)
    if config.task == "denoiser":
        return shape.build()
    assert isinstance(shape, UNetConfig)  # checked with the configuration
    return make_classifier(shape, config.data.num_classes)


def load_weights(state: TrainingState, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Load weights into the network and all its averages; called by every rank.

    Args:
        weights: on rank 0, by the network's own names; ignored on the other ranks.
    """
    tensors = state.tensors()
    widths = 0 if state.power_ema is None else len(state.power_ema.shadows)
    for prefix in ("network.", "ema.", *(f"power.{i}." for i in range(widths))):
        targets = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        broadcast(weights, targets, device)


@contextmanager
def ema_weights(state: TrainingState) -> Iterator[nn.Module]:
    """Return the bare network in evaluation mode with the averaged weights, for as long as the context lasts.

    Where its weights are gathered in bf16, it computes in bf16.
    """
    network, device = state.network, next(state.network.parameters()).device
    live = [local_part(t.detach()) for t in network.state_dict().values()]
    kept = [t.clone() for t in live]
    with torch.no_grad():
        torch._foreach_copy_(live, [local_part(t) for t in state.ema.shadow.values()])
    network.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=state.gathered is not None):
            yield network
    finally:
        network.train()
        if isinstance(network, FSDPModule):
            network.reshard()  # the root keeps what its forward gathered, and would train on it at the next step
        with torch.no_grad():
            torch._foreach_copy_(live, kept)
