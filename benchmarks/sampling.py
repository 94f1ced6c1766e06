"""Benchmark of DDIM sampling: this project and diffusers, with the same weights, noise and images.

    python -m benchmarks.sampling [--quick] [--json]

It needs torch only; diffusers is measured if installed and otherwise listed as missing. Runs alternate in one process,
medians are reported, and the images of both are compared, to make sure that they do the same work.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

# Before torch is imported: with other processes running, a step on many threads is ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from benchmarks.results import commit, publish
from ddpm.models.unet import UNet, UNetConfig
from ddpm.prediction import NetworkDenoiser
from ddpm.samplers import DDIM, last
from ddpm.schedule import make_schedule

# 9.0 M parameters for 32x32 images.
CONFIG = UNetConfig(
    channels=(64, 128, 128, 128), layers_per_block=2, attention=(False, True, False, False), head_dim=64
)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, steps and turns")
    parser.add_argument("--json", action="store_true", help="print the result as the last line (always done)")
    options = parser.parse_args(arguments)
    publish(run(options.quick), "sampling", options.quick)


def run(quick: bool) -> dict[str, Any]:
    """Return the measurements of all systems, with runs alternating."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, steps, turns = (4, 5, 3) if quick else (16, 20, 5)
    if device.type == "cuda":
        batch *= 16
    torch.manual_seed(0)
    network = UNet(CONFIG).eval().requires_grad_(False).to(device)
    x_T = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    systems: dict[str, Callable[[], Tensor]] = {"ours": ours(network, x_T, steps)}
    peer = diffusers_(network, x_T, steps)
    if peer is not None:
        systems["diffusers"] = peer
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    images = {name: sample() for name, sample in systems.items()}  # warm-up
    for _ in range(turns):
        for name, sample in systems.items():
            began = time.perf_counter()
            sample()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    rate = {name: batch / statistics.median(s) for name, s in seconds.items()}
    result: dict[str, Any] = {
        "benchmark": "sampling",
        "quick": quick,
        "commit": commit(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()}), 1 thread",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in network.parameters()),
        "batch": batch,
        "steps": steps,
        "images_per_s": {name: round(r, 3) for name, r in rate.items()},
        "seconds": seconds,
    }
    if "diffusers" in images:
        result["speedup_diffusers"] = round(rate["ours"] / rate["diffusers"], 3)
        result["largest_difference"] = (images["ours"] - images["diffusers"]).abs().max().item()
    else:
        result["missing"] = ["diffusers"]
    return result


def ours(network: UNet, x_T: Tensor, steps: int) -> Callable[[], Tensor]:
    """Return a function that samples with this project's DDIM."""
    schedule = make_schedule("linear")
    channels_last = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    denoiser = NetworkDenoiser(channels_last, schedule)

    @torch.no_grad()
    def sample() -> Tensor:
        return last(DDIM(steps=steps)(denoiser, schedule, x_T.contiguous(memory_format=torch.channels_last)))

    return sample


def diffusers_(network: UNet, x_T: Tensor, steps: int) -> Callable[[], Tensor] | None:
    """Return a function that samples with diffusers' UNet2DModel and DDIM loop, with the same weights."""
    try:
        from diffusers import DDIMScheduler, UNet2DModel
    except ImportError:
        return None
    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in CONFIG.attention]
    up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(CONFIG.attention)]
    twin = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=CONFIG.channels,
        layers_per_block=CONFIG.layers_per_block,
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=CONFIG.head_dim,
    )
    twin.load_state_dict(network.state_dict())
    twin = twin.eval().requires_grad_(False).to(x_T.device)
    scheduler = DDIMScheduler(
        beta_schedule="linear", clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )

    @torch.no_grad()
    def sample() -> Tensor:
        scheduler.set_timesteps(steps)
        image = x_T
        for t in scheduler.timesteps:
            image = scheduler.step(twin(image, t).sample, t, image).prev_sample
        return image

    return sample


if __name__ == "__main__":
    main()
