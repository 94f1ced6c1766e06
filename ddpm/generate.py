"""From labels and a seed to images: guidance and sampler by name, as configuration and stored models spell them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm.guidance import classifier_free
from ddpm.prediction import Conditioning, Denoiser
from ddpm.samplers import Sample, ancestral, ddim, dpm_solver, heun, initial_noise, last, step_noise
from ddpm.schedule import NoiseSchedule

SAMPLERS = ("ddim", "ancestral", "dpm_solver", "heun")


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn from a denoiser; none of it needs training.

    Attributes:
        scale: classifier-free guidance scale; 0 is unconditional, 1 conditional.
        interval: fractions of T between which guidance acts.
        kind: one of `SAMPLERS`.
        steps: steps of the sampler, one network evaluation each (two for "heun"); guidance doubles the forward passes.
        eta: of DDIM.
        variance: of ancestral sampling, "small" or "large".
        clip: bound on the predicted |x_0|; None for no clipping.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    kind: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    variance: str = "small"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.kind not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.kind!r}; allowed: {', '.join(SAMPLERS)}")
        if self.scale < 0:
            raise ValueError(f"guidance scale must be >= 0, got {self.scale}")


def trajectory(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    settings: SamplingSettings,
    *,
    labels: Tensor | None,
    images: Tensor,
    shape: tuple[int, ...],
    seed: int,
) -> Iterator[Sample]:
    """The sampler's steps for image numbers `images` [B]; see `generate`."""
    x_T = initial_noise(seed, images, shape)
    cond = None if labels is None else Conditioning(label=labels)
    guided = classifier_free(denoiser, schedule, settings.scale, settings.interval)
    if settings.kind == "ancestral":
        options: dict[str, Any] = {
            "variance": settings.variance,
            "clip": settings.clip,
            "steps": settings.steps,
        }
        return ancestral(guided, schedule, x_T, cond, noise=step_noise(seed, images, shape), **options)
    if settings.kind in ("dpm_solver", "heun"):
        solver = {"dpm_solver": dpm_solver, "heun": heun}[settings.kind]
        return solver(guided, schedule, x_T, cond, steps=settings.steps, clip=settings.clip)
    noise = step_noise(seed, images, shape) if settings.eta > 0 else None
    return ddim(guided, schedule, x_T, cond, steps=settings.steps, eta=settings.eta, clip=settings.clip, noise=noise)


@torch.inference_mode()
def generate(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    settings: SamplingSettings,
    *,
    labels: Tensor | None,
    shape: tuple[int, ...],
    seed: int,
    images: Tensor | None = None,
    count: int | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Images in [-1, 1], float32 [N, C, H, W].

    Image i of a seed is the same whatever is generated beside it, up to float rounding.

    Args:
        labels: class of each image, int64 [N]; None for unconditional images.
        shape: (C, H, W).
        seed: of the noise.
        images: image numbers [N]; default 0 .. N - 1.
        count: N where there are neither labels nor numbers.
        batch_size: images per network call.
    """
    total = len(labels) if labels is not None else len(images) if images is not None else count
    if total is None:
        raise ValueError("give labels, images or count: the number of images is not known")
    numbers = torch.arange(total) if images is None else images
    parts = []
    for i in range(0, total, batch_size):
        span = slice(i, i + batch_size)
        some = None if labels is None else labels[span]
        steps = trajectory(denoiser, schedule, settings, labels=some, images=numbers[span], shape=shape, seed=seed)
        parts.append(last(steps).clamp(-1, 1))
    return torch.cat(parts)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float [N, C, H, W] to 0..255 uint8 [N, H, W, C], rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
