"""The loop of one rank. It knows torch.distributed and a `Shell`; Ray is one shell, a test's process group another."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm.ema import EMA
from ddpm.generate import generate, to_uint8
from ddpm.interop import ModelSpec
from ddpm.models.unet import UNet
from ddpm.noise import Purpose, normal, uniform
from ddpm.objectives import stratified_timesteps, uniform_timesteps
from ddpm.prediction import Conditioning, NetworkDenoiser
from ddpm.schedule import NoiseSchedule
from pipelines.config import Config, OptimConfig, noise_schedule, training_objective, unet_config
from pipelines.evaluation.plots import label_grid
from pipelines.models import (
    check_resumable,
    load_checkpoint,
    load_optimizer_tensors,
    model_spec,
    optimizer_tensors,
    publish,
    save_checkpoint,
)
from pipelines.shards.read import Batch, default_cache_dir
from pipelines.shards.stream import StreamSettings, TrainingStream, open_stream
from pipelines.storage import join
from pipelines.tracking import MetricLog
from pipelines.training.progress import Clock, Progress
from pipelines.training.shell import Job, Shell

GRID_SEED = 0


@dataclass
class Training:
    """The state that a checkpoint saves."""

    network: UNet
    optimizer: torch.optim.Optimizer
    ema: EMA
    images_seen: int = 0
    optimizer_steps: int = 0
    names: list[str] = field(default_factory=list)


def train(
    job: Job, shell: Shell, *, rank: int, world_size: int, device: torch.device, started: float | None = None
) -> None:
    """Train until `config.images` images are seen or a stop is asked for; the last checkpoint is always saved.

    Args:
        started: `time.monotonic()` when this attempt began on this rank; now, where not given.
    """
    clock = Clock(time.monotonic() if started is None else started)
    config = job.config
    training = make_training(config, device)
    with shell.restored() as folder:
        if folder is not None:
            restore(training, folder, job)
    schedule, spec = noise_schedule(config), model_spec(config, job.dataset, job.lineage, job.quarantine)
    parallel = _wrap(training.network, device, world_size)
    log = MetricLog(job.tracker) if rank == 0 else None
    resumed_at = saved_at = training.images_seen
    window = _Window(training.images_seen)
    if training.images_seen == 0:
        with clock.during("grid"):
            draw_grid(training, schedule, spec, job, rank, world_size, device)

    batches = iter(make_stream(job, rank, world_size, training.images_seen))
    clock.switch("step")
    while True:
        with clock.during("data"):
            batch = next(batches, None)
        if batch is None:
            break
        wishes = (rank == 0 and shell.stop_requested(), shell.checkpoint_requested())
        loss, stop, save_now = step(training, parallel, schedule, batch, config, device, wishes=wishes)
        seen = training.images_seen
        finished = seen >= config.images
        window.add(loss)
        if rank == 0:
            shell.progress(Progress(seen, resumed_at, loss, clock.seconds()))
        if log and (_crossed(seen, config.batch_size, config.tracking.log_every) or finished):
            log.add({"train/loss": window.mean(), "train/lr": learning_rate(config.optim, seen, config.images),
                     "train/images_per_s": window.rate(seen)}, seen)  # fmt: skip
            window = _Window(seen)
        with window.paused():
            if _crossed(seen, config.batch_size, config.tracking.grid_every) or finished:
                with clock.during("grid"):
                    draw_grid(training, schedule, spec, job, rank, world_size, device)
            if stop or save_now or finished or _crossed(seen, config.batch_size, config.checkpoint.every):
                publish_too = finished or _publishes(saved_at, seen, config)
                with clock.during("checkpoint"):
                    checkpoint(training, spec, job, shell, rank, publish_too=publish_too)
                saved_at = seen
        if stop:
            break
    with clock.during("checkpoint"):
        shell.flush()
    if log:
        log.flush()


def make_training(config: Config, device: torch.device) -> Training:
    """A fresh network, the same on every rank, with its optimizer and average."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = UNet(unet_config(config))
    network = network.to(device)
    if device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    names = [name for name, _ in network.named_parameters()]
    return Training(network, optimizer, EMA(network, optim.ema_half_life), names=names)


def restore(training: Training, folder: Path, job: Job) -> None:
    """Put a checkpoint's state back.

    Raises:
        ModelError: damaged, or of a run with other settings or data.
    """
    state, averaged, tensors = load_checkpoint(folder)
    check_resumable(state, job.config, job.dataset, job.quarantine)
    weights = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
    training.network.load_state_dict(weights)
    training.ema.load_state_dict(averaged)
    load_optimizer_tensors(training.optimizer, training.names, tensors)
    training.images_seen, training.optimizer_steps = state.images_seen, state.optimizer_steps


def make_stream(job: Job, rank: int, world_size: int, start: int) -> TrainingStream:
    """This rank's batches from `start` images on."""
    data = job.config.data
    settings = StreamSettings(
        lanes=data.lanes,
        window=data.window,
        seed=job.config.seed,
        cache_dir=Path(data.cache_dir) if data.cache_dir else default_cache_dir(),
        cache_bytes=int(data.cache_gib * 2**30),
        threads=data.decode_threads,
        prefetch=data.prefetch_batches,
    )
    reader, order = open_stream(job.dataset, "train", job.storage, settings, job.quarantine)
    return TrainingStream(
        reader,
        order,
        batch_size=job.config.batch_size,
        rank=rank,
        world_size=world_size,
        start=start,
        stop=job.config.images,
        threads=settings.threads,
        prefetch=settings.prefetch,
    )


def step(
    training: Training,
    parallel: nn.Module,
    schedule: NoiseSchedule,
    batch: Batch,
    config: Config,
    device: torch.device,
    *,
    wishes: tuple[bool, bool] = (False, False),
) -> tuple[float, bool, bool]:
    """One optimizer step on a global batch; (mean loss over it, whether any rank has the first wish, the second).

    Gradients are weighted by samples: each rank's loss is its sum over the global batch size, times the number of
    ranks because DDP averages over them, so ranks with unequal pieces give the gradient of the whole batch exactly.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, training.images_seen, config.images)
    total = torch.zeros((), device=device)
    for micro, weight, last in _micro_batches(batch, config, world_size):
        held_back = not last and isinstance(parallel, DistributedDataParallel)
        with _no_sync(parallel, held_back), _autocast(config.optim, device):
            loss = weight * losses(parallel, schedule, micro, config, device).sum() / config.batch_size
        with _no_sync(parallel, held_back):
            (loss * world_size).backward()
        total += loss.detach()
    shared = torch.cat([total[None], torch.tensor(wishes, dtype=total.dtype, device=device)])
    if world_size > 1:
        dist.all_reduce(shared)
    mean, stops, saves = shared.tolist()
    if not math.isfinite(mean):
        first = training.images_seen
        raise FloatingPointError(
            f"the loss is {mean} on samples {first}..{first + config.batch_size - 1} of the stream: "
            "lower optim.lr, set optim.grad_clip, or use optim.precision=fp32"
        )
    if config.optim.grad_clip is not None:
        nn.utils.clip_grad_norm_(training.network.parameters(), config.optim.grad_clip)
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.images_seen += config.batch_size
    training.optimizer_steps += 1
    training.ema.update(training.network, training.images_seen, config.batch_size)
    return mean, stops > 0, saves > 0


def losses(network: nn.Module, schedule: NoiseSchedule, batch: Batch, config: Config, device: torch.device) -> Tensor:
    """Loss per sample [B]; timestep, noise, label drop and flip are functions of (seed, ordinal)."""
    n = batch.ordinals.to(device)
    x_0 = batch.images.to(device, non_blocking=True)
    if config.data.flip:
        mirrored = uniform(config.seed, n, Purpose.FLIP)[:, 0] < 0.5
        x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
    if config.objective.timesteps == "stratified":
        t = stratified_timesteps(config.seed, n, schedule.num_steps, config.batch_size)
    else:
        t = uniform_timesteps(config.seed, n, schedule.num_steps)
    eps = normal(config.seed, n, Purpose.NOISE, tuple(x_0.shape[1:]))
    cond = None
    if config.model.class_conditional and batch.labels is not None:
        drop = uniform(config.seed, n, Purpose.LABEL_DROP)[:, 0] < config.objective.label_drop
        cond = Conditioning(label=batch.labels.to(device), drop=drop)
    return training_objective(config).losses(network, schedule, x_0, t, eps, cond)


def learning_rate(optim: OptimConfig, images_seen: int, images: int) -> float:
    """Linear warm-up, then constant or decaying to 2 % at the end of the run, as a function of images seen."""
    warmup = min(1.0, (images_seen + 1) / optim.warmup_images) if optim.warmup_images else 1.0
    left = max(0.0, 1 - images_seen / images)
    decay = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[optim.decay]
    return optim.lr * warmup * max(decay, 0.02)


def draw_grid(
    training: Training,
    schedule: NoiseSchedule,
    spec: ModelSpec,
    job: Job,
    rank: int,
    world_size: int,
    device: torch.device,
) -> None:
    """Sample one grid from the average, its images shared out over the ranks, and log it at the images seen."""
    rows = job.config.tracking.grid_rows
    classes = max(len(spec.classes), 1)
    count = rows * classes
    labels = torch.arange(count) % classes if spec.classes else None
    mine = torch.arange(rank, count, world_size)
    raw = {name: p.detach().clone() for name, p in training.network.state_dict().items()}
    training.network.load_state_dict(training.ema.state_dict())
    training.network.eval()
    images = generate(
        NetworkDenoiser(training.network, schedule, spec.prediction),
        schedule,
        spec.sampling,
        cond=None if labels is None else Conditioning(label=labels[mine].to(device)),
        shape=spec.shape,
        seed=GRID_SEED,
        images=mine.to(device),
    )
    training.network.train()
    training.network.load_state_dict(raw)
    grid = torch.zeros(count, *spec.shape, device=device)
    grid[mine] = images
    if world_size > 1:
        dist.all_reduce(grid)
    if rank == 0:
        pixels = label_grid(to_uint8(grid).cpu().numpy(), classes, spec.classes)
        with MetricLog.tolerant():
            job.tracker.image("samples", pixels, training.images_seen)


def checkpoint(training: Training, spec: ModelSpec, job: Job, shell: Shell, rank: int, *, publish_too: bool) -> None:
    """Save the state through the shell; copy it to `published/` and record it in the run where asked."""
    metrics = {"images_seen": training.images_seen}
    if rank != 0:
        shell.save(None, metrics)
        return
    folder = Path(tempfile.mkdtemp(prefix="ddpm-checkpoint-"))
    tensors = {f"network.{k}": v for k, v in training.network.state_dict().items()}
    state = save_checkpoint(
        folder,
        spec,
        training.ema.state_dict(),
        {**tensors, **optimizer_tensors(training.optimizer, training.names)},
        images_seen=training.images_seen,
        identity=job.config.identity(),
        optimizer_steps=training.optimizer_steps,
    )

    def store(uri: str) -> None:
        try:
            for name in [*state.files, "state.json"]:
                job.storage.upload(folder / name, f"{uri}/{name}")
            if publish_too:
                target = join(job.published_uri, f"{state.images_seen:012d}")
                publish(job.tracker, job.storage, folder, target, state)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    shell.save(store, metrics)


def _micro_batches(batch: Batch, config: Config, world_size: int) -> Iterator[tuple[Batch, float, bool]]:
    """(part, weight, is last): the same number on every rank; one that has run out repeats a sample at weight 0."""
    largest = -(-config.batch_size // world_size)
    size = min(config.micro_batch_size or largest, largest)
    parts = -(-largest // size)
    for i in range(parts):
        span = slice(i * size, (i + 1) * size)
        empty = i * size >= len(batch.ordinals)
        if empty:
            span = slice(0, 1)
        labels = None if batch.labels is None else batch.labels[span]
        yield Batch(batch.ordinals[span], batch.images[span], labels), 0.0 if empty else 1.0, i == parts - 1


def _wrap(network: nn.Module, device: torch.device, world_size: int) -> nn.Module:
    if world_size == 1:
        return network
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def _no_sync(parallel: nn.Module, held_back: bool) -> AbstractContextManager[Any]:
    return parallel.no_sync() if held_back and isinstance(parallel, DistributedDataParallel) else nullcontext()


def _autocast(optim: OptimConfig, device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported()
    else:
        supported = torch.cpu._is_avx512_bf16_supported()
    wanted = supported if optim.precision == "auto" else optim.precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def _crossed(seen: int, batch_size: int, every: int) -> bool:
    """Whether the batch that ended at `seen` passed a multiple of `every`."""
    return seen // every > (seen - batch_size) // every


def _publishes(saved_at: int, seen: int, config: Config) -> bool:
    return seen // config.checkpoint.publish_every > saved_at // config.checkpoint.publish_every


class _Window:
    """Mean loss and speed of the steps since the last logged point; grids and checkpoints do not count as steps."""

    def __init__(self, images_seen: int) -> None:
        self.start, self.began = images_seen, time.perf_counter()
        self.total, self.count = 0.0, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def add(self, loss: float) -> None:
        self.total += loss
        self.count += 1

    def mean(self) -> float:
        return self.total / max(self.count, 1)

    def rate(self, images_seen: int) -> float:
        return (images_seen - self.start) / (time.perf_counter() - self.began)
