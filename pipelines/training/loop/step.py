"""One optimizer step on a global batch, the same whichever rank computes which part of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipelines.config import Config, OptimConfig
from pipelines.shards.read import Batch
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.hardware import autocast
from pipelines.training.loop.parallel import gradient_sync, micro_batches
from pipelines.training.loop.state import TrainingState
from pipelines.training.loop.task import batch_texts, losses


@dataclass(frozen=True)
class StepResult:
    """The result of one step; the same on every rank.

    Attributes:
        loss: mean over the global batch, before a learned weight.
        grad_norm: norm of the whole gradient before clipping.
        updated: False where loss or gradient norm is not finite, and the weights stayed as they were.
        stop: whether any rank asks to stop.
        checkpoint: whether any rank asks for a checkpoint.
        unreadable: whether any rank could not read its batch; the state is unchanged then, `images_seen` included.
        rescaled: whether the gradient overflowed fp16 and the loss scale was lowered for it.
    """

    loss: float
    grad_norm: float
    updated: bool
    stop: bool
    checkpoint: bool
    unreadable: bool = False
    rescaled: bool = False


def step(
    context: RunContext,
    state: TrainingState,
    batch: Batch,
    *,
    stop: bool = False,
    checkpoint: bool = False,
    unreadable: bool = False,
    length: int = 0,
) -> StepResult:
    """Update the state by this rank's piece of the next global batch, together with all other ranks.

    Gradients are weighted by samples: a rank's loss is its sum over the global batch size, times the number of ranks
    because DDP and FSDP2 average over them. So ranks with unequal pieces give the gradient of the whole batch exactly.

    Args:
        stop: whether this rank asks to stop.
        checkpoint: whether this rank asks for a checkpoint.
        unreadable: whether this rank's batch could not be read, and `batch` only stands in for it.
        length: what this rank says that the length of the run is from here on; 0 where it says nothing.
    """
    config, device = context.config, context.device

    # Forward and backward. `sums` are added up over the ranks: the mean loss, and each sample's loss where one learns.
    sums = torch.zeros(1 + (config.batch_size if state.learns_from_losses else 0), dtype=torch.float64, device=device)
    texts = batch_texts(context, batch)
    parts = micro_batches(batch, config.batch_size, context.world_size, config.micro_batch_size)
    for part, weight, last in parts:
        n = part.ordinals.to(device)
        t, weights = state.timesteps.sample(n)
        with gradient_sync(state.wrapped, last):
            with autocast(context.precision, device):
                each = losses(context, state.wrapped, part, t, texts)
            loss = mean = weight * (weights.to(each) * each).sum() / config.batch_size
            if state.learned_weight is not None:
                factors = weights * state.learned_weight.factors(t)
                loss = weight * (factors.to(each) * each).sum() / config.batch_size
            (loss * context.world_size * state.loss_scale.factor).backward()
        sums[0] += mean.detach()
        if state.learns_from_losses and weight:
            sums[1 + n - state.images_seen] = each.detach().double()

    # All-reduce flags and losses.
    flags = torch.tensor([stop, checkpoint, unreadable, length], dtype=torch.float64, device=device)
    sums = torch.cat([flags, sums])
    if context.world_size > 1:
        dist.all_reduce(sums)

    # Read loss and gradient norm: the one place where the host waits for the device.
    state.loss_scale.unscale(state.network.parameters())
    norm = _gradient_norm(state.network)
    stops, checkpoints, unreadables, new, mean_loss, grad_norm = torch.cat([sums[:5], norm.double()[None]]).tolist()
    state.length = int(new) or state.length
    if unreadables:
        state.optimizer.zero_grad()
        return StepResult(mean_loss, grad_norm, False, stop=True, checkpoint=True, unreadable=True)

    # Update weights and averages.
    finite = math.isfinite(mean_loss), math.isfinite(grad_norm)
    updated, rescaled = all(finite), state.loss_scale.update(*finite)
    if updated:
        _update_weights(context, state, norm, sums[5:])
    else:
        state.skipped += 1
    state.optimizer.zero_grad()
    state.images_seen += config.batch_size
    state.update_averages(config.batch_size)
    return StepResult(mean_loss, grad_norm, updated, stops > 0, checkpoints > 0, rescaled=rescaled)


def _gradient_norm(network: nn.Module) -> Tensor:
    """Return the norm of the whole gradient, a scalar, on every rank."""
    gradients = [p.grad for p in network.parameters() if p.requires_grad and p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _update_weights(context: RunContext, state: TrainingState, norm: Tensor, each: Tensor) -> None:
    """Clip, step the optimizer, and pass the losses to what learns from them.

    Args:
        norm: the norm of the gradient.
        each: the loss of every sample of the global batch in the order of the ordinals; empty where none learns.
    """
    config = context.config
    if config.optim.grad_clip is not None:
        parameters = [p for p in state.network.parameters() if p.requires_grad]
        nn.utils.clip_grads_with_norm_(parameters, config.optim.grad_clip, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.images_seen, state.length)
    state.optimizer.step()
    state.optimizer_steps += 1
    if state.learns_from_losses:
        # On the device where the timesteps were drawn: another one's cumulative sums may round another way.
        ordinals = torch.arange(config.batch_size, device=each.device) + state.images_seen
        if state.learned_weight is not None:  # before the sampler learns, and would draw others
            t, weights = state.timesteps.sample(ordinals)
            state.learned_weight.update(t, each, weights)
        state.timesteps.update(ordinals, each)


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


class SkipGuard:
    """Stops a run whose losses or gradients stay not finite, and names the samples they came from."""

    def __init__(self, optim: OptimConfig, batch_size: int) -> None:
        self.optim, self.batch_size = optim, batch_size
        self.in_row = 0

    def check(self, result: StepResult, images_seen: int) -> str | None:
        """Return a warning about a step that ended at `images_seen`; None where it updated the weights.

        A step that lowered the loss scale of fp16 is no reason for concern and not counted: that is how the scale is
        found.

        Raises:
            FloatingPointError: `optim.max_skipped` updates in a row were left out.
        """
        if result.updated:
            self.in_row = 0
            return None
        if result.rescaled:
            return None
        self.in_row += 1
        found = f"loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}"
        if self.in_row >= self.optim.max_skipped:
            first = images_seen - self.in_row * self.batch_size
            raise FloatingPointError(
                f"{self.in_row} updates in a row were not finite ({found}), on samples {first}..{images_seen - 1} of "
                "the stream: lower optim.lr, set optim.grad_clip, or use optim.precision=fp32"
            )
        first = images_seen - self.batch_size
        return f"update left out: {found} on samples {first}..{images_seen - 1} of the stream"
