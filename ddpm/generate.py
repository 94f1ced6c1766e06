"""From labels and a seed to images: guidance and sampler by name, as configuration and stored models spell them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.gaussian import ReverseVariance
from ddpm.guidance import ClassifierFree
from ddpm.prediction import Clipped, Conditioning, Denoiser, DynamicThreshold
from ddpm.samplers import (
    Sample,
    ancestral,
    ddim,
    dpm_solver,
    heun,
    initial_noise,
    last,
    predictor_corrector,
    step_noise,
)
from ddpm.schedule import NoiseSchedule

SAMPLERS = ("ddim", "ancestral", "dpm_solver", "heun", "predictor_corrector")


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn from a denoiser; none of it needs training.

    Attributes:
        scale: classifier-free guidance scale; 0 is unconditional, 1 conditional.
        interval: fractions of T between which guidance acts.
        rescale: 0 to 1, guidance rescale.
        kind: one of `SAMPLERS`.
        steps: steps of the sampler, one network evaluation each (two for "heun", 1 + corrector_steps for
            "predictor_corrector"); guidance doubles the forward passes.
        eta: of DDIM.
        variance: of the reverse chain where the network does not learn it, "small" or "large".
        corrector_steps: Langevin steps per level of "predictor_corrector".
        snr: of those.
        clip: bound on the predicted |x_0|; None for no clipping.
        threshold: quantile of dynamic thresholding, which takes the place of clipping; None for none.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    kind: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    variance: ReverseVariance = "small"
    corrector_steps: int = 1
    snr: float = 0.16
    clip: float | None = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.kind!r}; allowed: {', '.join(SAMPLERS)}")
        if self.scale < 0:
            raise ValueError(f"guidance scale must be >= 0, got {self.scale}")


def configured(denoiser: Denoiser, schedule: NoiseSchedule, settings: SamplingSettings) -> Denoiser:
    """The denoiser under the settings' guidance and clipping."""
    guided = ClassifierFree(denoiser, schedule, settings.scale, settings.interval, settings.rescale)
    if settings.threshold is not None:
        return DynamicThreshold(guided, schedule, settings.threshold)
    return guided if settings.clip is None else Clipped(guided, schedule, settings.clip)


def trajectory(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    settings: SamplingSettings,
    *,
    cond: Conditioning | None,
    images: Tensor,
    shape: tuple[int, ...],
    seed: int,
) -> Iterator[Sample]:
    """The sampler's steps for image numbers `images` [B]; see `generate`."""
    x_T = initial_noise(seed, images, shape)
    noise = step_noise(seed, images, shape)
    guided = configured(denoiser, schedule, settings)
    steps = settings.steps
    if settings.kind == "ancestral":
        return ancestral(guided, schedule, x_T, cond, noise=noise, steps=steps, variance=settings.variance)
    if settings.kind == "dpm_solver":
        return dpm_solver(guided, schedule, x_T, cond, steps=steps)
    if settings.kind == "heun":
        return heun(guided, schedule, x_T, cond, steps=steps)
    if settings.kind == "predictor_corrector":
        return predictor_corrector(
            guided,
            schedule,
            x_T,
            cond,
            noise=noise,
            steps=steps,
            variance=settings.variance,
            corrector_steps=settings.corrector_steps,
            snr=settings.snr,
        )
    return ddim(guided, schedule, x_T, cond, steps=steps, eta=settings.eta, noise=noise)


# Not inference mode: classifier guidance differentiates through x_t.
@torch.no_grad()
def generate(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    settings: SamplingSettings,
    *,
    cond: Conditioning | None,
    shape: tuple[int, ...],
    seed: int,
    images: Tensor | None = None,
    count: int | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Images in [-1, 1], float32 [N, C, H, W].

    Image i of a seed is the same whatever is generated beside it, up to float rounding.

    Args:
        cond: what each image is conditioned on, N on the first axis; None for unconditional images.
        shape: (C, H, W).
        seed: of the noise.
        images: image numbers [N]; default 0 .. N - 1.
        count: N where there are neither conditions nor numbers.
        batch_size: images per network call.

    Raises:
        ValueError: the number of images cannot be told.
    """
    total = len(cond) if cond is not None else len(images) if images is not None else count
    if total is None:
        raise ValueError("give cond, images or count: the number of images is not known")
    numbers = torch.arange(total) if images is None else images
    parts = []
    for i in range(0, total, batch_size):
        span = slice(i, i + batch_size)
        some = None if cond is None else cond[span]
        steps = trajectory(denoiser, schedule, settings, cond=some, images=numbers[span], shape=shape, seed=seed)
        parts.append(last(steps).clamp(-1, 1))
    return torch.cat(parts)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float [N, C, H, W] to 0..255 uint8 [N, H, W, C], rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
