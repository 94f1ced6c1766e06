"""Guidance as denoisers that wrap denoisers: scale, interval and rescale need no training, so they can be searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm.prediction import Conditioning, Denoiser, Prediction, coefficients, eps_from_x0
from ddpm.schedule import NoiseSchedule

LogProb = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""log p(y | x_t), [B], of x_t [B, C, H, W], t [B] and the condition y, up to a constant; differentiable in x_t."""

ALWAYS = (0.0, 1.0)


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, in the form null + scale (cond - null)).

    Scale 0 is exactly the unconditional model (where it is not rescaled) and 1 exactly the conditional one, at one
    evaluation each; any other scale evaluates both in one batch of 2 B. Outside `interval` the conditional model is
    used as it is, whatever the scale (Kynkäänniemi et al. 2024). All channels are guided; what is known of the image
    (inpainting) conditions both.

    Attributes:
        denoiser: the conditional model, whose null condition is the unconditional one.
        schedule: its schedule.
        scale: guidance scale.
        interval: (low, high) as fractions of T within which guidance acts, ends included.
        rescale: 0 to 1; how far the guided x_0 of an image is brought back to the standard deviation of the conditional
            one (Lin et al. 2024, eq. 15-16, on x_0), against over-exposure at high scales; a guided x_0 that is the
            same in every pixel stays as it is.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    scale: float
    interval: tuple[float, float] = ALWAYS
    rescale: float = 0.0

    def __post_init__(self) -> None:
        _check(self.scale, self.interval)
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1], got {self.rescale}")

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        """See `Denoiser`."""
        if cond is None:
            return self.denoiser(x_t, t, None)
        if self.scale == 1 or not _acts(self.interval, t, self.schedule):
            return self.denoiser(x_t, t, cond)
        if self.scale == 0 and self.rescale == 0:
            return self.denoiser(x_t, t, cond.null())
        batch = len(x_t)
        null = torch.arange(2 * batch, device=x_t.device) >= batch
        both = cond.map(lambda tensor: torch.cat([tensor, tensor])).dropped(null)
        pred = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        (x0, null_x0), (eps, null_eps) = pred.x0.split(batch), pred.eps.split(batch)
        guided = Prediction(
            x0=torch.lerp(null_x0, x0, self.scale),
            eps=torch.lerp(null_eps, eps, self.scale),
            variance_fraction=None if pred.variance_fraction is None else pred.variance_fraction[:batch],
        )
        if self.rescale == 0:
            return guided
        ratio = _spread(x0) / _spread(guided.x0)
        ratio = torch.where(ratio.isfinite(), ratio, 1)  # a constant image has no spread to bring back
        rescaled = guided.x0 * (1 + self.rescale * (ratio - 1))
        return replace(guided, x0=rescaled, eps=eps_from_x0(rescaled, x_t, t, self.schedule))


@dataclass(frozen=True)
class ClassifierGuided:
    """Guidance by a classifier of noisy images (Dhariwal & Nichol 2021, algorithm 2; Song et al. 2021b, eq. 14).

    The score of p(x_t) p(y | x_t)^scale, with the gradient at x_t:
        eps = eps(x_t) - scale sigma_t grad log p(y | x_t).
    The base is the unconditional model: scale 0 is exactly that, and by Bayes' rule 1 is the conditional one. To guide
    a conditional model, as the authors also do, give one that ignores what it is asked: `ConditionedOn`'s. Where
    alpha_t = 0 the image is pure noise, about which a classifier knows nothing, and guidance rests.

    Attributes:
        denoiser: the model; it is asked without label and text.
        schedule: its schedule.
        log_prob: of the condition, see `LogProb`: `ddpm.models.classifier` has one for classes and one for text.
        scale: guidance scale.
        interval: (low, high) as fractions of T within which guidance acts, ends included.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    log_prob: LogProb
    scale: float
    interval: tuple[float, float] = ALWAYS

    def __post_init__(self) -> None:
        _check(self.scale, self.interval)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        """See `Denoiser`."""
        if cond is None:
            return self.denoiser(x_t, t, None)
        pred = self.denoiser(x_t, t, cond.null())
        if self.scale == 0 or not _acts(self.interval, t, self.schedule):
            return pred
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_prob(x, t, cond).sum(), x)
        if cond.drop is not None:
            gradient = gradient * ~cond.drop.reshape(-1, *(1,) * (x_t.dim() - 1))
        alpha, sigma = coefficients(self.schedule, t, x_t)
        push = torch.where(alpha > 0, self.scale * sigma * gradient, 0)
        shift = torch.where(alpha > 0, sigma / torch.where(alpha > 0, alpha, 1), 0) * push
        return replace(pred, x0=pred.x0 + shift, eps=pred.eps - push)


@dataclass(frozen=True)
class ConditionedOn:
    """A denoiser with its condition fixed, whatever it is asked for: `cond` must fit every batch that comes."""

    denoiser: Denoiser
    cond: Conditioning

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        """See `Denoiser`; `cond` is not looked at."""
        return self.denoiser(x_t, t, self.cond)


@dataclass(frozen=True)
class Autoguided:
    """Guidance by a weaker version of the model itself (Karras et al. 2024b, eq. 3): weak + scale (model - weak).

    Scale 1 is exactly the model and 0 exactly the weak one; outside `interval` it is the model, whatever the scale.
    Both see the same condition: unlike the other kinds it sharpens unconditional models too.

    Attributes:
        denoiser: the model.
        weak: a smaller, or less trained, model of the same data, as a denoiser on the same schedule.
        schedule: of both.
        scale: guidance scale.
        interval: (low, high) as fractions of T within which guidance acts, ends included.
    """

    denoiser: Denoiser
    weak: Denoiser
    schedule: NoiseSchedule
    scale: float
    interval: tuple[float, float] = ALWAYS

    def __post_init__(self) -> None:
        _check(self.scale, self.interval)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        """See `Denoiser`."""
        if self.scale == 1 or not _acts(self.interval, t, self.schedule):
            return self.denoiser(x_t, t, cond)
        if self.scale == 0:
            return self.weak(x_t, t, cond)
        pred = self.denoiser(x_t, t, cond)
        weak = self.weak(x_t, t, cond)
        return replace(
            pred, x0=torch.lerp(weak.x0, pred.x0, self.scale), eps=torch.lerp(weak.eps, pred.eps, self.scale)
        )


def _acts(interval: tuple[float, float], t: Tensor, schedule: NoiseSchedule) -> bool:
    """Whether guidance acts at t, which is the same for the whole batch in every sampler."""
    return interval == ALWAYS or interval[0] <= float(t.max()) / schedule.num_steps <= interval[1]


def _spread(x: Tensor) -> Tensor:
    """The standard deviation of each image over all its elements, [B, 1, ..., 1]."""
    return x.std(tuple(range(1, x.dim())), correction=0, keepdim=True)


def _check(scale: float, interval: tuple[float, float]) -> None:
    if scale < 0:
        raise ValueError(f"guidance scale must be >= 0, got {scale}")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"interval must satisfy 0 <= low <= high <= 1, got {interval}")
