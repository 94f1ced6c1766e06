"""The speed of a configuration on a device: real training steps and network evaluations on made-up images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ddpm.conditioning import Conditioning
from ddpm.prediction import Arithmetic
from pipelines.config import Config, sampling
from pipelines.shards.index import ShardInfo, make_dataset
from pipelines.shards.read import Batch
from pipelines.tracking import Tracker
from pipelines.training.loop.context import Job, RunContext
from pipelines.training.loop.state import TrainingState, ema_weights, make_state
from pipelines.training.loop.train import step

TOKENS = 16
"""Length of made-up captions."""


@dataclass(frozen=True)
class MeasuredSpeed:
    """The speed of one rank.

    Attributes:
        train: images per second of whole training steps: forward, backward, update, averages.
        draw: images per second of single network evaluations, as sampling makes them in `sampler.precision`.
        evaluate: the same in float32, as likelihoods are computed.
        parameters: of the network.
        precision: what forward and backward computed in.
    """

    train: float
    draw: float
    evaluate: float
    parameters: int
    precision: str


def measure_speed(config: Config, device: torch.device, seconds: float) -> MeasuredSpeed:
    """Return the speed of one rank's training and sampling; nothing is read or written.

    Args:
        config: of a denoiser; its `batch_size` is this rank's.
        seconds: how long training steps and evaluations are each repeated, after one to warm up.
    """
    context, state, batch = _prepared(config, device)
    train = _rate(lambda: _step(context, state, batch), config.batch_size, device, seconds)
    draw = evaluate = _drawing(config, state, batch, device, seconds, Arithmetic())
    arithmetic = sampling(config).arithmetic
    if arithmetic.precision != "fp32":
        draw = _drawing(config, state, batch, device, seconds, arithmetic)
    parameters = sum(p.numel() for p in state.network.parameters())
    return MeasuredSpeed(train, draw, evaluate, parameters, context.precision)


def measure_training(config: Config, device: torch.device, seconds: float) -> float:
    """Return `MeasuredSpeed.train` alone; arguments as of `measure_speed`."""
    context, state, batch = _prepared(config, device)
    return _rate(lambda: _step(context, state, batch), config.batch_size, device, seconds)


def measure_drawing(config: Config, device: torch.device, seconds: float) -> float:
    """Return `MeasuredSpeed.draw` alone; arguments as of `measure_speed`."""
    _, state, batch = _prepared(config, device)
    return _drawing(config, state, batch, device, seconds, sampling(config).arithmetic)


def _drawing(
    config: Config, state: TrainingState, batch: Batch, device: torch.device, seconds: float, arithmetic: Arithmetic
) -> float:
    """Return the images per second of network evaluations in a precision."""
    with ema_weights(state) as network, torch.no_grad():
        images, t = batch.images.to(device), torch.full((len(batch),), 500.0, device=device)
        cond, weights = _condition(config, batch, device), next(network.parameters()).dtype
        denoiser = arithmetic.wrap(network)
        return _rate(lambda: denoiser(images.to(weights), t, cond), len(batch), device, seconds)


def _prepared(config: Config, device: torch.device) -> tuple[RunContext, TrainingState, Batch]:
    context = RunContext.of(made_up_job(config), rank=0, world_size=1, device=device)
    return context, make_state(context.config, context.device, context.precision), made_up(config)


def made_up(config: Config) -> Batch:
    """Return a batch of noise with the shapes, labels and texts that a configuration trains on."""
    data, count = config.data, config.batch_size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, *data.shape, generator=generator) * 2 - 1
    labels = torch.arange(count) % data.num_classes if data.num_classes else None
    batch = Batch(torch.arange(count), images, labels)
    width = config.model.text_dim
    if width:
        text = torch.randn(count, TOKENS, width, generator=generator)
        mask = torch.ones(count, TOKENS, dtype=torch.bool)
        batch = Batch(batch.ordinals, images, labels, text, mask, text.mean(1))
    return batch


def made_up_job(config: Config) -> Job:
    """Return a job for a measurement, whose data is never read."""
    data = config.data
    dataset = make_dataset(
        "file:///nowhere",
        splits={"train": (ShardInfo("train-000000.tar", config.batch_size, 0, ""),)},
        classes=tuple(str(i) for i in range(data.num_classes)),
        channels=data.channels,
        image_size=data.image_size,
        mean=(0.0,) * data.channels,
        std=(1.0,) * data.channels,
    )
    return Job(config, dataset, Tracker("", ""), {})


def _step(context: RunContext, state: TrainingState, batch: Batch) -> None:
    state.images_seen = 0  # the ordinals of the batch begin there
    step(context, state, batch)


def _condition(config: Config, batch: Batch, device: torch.device) -> Conditioning | None:
    labels = batch.labels if config.model.class_conditional else None
    if labels is None and batch.text is None:
        return None
    return Conditioning(label=labels, text=batch.text, text_mask=batch.text_mask, pooled=batch.pooled).to(device)


def _rate(call: Callable[[], object], images: int, device: torch.device, seconds: float) -> float:
    """Return the images per second of a repeated call, its first repetition left out.

    It is repeated three times at least, unless it takes long. The mean counts what other guests of the machine take
    now and then, as a long training meets it; a median would not.
    """
    call()
    _wait(device)
    calls, began, took = 0, time.perf_counter(), 0.0
    while not calls or took < seconds or (calls < 3 and took < 4 * seconds):
        call()
        _wait(device)
        calls, took = calls + 1, time.perf_counter() - began
    return images * calls / took


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
