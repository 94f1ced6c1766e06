"""Benchmark of sampling: this project in float32, in bf16 and compiled, and diffusers, all with the same weights.

    python -m benchmarks.sampling [--quick]

Speed: DDIM, DPM-Solver++ and UniPC by both, a network of 9.0 M parameters with new weights at 32x32, on one thread and
on two. Runs alternate in one process, medians are reported, and the images of both are compared, to make sure that they
do the same work.

Few steps: how many digits a second each number of steps draws, one at a time and 64 at a time.

Quality: a model of digits is trained, and its samples in float32 and in bf16 are compared by the difference of their
Frechet distances to test images, paired by sample: both have the same labels and noise.

Speed needs torch only; where anything else is not installed, it is listed as missing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before torch is imported: with other processes running, a step on many threads is ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

from benchmarks.results import Size, commit, make_parser, publish, work_folder
from benchmarks.train_step import machine
from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, generate
from ddpm.models.unet import UNet, UNetConfig
from ddpm.prediction import NetworkDenoiser
from ddpm.samplers import initial_noise, last, step_noise
from ddpm.schedule import make_schedule

CONFIG = UNetConfig(
    channels=(64, 128, 128, 128), layers_per_block=2, attention=(False, True, False, False), head_dim=64
)
SAMPLERS = ("ddim", "dpm_solver", "unipc")
SYSTEMS: dict[str, dict[str, Any]] = {
    "ours": {"precision": "fp32"},
    "ours, bf16": {"precision": "bf16"},
    "ours, bf16, compiled": {"precision": "bf16", "compile": True},
}
"""Settings of sampling by which ours is measured."""
SHAPE, SEED = (3, 32, 32), 1
Counts = dict[str, tuple[int, ...]]
BY_STEPS: Counts = {"ancestral": (1000,), "ddim": (50,), "dpm_solver": (15,), "unipc": (4,), "consistency": (2, 1)}
BATCHES = (1, 64)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    parser = make_parser("sampling", __doc__, quick="fewer images, steps and turns", keeps="the evaluator of digits")
    options = parser.parse_args(arguments)
    size = options.size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        "benchmark": "sampling",
        "quick": size is not Size.FULL,
        "commit": commit(),
        "machine": machine(device),
        "torch": torch.__version__,
        **speed(size, device),
        "few_steps": few_steps(size),
        "distance": quality(size, work_folder(options)),
    }
    publish(result, "sampling", options)


def speed(size: Size, device: torch.device) -> dict[str, Any]:
    """Return images a second of all systems by threads and sampler, with runs alternating."""
    batch, steps, turns = size.of((16, 20, 5), (4, 5, 3), (2, 2, 1))
    if device.type == "cuda":
        batch *= 16
    torch.manual_seed(0)
    smaller = replace(CONFIG, channels=(32, 32), layers_per_block=1, attention=(False, True), head_dim=32)
    network = UNet(size.of(CONFIG, CONFIG, smaller)).eval().requires_grad_(False).to(device)
    x_T = initial_noise(SEED, torch.arange(batch, device=device), SHAPE)
    # Compiling takes longer than all else.
    chosen = {name: fields for name, fields in SYSTEMS.items() if size is Size.FULL or "compile" not in fields}
    table = []
    for threads in (1,) if device.type == "cuda" else (1, 2):
        torch.set_num_threads(threads)
        for sampler in SAMPLERS:
            systems = {name: ours(network, batch, sampler, steps, fields) for name, fields in chosen.items()}
            peer = diffusers_(network, x_T, sampler, steps)
            if peer is not None:
                systems["diffusers"] = peer
            table.append({"threads": threads, "sampler": sampler, **compared(systems, batch, turns, device)})
            print(" ".join(f"{key} {value}" for key, value in table[-1].items() if key != "seconds"), flush=True)
    torch.set_num_threads(1)
    parameters = sum(p.numel() for p in network.parameters())
    return {"parameters": parameters, "batch": batch, "steps": steps, "speed": table}


def compared(systems: dict[str, Callable[[], Tensor]], batch: int, turns: int, device: torch.device) -> dict[str, Any]:
    """Return the rates of systems that draw `batch` images a call, and the largest difference of their images."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    images, first = {}, {}
    for name, sample in systems.items():  # warm-up, in which what is to be compiled is
        began = time.perf_counter()
        images[name] = sample()
        first[name] = round(time.perf_counter() - began, 1)
    for _ in range(turns):
        for name, sample in systems.items():
            began = time.perf_counter()
            sample()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(round(time.perf_counter() - began, 3))
    rate = {name: batch / statistics.median(s) for name, s in seconds.items()}
    row: dict[str, Any] = {"images_per_s": {name: round(r, 3) for name, r in rate.items()}, "seconds": seconds}
    row["first_s"] = first
    if "diffusers" in systems:
        row["speedup"] = {name: round(rate[name] / rate["diffusers"], 3) for name in rate if name in SYSTEMS}
        row["largest_difference"] = (images["ours"] - images["diffusers"]).abs().max().item()
    else:
        row["missing"] = ["diffusers"]
    return row


def few_steps(size: Size) -> list[dict[str, Any]]:
    """Return images a second of the network of digits, on one thread and in float32, by sampler, steps and batch."""
    try:
        from pipelines.config import compose
        from pipelines.training.loop.state import make_network
    except ImportError as error:
        return [{"missing": error.name}]
    config = compose(["+experiment=digits"])
    network = make_network(config).eval().requires_grad_(False)
    shape, turns = config.data.shape, size.of(5, 1, 1)
    quick: Counts = {sampler: counts for sampler, counts in BY_STEPS.items() if sampler != "ancestral"}
    smoke: Counts = dict.fromkeys(BY_STEPS, (2,))
    steps_of = size.of(BY_STEPS, quick, smoke)
    rows = []
    for sampler, steps in ((sampler, count) for sampler, counts in steps_of.items() for count in counts):
        row: dict[str, Any] = {"sampler": sampler, "steps": steps}
        for batch in BATCHES:
            draw = ours(network, batch, sampler, steps, {}, shape)
            draw()
            seconds = []
            for _ in range(turns):
                began = time.perf_counter()
                draw()
                seconds.append(time.perf_counter() - began)
            row[f"images_per_s_batch_{batch}"] = round(batch / statistics.median(seconds), 3)
        rows.append(row)
        print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def ours(
    network: nn.Module,
    batch: int,
    sampler: str,
    steps: int,
    fields: dict[str, Any],
    shape: tuple[int, ...] = SHAPE,
) -> Callable[[], Tensor]:
    """Return a function that samples as `ddpm sample` does, with some settings."""
    schedule = make_schedule("linear")
    denoiser = NetworkDenoiser(network, schedule)
    settings = Sampling.of(kind=sampler, steps=steps, clip=None, **fields)
    ids = torch.arange(batch, device=next(network.parameters()).device)

    @torch.no_grad()
    def sample() -> Tensor:
        x_T, noise = initial_noise(SEED, ids, shape), step_noise(SEED, ids, shape)
        return last(settings.sampler(settings.wrap(denoiser, schedule), schedule, x_T, None, noise=noise))

    return sample


def diffusers_(network: UNet, x_T: Tensor, sampler: str, steps: int) -> Callable[[], Tensor] | None:
    """Return a function that samples with diffusers' UNet2DModel and its scheduler's loop, with the same weights."""
    try:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel, UniPCMultistepScheduler
    except ImportError:
        return None
    config = network.config
    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in config.attention]
    up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)]
    twin = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=config.head_dim,
    )
    twin.load_state_dict(network.state_dict())
    twin = twin.eval().requires_grad_(False).to(x_T.device)
    same = {"beta_schedule": "linear", "timestep_spacing": "trailing"}
    scheduler = {
        "ddim": lambda: DDIMScheduler(**same, clip_sample=False, set_alpha_to_one=True),
        "dpm_solver": lambda: DPMSolverMultistepScheduler(**same, final_sigmas_type="zero"),
        "unipc": lambda: UniPCMultistepScheduler(**same, final_sigmas_type="zero", solver_type="bh2"),
    }[sampler]()

    @torch.no_grad()
    def sample() -> Tensor:
        scheduler.set_timesteps(steps)
        image = x_T
        for t in scheduler.timesteps:
            image = scheduler.step(twin(image, t).sample, t, image).prev_sample
        return image

    return sample


def quality(size: Size, work: Path) -> dict[str, Any]:
    """Return the Frechet distances of digits drawn in float32 and in bf16, and their difference, paired by sample."""
    try:
        from benchmarks.digits.data import load_digits
        from benchmarks.images import denoiser_of, trained
        from pipelines.config import compose
        from pipelines.evaluation.compare import measured_frechet
        from pipelines.evaluation.images import to_levels
        from pipelines.shards.read import Batch
    except ImportError as error:
        return {"missing": [error.name]}
    digits, samples = load_digits(work, size), size.of(2_000, 200, 20)
    config = compose(["+experiment=digits", f"images={size.of(76_800, 1_280, 128)}"])
    images = Batch(torch.arange(len(digits.train)), digits.train, digits.train_labels)
    denoiser = denoiser_of(config, trained(config, images, say=lambda text: None))
    labels = torch.arange(samples) % 10
    found = {}
    for precision in ("fp32", "bf16"):
        drawn = generate(
            denoiser,
            denoiser.schedule,
            Sampling.of(kind="ddim", steps=size.of(20, 20, 2), precision=precision),
            cond=Conditioning(label=labels),
            shape=(1, 8, 8),
            seed=SEED,
            batch_size=250,
        )
        found[precision] = measured_frechet(digits.reference, digits.evaluator.encoder(to_levels(drawn)).features)
    difference = found["bf16"] - found["fp32"]
    interval = difference.interval()
    return {
        "images": config.images,
        "samples": samples,
        "evaluator": digits.evaluator.digest[:12],
        **{name: each.value for name, each in found.items()},
        "difference": difference.value,
        "difference_interval": [interval.low, interval.high],
    }


if __name__ == "__main__":
    main()
