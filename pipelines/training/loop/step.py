"""One optimizer step on a global batch, the same whoever computes which part of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddpm.schedule import NoiseSchedule
from pipelines.config import Config, OptimConfig
from pipelines.shards.read import Batch
from pipelines.training.loop.hardware import autocast
from pipelines.training.loop.parallel import accumulating, micro_batches, world
from pipelines.training.loop.state import Training
from pipelines.training.loop.task import losses, timesteps


@dataclass(frozen=True)
class Outcome:
    """What a step came to; the same on every rank.

    Attributes:
        loss: mean over the global batch.
        grad_norm: of the whole gradient, before clipping.
        updated: False where one of the two is not finite, and the weights stayed as they were.
        stop: whether any rank wishes to stop.
        checkpoint: whether any rank wishes a checkpoint.
        broken: whether any rank had no batch; nothing has changed then, and the batch is not seen.
    """

    loss: float
    grad_norm: float
    updated: bool
    stop: bool
    checkpoint: bool
    broken: bool = False


def step(
    training: Training,
    schedule: NoiseSchedule,
    batch: Batch,
    config: Config,
    device: torch.device,
    *,
    stop: bool = False,
    checkpoint: bool = False,
    broken: bool = False,
) -> Outcome:
    """One update from this rank's piece of the next global batch.

    Gradients are weighted by samples: a rank's loss is its sum over the global batch size, times the number of ranks
    because DDP and FSDP2 average over them. So ranks with unequal pieces give the gradient of the whole batch exactly.

    Args:
        stop, checkpoint: what this rank wishes; all ranks learn of it.
        broken: whether this rank's batch could not be read, and `batch` only stands in for it.
    """
    ours = _accumulate(training, schedule, batch, config, device)
    shared = torch.cat([torch.tensor([stop, checkpoint, broken], dtype=torch.float64, device=device), ours])
    if world() > 1:
        dist.all_reduce(shared)
    parameters = [p for p in training.network.parameters() if p.requires_grad]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    # The one place where the host waits for the device.
    stops, checkpoints, breaks, loss, grad_norm = torch.cat([shared[:4], norm.double()[None]]).tolist()
    if breaks:
        training.optimizer.zero_grad()
        return Outcome(loss, grad_norm, False, stop=True, checkpoint=True, broken=True)
    updated = math.isfinite(loss) and math.isfinite(grad_norm)
    if updated:
        if config.optim.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, config.optim.grad_clip, norm)
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, training.images_seen, config.images)
        training.optimizer.step()
        training.optimizer_steps += 1
        _remember(training, schedule, shared[4:], config)
    else:
        training.skipped += 1
    training.optimizer.zero_grad()
    training.images_seen += config.batch_size
    training.ema.update(training.network, training.images_seen, config.batch_size)
    if training.power is not None:
        training.power.update(training.network, training.images_seen, config.batch_size)
    return Outcome(loss, grad_norm, updated, stops > 0, checkpoints > 0)


def _accumulate(
    training: Training, schedule: NoiseSchedule, batch: Batch, config: Config, device: torch.device
) -> Tensor:
    """Add this rank's gradients up; its share of the mean loss, and, for a sampler that learns, of every loss.

    Returns:
        float64 [1] or [1 + batch_size]: shares that add up over the ranks; losses in the order of the ordinals.
    """
    learns = training.importance is not None
    shares = torch.zeros(1 + (config.batch_size if learns else 0), dtype=torch.float64, device=device)
    for part, weight, last in micro_batches(batch, config.batch_size, config.micro_batch_size):
        n = part.ordinals.to(device)
        t, weights = timesteps(n, config, schedule, training.importance)
        with accumulating(training.called, last):
            with autocast(config.optim, device):
                each = losses(training.called, schedule, part, t, config, device)
            loss = weight * (weights.to(each) * each).sum() / config.batch_size
            (loss * world()).backward()
        shares[0] += loss.detach()
        if learns and weight:
            shares[1 + n - training.images_seen] = each.detach().double()
    return shares


def _remember(training: Training, schedule: NoiseSchedule, each: Tensor, config: Config) -> None:
    """Tell a timestep sampler that learns what the batch's losses were, oldest sample first."""
    if training.importance is None:
        return
    # On the device where they were drawn: another one's cumulative sums may round another way.
    ordinals = torch.arange(config.batch_size, device=each.device) + training.images_seen
    t, _ = timesteps(ordinals, config, schedule, training.importance)
    training.importance.update(t, each)


def learning_rate(optim: OptimConfig, images_seen: int, images: int) -> float:
    """The rate as a function of images seen: linear warm-up, then the decay.

    "linear" and "cosine" end at 2 % of it with the run; "inverse_sqrt" falls from `decay_images` on (Karras et al.
    2024, eq. 67), whatever the run's length.
    """
    warmup = min(1.0, (images_seen + 1) / optim.warmup_images) if optim.warmup_images else 1.0
    left = max(0.0, 1 - images_seen / images)
    decay = {
        "constant": 1.0,
        "linear": max(left, 0.02),
        "cosine": max(0.5 - 0.5 * math.cos(math.pi * left), 0.02),
        "inverse_sqrt": max(images_seen / optim.decay_images, 1.0) ** -0.5,
    }[optim.decay]
    return optim.lr * warmup * decay


class SkipGuard:
    """Stops a run whose losses or gradients stay not finite, and says which samples they were of."""

    def __init__(self, optim: OptimConfig, batch_size: int) -> None:
        self.optim, self.batch_size = optim, batch_size
        self.in_row = 0

    def watch(self, outcome: Outcome, images_seen: int) -> str | None:
        """What to tell the user about a step that ended at `images_seen`, if anything.

        Raises:
            FloatingPointError: `optim.max_skipped` updates in a row were left out.
        """
        if outcome.updated:
            self.in_row = 0
            return None
        self.in_row += 1
        found = f"loss {outcome.loss:.4g}, gradient norm {outcome.grad_norm:.4g}"
        if self.in_row >= self.optim.max_skipped:
            first = images_seen - self.in_row * self.batch_size
            raise FloatingPointError(
                f"{self.in_row} updates in a row were not finite ({found}), on samples {first}..{images_seen - 1} of "
                "the stream: lower optim.lr, set optim.grad_clip, or use optim.precision=fp32"
            )
        first = images_seen - self.batch_size
        return f"update left out: {found} on samples {first}..{images_seen - 1} of the stream"
