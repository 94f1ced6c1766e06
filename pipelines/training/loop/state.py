"""What a training run is made of and a checkpoint brings back: network, optimizer, averages, timestep history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm.ema import EMA, PowerEMA
from ddpm.models.classifier import NoisyClassifier
from ddpm.models.unet import UNet
from ddpm.objectives import ImportanceTimesteps
from pipelines.config import Config, OptimConfig, unet_config
from pipelines.training.loop.hardware import place, weight_dtype
from pipelines.training.loop.parallel import local, shard, spread, trainable


@dataclass
class Training:
    """The state of a run on one rank.

    Attributes:
        network: the bare network, whole or (FSDP2) this rank's parts of it.
        called: what the training step calls, around the network.
        ema: the average that samples.
        power: averages whose width is chosen afterwards, where the configuration asks for them.
        importance: the history of a timestep sampler that learns from losses; the same on every rank.
        images_seen: the cursor of the stream.
        optimizer_steps: updates made.
        skipped: updates left out because a loss or gradient was not finite.
    """

    network: nn.Module
    called: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    power: PowerEMA | None
    importance: ImportanceTimesteps | None
    images_seen: int = 0
    optimizer_steps: int = 0
    skipped: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by its name in a checkpoint: live ones, to be read or overwritten in place."""
        found = {f"network.{name}": tensor.detach() for name, tensor in self.network.state_dict().items()}
        found |= {f"ema.{name}": tensor for name, tensor in self.ema.shadow.items()}
        for name, parameter in self.network.named_parameters():
            entries = self.optimizer.state.get(parameter, {})
            found |= {f"optimizer.{key}.{name}": value for key, value in entries.items()}
        if self.power is not None:
            for i, shadow in enumerate(self.power.shadows):
                found |= {f"power.{i}.{name}": tensor for name, tensor in shadow.items()}
        if self.importance is not None:
            found |= {"timesteps.losses": self.importance.losses, "timesteps.counts": self.importance.counts}
        return found


def make_training(config: Config, device: torch.device) -> Training:
    """A fresh network, the same on every rank, with its optimizer and averages."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = make_network(config)
    network = place(network.to(weight_dtype(config.optim)), config, device)
    shard(network, config.cluster, device)
    optim = config.optim
    return Training(
        network,
        trainable(network, config.cluster, device),
        make_optimizer(network, optim),
        EMA(network, optim.ema_half_life),
        PowerEMA(network, optim.power_ema) if optim.power_ema else None,
        ImportanceTimesteps(config.schedule.num_steps) if config.objective.timesteps == "importance" else None,
    )


def make_network(config: Config) -> nn.Module:
    """The network that the task trains."""
    if config.task == "denoiser":
        return UNet(unet_config(config))
    classifier = NoisyClassifier(unet_config(config), config.data.num_classes)
    classifier.log_temperature.requires_grad_(False)  # of text only
    return classifier


def make_optimizer(network: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW in one kernel, its state there from the start, so that a checkpoint of any step has the same tensors."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # by nothing, at rate 0: it makes the state
    optimizer.zero_grad()
    for entries in optimizer.state.values():
        for value in entries.values():
            local(value).zero_()
    return optimizer


def start_from(training: Training, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Begin with given weights (on rank 0), and with averages that are these weights."""
    state = training.tensors()
    widths = 0 if training.power is None else len(training.power.shadows)
    for prefix in ("network.", "ema.", *(f"power.{i}." for i in range(widths))):
        mine = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        spread(weights, mine, device)


@contextmanager
def averaged(training: Training) -> Iterator[nn.Module]:
    """The bare network, ready to sample, with its average's weights for as long as the context lasts."""
    network = training.network
    live = [local(t.detach()) for t in network.state_dict().values()]
    kept = [t.clone() for t in live]
    with torch.no_grad():
        torch._foreach_copy_(live, [local(t) for t in training.ema.shadow.values()])
    network.eval()
    try:
        yield network
    finally:
        network.train()
        with torch.no_grad():
            torch._foreach_copy_(live, kept)
