"""Guidance: settings that wrap a denoiser. None of it needs training, so scale, interval and kind can be searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ddpm.choices import Choices
from ddpm.conditioning import Conditioning
from ddpm.prediction import Denoiser, Prediction, coefficients, eps_from_x0
from ddpm.schedule import NoiseSchedule
from ddpm.settings import Settings, setting

LogProb = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_t [B, C, H, W], t [B], condition y) -> log p(y | x_t) up to a constant, [B], differentiable in x_t."""

ALWAYS = (0.0, 1.0)


@dataclass(frozen=True)
class Guides:
    """Networks that guide a denoiser, and a condition to move away from.

    Attributes:
        log_prob: log-probability of a classifier of noisy images, for `ClassifierGuided`; `ddpm.models.classifier` has
            one for classes and one for text.
        weak: denoiser of a smaller or less trained model of the same data, on the same schedule, for `Autoguided`.
        negative: label or text of a negative prompt, for `ClassifierFree`; it must fit the size of every batch.
    """

    log_prob: LogProb | None = None
    weak: Denoiser | None = None
    negative: Conditioning | None = None


class Guidance(Protocol):
    """Settings of one kind of guidance.

    Attributes:
        scale: guidance scale.
    """

    @property
    def scale(self) -> float:
        """Guidance scale."""

    def wrap(self, denoiser: Denoiser, schedule: NoiseSchedule, guides: Guides | None = None) -> Denoiser:
        """Return the guided denoiser.

        Raises:
            ValueError: the guidance needs a network that `guides` does not have.
        """


@dataclass(frozen=True)
class _Guidance(Settings):
    """The settings of every kind of guidance: its scale and the interval in which it is applied."""

    scale: float = setting(1.0, "guidance scale", ge=0)
    interval: tuple[float, float] = setting(
        ALWAYS, "range of t / T in which guidance is applied, both ends included", ge=0, le=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"interval must be [low, high] with low <= high, got {list(self.interval)}")

    def acts(self, t: Tensor, schedule: NoiseSchedule) -> bool:
        """Return whether guidance is applied at t; every sampler uses one t for the whole batch."""
        low, high = self.interval
        return self.interval == ALWAYS or low <= float(t.max()) / schedule.num_steps <= high


@dataclass(frozen=True)
class ClassifierFree(_Guidance):
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, in the form null + scale (cond - null)).

    Scale 0 is exactly the unconditional model (without rescaling) and scale 1 exactly the conditional one, with one
    evaluation each; any other scale evaluates both in one batch of 2 B. Outside `interval` the conditional model is
    used without guidance (Kynkäänniemi et al. 2024). All channels are guided; known pixels (inpainting) condition both
    models. `rescale` is that of Lin et al. 2024, eq. 15-16, applied to x_0, against over-exposure at high scales; a
    guided x_0 with the same value in every pixel is not rescaled.

    A negative prompt takes the place of the null condition (as in Stable Diffusion's web UIs; Liu et al. 2022, sec.
    4.2, derive it as a negation): negative + scale (cond - negative). Scale 0 is then exactly the negative condition.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> def denoiser(x_t, t, cond):  # x_0 is 1 with the label, and 0 without
        ...     x_0 = torch.where(cond.drop, 0.0, 1.0).reshape(-1, 1, 1, 1)
        ...     return Prediction(x_0, x_0)
        >>> guided = ClassifierFree(scale=3.0).wrap(denoiser, Linear().make(1000))
        >>> guided(torch.zeros(1, 1, 1, 1), torch.tensor([500]), Conditioning(label=torch.tensor([0]))).x0.item()
        3.0
    """

    rescale: float = setting(
        0.0, "share by which the guided image's standard deviation is moved to the conditional one's", ge=0, le=1
    )

    def wrap(self, denoiser: Denoiser, schedule: NoiseSchedule, guides: Guides | None = None) -> Denoiser:
        """Return the guided denoiser; the null condition of `denoiser` is the unconditional model."""
        negative = None if guides is None else guides.negative

        def guided(x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
            if self.scale == 1 or not self.acts(t, schedule):
                return denoiser(x_t, t, cond)
            if negative is not None:
                known = Conditioning() if cond is None else cond
                base = replace(negative, mask=known.mask, context=known.context)
            elif cond is None:
                return denoiser(x_t, t, cond)
            else:
                base = cond.null()
            if self.scale == 0 and self.rescale == 0:
                return denoiser(x_t, t, base)
            if negative is not None or cond is None:  # texts differ in length, so the two cannot share a batch
                return self._combine(denoiser(x_t, t, cond), denoiser(x_t, t, base), schedule, x_t, t)
            return self._combine(*_with_null(denoiser, x_t, t, cond), schedule, x_t, t)

        return guided

    def _combine(
        self, pred: Prediction, base: Prediction, schedule: NoiseSchedule, x_t: Tensor, t: Tensor
    ) -> Prediction:
        guided = replace(
            pred, x0=torch.lerp(base.x0, pred.x0, self.scale), eps=torch.lerp(base.eps, pred.eps, self.scale)
        )
        if self.rescale == 0:
            return guided
        ratio = _spread(pred.x0) / _spread(guided.x0)
        ratio = torch.where(ratio.isfinite(), ratio, 1)  # a constant image has standard deviation 0
        rescaled = guided.x0 * (1 + self.rescale * (ratio - 1))
        return replace(guided, x0=rescaled, eps=eps_from_x0(rescaled, x_t, t, schedule))


@dataclass(frozen=True)
class ClassifierGuided(_Guidance):
    """Guidance by a classifier of noisy images (Dhariwal & Nichol 2021; Song et al. 2021b, eq. 14).

    It samples with the score of p(x_t) p(y | x_t)^scale, with the gradient at x_t. `shift` selects what is shifted:
        "score": eps = eps(x_t) - scale sigma_t grad log p(y | x_t)  (algorithm 2), for every sampler;
        "mean": the mean of p(x_s | x_t), by scale times its variance times the gradient  (algorithm 1), for samplers
            with a reverse variance. With the posterior's variance this is algorithm 2 with sigma_s^2 / alpha_s in place
            of sigma_t^2 / alpha_t: the two agree in the limit of small steps.
    The base is the unconditional model: scale 0 is exactly that, and by Bayes' rule scale 1 is the conditional one. To
    guide a conditional model, as the authors also do, wrap it in `ConditionedOn`, which fixes its condition. Guidance
    is not applied where alpha_t = 0, because x_t is pure noise there.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> schedule, x_t, cond = Linear().make(1000), torch.zeros(1, 1, 1, 1), Conditioning(label=torch.tensor([0]))
        >>> guides = Guides(log_prob=lambda x_t, t, cond: x_t.sum((1, 2, 3)))  # whose gradient is 1
        >>> guided = ClassifierGuided(scale=2.0).wrap(lambda x_t, t, cond: Prediction(x_t, 0 * x_t), schedule, guides)
        >>> round(guided(x_t, torch.tensor([500]), cond).eps.item() / schedule.sigma(500).item(), 4)
        -2.0
    """

    shift: Literal["score", "mean"] = setting("score", "what the classifier's gradient moves: the score, or the mean")
    classifier: str | None = setting(None, "MODEL trained with task=classifier", reference=True)

    def wrap(self, denoiser: Denoiser, schedule: NoiseSchedule, guides: Guides | None = None) -> Denoiser:
        """Return the guided denoiser; it calls `denoiser` without label and text."""
        _no_negative(guides, "classifier")
        if guides is None or guides.log_prob is None:
            raise ValueError("guidance by a classifier needs one: give `guides` with its log_prob")
        log_prob = guides.log_prob

        def guided(x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
            if cond is None:
                return denoiser(x_t, t, None)
            pred = denoiser(x_t, t, cond.null())
            if self.scale == 0 or not self.acts(t, schedule):
                return pred
            gradient = _gradient(log_prob, x_t, t, cond)
            alpha, sigma = coefficients(schedule, t, x_t)
            if self.shift == "mean":
                return replace(pred, mean_gradient=torch.where(alpha > 0, self.scale * gradient, 0))
            push = torch.where(alpha > 0, self.scale * sigma * gradient, 0)
            over_alpha = torch.where(alpha > 0, sigma / torch.where(alpha > 0, alpha, 1), 0)
            return replace(pred, x0=pred.x0 + over_alpha * push, eps=pred.eps - push)

        return guided


@dataclass(frozen=True)
class Autoguided(_Guidance):
    """Guidance by a weaker version of the model itself (Karras et al. 2024b, eq. 3): weak + scale (model - weak).

    Scale 1 is exactly the model and scale 0 exactly the weak one; outside `interval` the model is used without
    guidance. Both get the same condition, so this works for unconditional models too, unlike the other kinds.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> guides = Guides(weak=lambda x_t, t, cond: Prediction(x_t, x_t))
        >>> denoiser = lambda x_t, t, cond: Prediction(x_t + 1, x_t)
        >>> guided = Autoguided(scale=3.0).wrap(denoiser, Linear().make(1000), guides)
        >>> guided(torch.zeros(1, 1, 1, 1), torch.tensor([500])).x0.item()
        3.0
    """

    weak: str | None = setting(None, "MODEL that is smaller or less trained", reference=True)

    def wrap(self, denoiser: Denoiser, schedule: NoiseSchedule, guides: Guides | None = None) -> Denoiser:
        """Return the guided denoiser."""
        _no_negative(guides, "auto")
        if guides is None or guides.weak is None:
            raise ValueError("autoguidance needs a weaker model: give `guides` with it as `weak`")
        weak = guides.weak

        def guided(x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
            if self.scale == 1 or not self.acts(t, schedule):
                return denoiser(x_t, t, cond)
            if self.scale == 0:
                return weak(x_t, t, cond)
            pred, worse = denoiser(x_t, t, cond), weak(x_t, t, cond)
            x0, eps = torch.lerp(worse.x0, pred.x0, self.scale), torch.lerp(worse.eps, pred.eps, self.scale)
            return replace(pred, x0=x0, eps=eps)

        return guided


GUIDANCE: Choices[type[Guidance]] = Choices(
    "kind of guidance",
    "ddpm.guidance",
    {"classifier_free": ClassifierFree, "classifier": ClassifierGuided, "auto": Autoguided},
)


@dataclass(frozen=True)
class ConditionedOn:
    """A denoiser with a fixed condition, which must fit the size of every batch."""

    denoiser: Denoiser
    cond: Conditioning

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        """See `Denoiser`; the argument `cond` is ignored."""
        return self.denoiser(x_t, t, self.cond)


def _with_null(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Conditioning) -> tuple[Prediction, Prediction]:
    """Return the predictions with the condition and with the null condition, from one batch of 2 B."""
    batch = len(x_t)
    null = torch.arange(2 * batch, device=x_t.device) >= batch
    both = cond.map(lambda tensor: torch.cat([tensor, tensor])).dropped(null)
    pred = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    fraction = None if pred.variance_fraction is None else pred.variance_fraction[:batch]
    return (
        Prediction(pred.x0[:batch], pred.eps[:batch], fraction),
        Prediction(pred.x0[batch:], pred.eps[batch:]),
    )


def _no_negative(guides: Guides | None, kind: str) -> None:
    if guides is not None and guides.negative is not None:
        raise ValueError(
            f"a negative prompt takes the place of the null condition, which guidance={kind} does not have: use "
            "guidance=classifier_free, or leave the negative prompt out"
        )


def _gradient(log_prob: LogProb, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Return the gradient of log p(y | x_t) in x_t; 0 for samples with a dropped condition."""
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_prob(x, t, cond).sum(), x)
    if cond.drop is not None:
        gradient = gradient * ~cond.drop.reshape(-1, *(1,) * (x_t.dim() - 1))
    return gradient


def _spread(x: Tensor) -> Tensor:
    """Return the standard deviation of each image over all its elements, [B, 1, ..., 1]."""
    return x.std(tuple(range(1, x.dim())), correction=0, keepdim=True)
