"""From labels and a seed to images: guidance and sampler by name, as configuration and stored models spell them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.gaussian import ReverseVariance
from ddpm.guidance import Autoguided, ClassifierFree, ClassifierGuided, LogProb
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
GUIDANCE = ("classifier_free", "classifier", "auto")


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn from a denoiser; none of it needs training.

    Attributes:
        scale: guidance scale; classifier-free: 0 is unconditional, 1 conditional; by a classifier: 0 is unconditional;
            by a weaker model: 1 is the model itself.
        interval: fractions of T between which guidance acts.
        rescale: 0 to 1, rescale of classifier-free guidance.
        kind: one of `SAMPLERS`.
        steps: steps of the sampler, one network evaluation each (two for "heun", 1 + corrector_steps for
            "predictor_corrector"); guidance doubles the forward passes.
        eta: of DDIM.
        variance: of the reverse chain where the network does not learn it, "small" or "large".
        corrector_steps: Langevin steps per level of "predictor_corrector".
        snr: of those.
        clip: bound on the predicted |x_0|; None for no clipping.
        threshold: quantile of dynamic thresholding, which takes the place of clipping; None for none.
        guidance: one of `GUIDANCE`.
        classifier: name of the classifier that guides, by whoever finds it; for "classifier".
        weak: name of the weaker model that guides; for "auto".
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
    guidance: str = "classifier_free"
    classifier: str | None = None
    weak: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.kind!r}; allowed: {', '.join(SAMPLERS)}")
        if self.scale < 0:
            raise ValueError(f"guidance scale must be >= 0, got {self.scale}")
        if self.guidance not in GUIDANCE:
            raise ValueError(f"unknown guidance {self.guidance!r}; allowed: {', '.join(GUIDANCE)}")
        if self.rescale and self.guidance != "classifier_free":
            raise ValueError(f"rescale = {self.rescale} is of classifier-free guidance, not of {self.guidance!r}")


@dataclass(frozen=True)
class Guides:
    """What guides a denoiser beside itself.

    Attributes:
        log_prob: of a classifier of noisy images.
        weak: a weaker model on the same schedule.
    """

    log_prob: LogProb | None = None
    weak: Denoiser | None = None


def configured(
    denoiser: Denoiser, schedule: NoiseSchedule, settings: SamplingSettings, guides: Guides | None = None
) -> Denoiser:
    """The denoiser under the settings' guidance and clipping.

    Raises:
        ValueError: guidance by a network that is not among `guides`.
    """
    guided = _guided(denoiser, schedule, settings, guides or Guides())
    if settings.threshold is not None:
        return DynamicThreshold(guided, schedule, settings.threshold)
    return guided if settings.clip is None else Clipped(guided, schedule, settings.clip)


def _guided(denoiser: Denoiser, schedule: NoiseSchedule, settings: SamplingSettings, guides: Guides) -> Denoiser:
    if settings.guidance == "classifier":
        if guides.log_prob is None:
            raise ValueError("guidance by a classifier needs one: give `guides` with its log_prob")
        return ClassifierGuided(denoiser, schedule, guides.log_prob, settings.scale, settings.interval)
    if settings.guidance == "auto":
        if guides.weak is None:
            raise ValueError("autoguidance needs a weaker model: give `guides` with it as `weak`")
        return Autoguided(denoiser, guides.weak, schedule, settings.scale, settings.interval)
    return ClassifierFree(denoiser, schedule, settings.scale, settings.interval, settings.rescale)


def trajectory(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    settings: SamplingSettings,
    *,
    cond: Conditioning | None,
    images: Tensor,
    shape: tuple[int, ...],
    seed: int,
    guides: Guides | None = None,
) -> Iterator[Sample]:
    """The sampler's steps for image numbers `images` [B]; see `generate`."""
    x_T = initial_noise(seed, images, shape)
    noise = step_noise(seed, images, shape)
    guided = configured(denoiser, schedule, settings, guides)
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
    guides: Guides | None = None,
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
        guides: the classifier or weaker model that the settings' guidance needs.

    Raises:
        ValueError: the number of images cannot be told, or a guide that is missing.
    """
    total = len(cond) if cond is not None else len(images) if images is not None else count
    if total is None:
        raise ValueError("give cond, images or count: the number of images is not known")
    numbers = torch.arange(total) if images is None else images
    parts = []
    for i in range(0, total, batch_size):
        span = slice(i, i + batch_size)
        some = None if cond is None else cond[span]
        steps = trajectory(
            denoiser, schedule, settings, cond=some, images=numbers[span], shape=shape, seed=seed, guides=guides
        )
        parts.append(last(steps).clamp(-1, 1))
    return torch.cat(parts)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float [N, C, H, W] to 0..255 uint8 [N, H, W, C], rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
