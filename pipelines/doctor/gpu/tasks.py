"""What one device or one rank computes in a selftest, by the training's own step on made-up images."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.config import Config, compose
from pipelines.doctor.gpu.ranks import Place
from pipelines.shards.read import default_cache_dir
from pipelines.training.loop import hardware
from pipelines.training.loop.collectives import local_part
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.losses import losses
from pipelines.training.loop.progress import Clock, StepResult
from pipelines.training.loop.speed import made_up, made_up_job
from pipelines.training.loop.state import load_weights, make_network, make_state
from pipelines.training.loop.train import step
from pipelines.training.loop.watchdog import Watchdog

NETWORKS = {
    "unet": ("model=unet_small", "model.channels=[32,64]", "model.attention=[false,true]", "model.layers_per_block=1"),
    "dit": ("model=dit_small", "model.width=64", "model.depth=3", "model.heads=2"),
    "jit": (
        *("model=jit_base", "model.patch_size=4", "model.width=64", "model.depth=3", "model.heads=2"),
        *("model.bottleneck=16", "model.class_tokens_from=1", "schedule=flow", "objective=jit"),
    ),
}
"""Overrides of each kind of network, small enough for a CPU to compute the same in a second."""
ROUNDS = 5
"""Repetitions of a transfer, of which the fastest counts: other programs only make it slower."""
STALLED_S = 20.0
"""Seconds without progress after which the watchdog of a rank ends it."""
MIB, GIB = 2**20, 2**30


def made_up_config(network: str, *overrides: str) -> Config:
    """Return the configuration of a made-up training whose losses depend on nothing but the arithmetic."""
    plain = ["storage=file", "storage.root=file:///nowhere", "data.lanes=1", "data.image_size=16", "data.channels=3"]
    plain += ["optim.precision=fp32", "optim.warmup_images=0", "optim.lr=1e-3", "batch_size=8"]
    return compose([*plain, *NETWORKS[network], *overrides])


class MadeUpTraining:
    """A training of made-up images on one rank, which stores nothing.

    Its first weights are those of a new network with some noise added: the layers that begin at zero would hide all
    others from the gradient.
    """

    def __init__(self, config: Config, device: torch.device, rank: int = 0, count: int = 1) -> None:
        hardware.configure_process(config, default_cache_dir().parent)
        self.context = RunContext.of(made_up_job(config), rank=rank, world_size=count, device=device)
        self.state = make_state(self.context.config, device, self.context.precision)
        load_weights(self.state, _noisy_weights(config) if rank == 0 else {}, device)
        size = config.batch_size
        self.batch = made_up(config)[rank * size // count : (rank + 1) * size // count]

    def step(self) -> StepResult:
        """Make one step, by the code of every training."""
        batch = replace(self.batch, ordinals=self.batch.ordinals + self.state.images_seen)
        return step(self.context, self.state, batch)

    def parts(self) -> dict[str, Tensor]:
        """Return what this rank holds of every tensor of the state: live ones, to read or overwrite in place."""
        return {name: local_part(tensor) for name, tensor in self.state.tensors().items()}

    def save(self, folder: Path) -> None:
        """Write what this rank holds into a file of its own."""
        parts = {name: part.detach().cpu().contiguous() for name, part in self.parts().items()}
        save_file(parts, folder / f"{self.context.rank}.safetensors")

    @torch.no_grad()
    def load(self, folder: Path, images_seen: int) -> None:
        """Take what this rank saved, of as many ranks as now."""
        saved = load_file(folder / f"{self.context.rank}.safetensors")
        for name, part in self.parts().items():
            part.copy_(saved[name])
        self.state.set_counters(images_seen, images_seen // self.context.config.batch_size, 0)


@dataclass(frozen=True)
class Trace:
    """Some steps of a training.

    Attributes:
        losses: mean loss of each step.
        norms: norm of each step's gradient.
        moments: what the rank holds of the optimizer's first moments after the last step, which are weighted sums of
            the gradients of all steps.
    """

    losses: list[float]
    norms: list[float]
    moments: Mapping[str, Tensor]


def train(place: Place, config: Config, steps: int) -> Trace:
    """Train some steps as one rank."""
    return _trace(MadeUpTraining(config, place.device, place.rank, place.count), steps)


def train_and_die(place: Place, config: Config, steps: int, folder: Path) -> None:
    """Train some steps, save, and train on; the last rank is killed between forward and backward of the next step."""
    training, clock = MadeUpTraining(config, place.device, place.rank, place.count), Clock(time.monotonic())
    with Watchdog(clock, STALLED_S):
        for _ in range(steps):
            training.step()
            clock.switch("step")
        training.save(folder)
        clock.switch("step")
        dist.barrier()  # all have saved
        if place.rank == place.count - 1:
            training.state.network.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        training.step()


def resume(place: Place, config: Config, saved_after: int, steps: int, folder: Path) -> Trace:
    """Go on from a saved state."""
    training = MadeUpTraining(config, place.device, place.rank, place.count)
    training.load(folder, saved_after * config.batch_size)
    return _trace(training, steps)


def _trace(training: MadeUpTraining, steps: int) -> Trace:
    results = [training.step() for _ in range(steps)]
    moments = {name: part.cpu() for name, part in training.parts().items() if ".exp_avg." in name}
    return Trace([r.loss for r in results], [r.grad_norm for r in results], moments)


@dataclass(frozen=True)
class ForwardBackward:
    """Forward and backward of one batch.

    Attributes:
        output: of the network, float32 [B, C, H, W] on the CPU.
        loss: mean over the batch.
        gradient: of the loss with respect to all parameters, float32 [P] on the CPU.
    """

    output: Tensor
    loss: float
    gradient: Tensor


def evaluate(config: Config, device: torch.device) -> ForwardBackward:
    """Return output, loss and gradient of the first step of a made-up training, in its precision."""
    training, outputs = MadeUpTraining(config, device), []

    def recorded(*arguments: Any) -> Tensor:
        outputs.append(training.state.wrapped(*arguments))
        return outputs[-1]

    t, _ = training.state.timesteps.sample(training.batch.ordinals.to(device))
    with hardware.autocast(training.context.precision, device):
        loss = losses(training.context, cast("nn.Module", recorded), training.batch, t).mean()
    loss.backward()
    gradients = [p.grad for p in training.state.network.parameters() if p.grad is not None]
    whole = torch.cat([gradient.detach().float().cpu().flatten() for gradient in gradients])
    return ForwardBackward(outputs[0].detach().float().cpu(), loss.item(), whole)


def _noisy_weights(config: Config) -> dict[str, Tensor]:
    """Return the weights of a new network with noise of 2 % of a usual activation added to every parameter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = make_network(config)
        parameters = {name for name, _ in network.named_parameters()}
        return {
            name: tensor + 0.02 * torch.randn(tensor.shape) if name in parameters else tensor
            for name, tensor in network.state_dict().items()
        }


# --- memory -------------------------------------------------------------------------------------------------


def peak_memory(config: Config, device: torch.device, steps: int = 3) -> int:
    """Return the most bytes that tensors took on a GPU during some steps."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    training = MadeUpTraining(config, device)
    for _ in range(steps):
        training.step()
    return torch.cuda.max_memory_allocated(device) - before


# --- links --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Links:
    """Speed and correctness of transfers between the ranks, in GB/s.

    Attributes:
        all_reduce: by bytes of the tensor: what each link carries, 2 (n - 1) / n times the size over the time.
        all_gather: by bytes of the result: (n - 1) / n times the size over the time.
        pairs: in each direction while two ranks exchange, and the others are idle.
        wrong: transfers whose result was not what was sent.
    """

    all_reduce: dict[int, float]
    all_gather: dict[int, float]
    pairs: dict[tuple[int, int], float]
    wrong: list[str]


def measure_links(place: Place, sizes: list[int]) -> Links:
    """Measure all-reduce and all-gather by size, and the exchange of the largest size between any two ranks."""
    count, wrong = place.count, list[str]()
    reduced: dict[int, float] = {}
    gathered: dict[int, float] = {}
    for size in sizes:
        summed = torch.empty(size // 4, device=place.device)
        seconds = _fastest(place, partial(_all_reduce, summed, place.rank + 1))
        reduced[size] = 2 * (count - 1) / count * size / seconds / 1e9
        if not bool((summed == count * (count + 1) / 2).all()):
            wrong.append(f"all-reduce of {size // MIB} MiB")
        mine = torch.full((size // 4 // count,), float(place.rank), device=place.device)
        parts = [torch.empty_like(mine) for _ in range(count)]
        seconds = _fastest(place, partial(dist.all_gather, parts, mine))
        gathered[size] = (count - 1) / count * size / seconds / 1e9
        if not all(bool((part == rank).all()) for rank, part in enumerate(parts)):
            wrong.append(f"all-gather of {size // MIB} MiB")
    pairs: dict[tuple[int, int], float] = {}
    for pair in [(i, j) for i in range(count) for j in range(i + 1, count)]:
        dist.barrier()
        if place.rank in pair:
            other = sum(pair) - place.rank
            seconds, right = _exchange(place, other, max(sizes))
            pairs[pair] = max(sizes) / seconds / 1e9
            if not right:
                wrong.append(f"transfer from rank {other} to rank {place.rank}")
    dist.barrier()
    return Links(reduced, gathered, pairs, wrong)


def _all_reduce(summed: Tensor, value: float) -> None:
    """Fill a tensor with this rank's value, and add up those of all ranks; the sums of a repetition would overflow."""
    dist.all_reduce(summed.fill_(value))


def _exchange(place: Place, other: int, size: int) -> tuple[float, bool]:
    """Return the seconds of an exchange with another rank, and whether what it sent arrived."""
    mine = torch.full((size // 4,), float(place.rank), device=place.device)
    theirs = torch.empty_like(mine)

    def exchange() -> None:
        both = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, theirs, other)]
        for request in dist.batch_isend_irecv(both):
            request.wait()

    return _fastest(place, exchange), bool((theirs == other).all())


def _fastest(place: Place, transfer: Callable[[], object]) -> float:
    """Return the seconds of the fastest of some repetitions, after one that sets up connections."""
    found = []
    for _ in range(1 + ROUNDS):
        _wait(place)
        began = time.perf_counter()
        transfer()
        _wait(place)
        found.append(time.perf_counter() - began)
    return min(found[1:])


def _wait(place: Place) -> None:
    if place.kind == "cuda":
        torch.cuda.synchronize(place.device)
