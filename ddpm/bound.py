"""The variational bound on -log p(x_0): single terms (Monte-Carlo and KL form) and the whole sum.

The denoiser is called in the dtype of the images; all other arithmetic is float64, because the terms are differences of
nearly equal Gaussians. Random numbers depend on (seed, image id), never on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.gaussian import (
    DiagonalGaussian,
    ReverseVariance,
    kl,
    p_reverse,
    q_posterior,
    q_sample,
    q_transition,
    reverse_variance,
)
from ddpm.prediction import Denoiser, Prediction
from ddpm.quality import Interval, bootstrap
from ddpm.samplers.base import predict, step_noise
from ddpm.schedule import NoiseSchedule


def vlb_term(
    pred: Prediction,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    *,
    variance: ReverseVariance = "small",
    levels: int = 256,
) -> Tensor:
    """Return the bound's term at t in its KL form, bits per dimension, [B] (DDPM, eq. 5; the tutorial's second form).

    It is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 1, and the discretized -log p(x_0 | x_1) at t = 1.

    Args:
        pred: the denoiser's prediction at (x_t, t).
        t: timesteps 1..T, int64 [B].
        variance: fixed variance of p, used where the network does not learn it.
        levels: number of grey levels of the data.

    Examples:
        >>> from ddpm.prediction import from_output
        >>> from ddpm.schedule import Linear
        >>> schedule, t = Linear().make(1000), torch.tensor([500])
        >>> x_t, x_0 = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        >>> pred = from_output(x_0, x_t, t, schedule, "x0")  # the truth
        >>> vlb_term(pred, x_0, x_t, t, schedule).item()
        0.0
    """
    p = p_reverse(pred, x_t, t, t - 1, schedule, variance)
    q = q_posterior(x_t, x_0, t, t - 1, schedule)
    last = (t == 1).reshape(-1, *(1,) * (x_t.dim() - 1))
    # At t = 1 the posterior is a point: any positive variance keeps the unused branch, and its gradient, finite.
    divergence = kl(replace(q, variance=torch.where(last, 1, q.variance)), p)
    nats = torch.where(last, -p.discretized_log_prob(x_0, levels), divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def vlb_pair_term(
    pred: Prediction,
    x_s: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    *,
    variance: ReverseVariance = "small",
    x_0: Tensor | None = None,
) -> Tensor:
    """Return the bound's term at t from one drawn pair (x_{t-1}, x_t), in bits per dimension, [B] (DDPM, eq. 3).

    This is the tutorial's first, Monte-Carlo form, log q(x_t | x_{t-1}) - log p(x_{t-1} | x_t). Its sum over t = 1..T
    plus -log p(x_T) has the bound on a continuous x_0 as its expectation. A single term differs in expectation from
    `vlb_term` by E[log q(x_t | x_0) - log q(x_{t-1} | x_0)], which has no parameters and sums to the prior term.
    If x_0 is given, the term is log q(x_{t-1} | x_t, x_0) - log p(x_{t-1} | x_t) for t > 1, whose expectation equals
    `vlb_term` at every t.

    Args:
        pred: the denoiser's prediction at (x_t, t).
        x_s: x_{t-1}, drawn together with x_t, [B, C, H, W].

    Examples:
        >>> from ddpm.prediction import from_output
        >>> from ddpm.schedule import Linear
        >>> schedule, t = Linear().make(1000), torch.tensor([500])
        >>> x, x_0 = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        >>> pred = from_output(x_0, x, t, schedule, "x0")  # the truth
        >>> vlb_pair_term(pred, x, x, t, schedule, x_0=x_0).item()
        0.0
    """
    p = p_reverse(pred, x_t, t, t - 1, schedule, variance)
    if x_0 is None:
        q = q_transition(x_s, t - 1, t, schedule).log_prob(x_t)
    elif bool((t == 1).any()):
        raise ValueError("q(x_0 | x_1, x_0) is a point and has no density: t must be >= 2 where x_0 is given")
    else:
        q = q_posterior(x_t, x_0, t, t - 1, schedule).log_prob(x_s)
    return (q - p.log_prob(x_s)).flatten(1).mean(1) / math.log(2)


def vlb_weight(schedule: NoiseSchedule, t: Tensor, variance: ReverseVariance = "small") -> Tensor:
    """Return the weight of |eps - eps_theta|^2 in the bound's term at t, in nats, float64 of t's shape (DDPM, eq. 12).

    It is beta^2 / (2 var (1 - beta) (1 - alpha_bar)), where var is the fixed variance of p. L_simple has weight 1.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> weight = vlb_weight(Linear().make(1000), torch.tensor([2, 100, 1000]))
        >>> bool((weight.diff() < 0).all())  # unlike L_simple, the bound emphasises low noise
        True
    """
    beta = schedule.betas.to(t.device)[t - 1]
    var = reverse_variance(t, t - 1, schedule, variance)
    return beta.square() / (2 * var * (1 - beta) * (1 - schedule.alpha_bar(t)))


@dataclass(frozen=True)
class Bound:
    """The terms of an upper bound on -log2 p(x_0), in bits per dimension, float64, one noise draw per term.

    Attributes:
        prior: KL(q(x_T | x_0) || N(0, I)), [B].
        terms: [B, steps], by increasing noise: column 0 is the decoder's -log p(x_0 | x_t), column i > 0 is
            KL(q(x_s | x_t, x_0) || p(x_s | x_t)).
        timesteps: t of each column, int64 [steps]; s is the t of the previous column, 0 for column 0.

    Examples:
        >>> bound = Bound(prior=torch.tensor([0.25]), terms=torch.tensor([[2.0, 1.0]]), timesteps=torch.tensor([1, 2]))
        >>> bound.total.item()
        3.25
    """

    prior: Tensor
    terms: Tensor
    timesteps: Tensor

    @property
    def total(self) -> Tensor:
        """The bound: the prior term plus all other terms, [B]."""
        return self.prior + self.terms.sum(1)


def variational_bound(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_0: Tensor,
    cond: Conditioning | None = None,
    *,
    seed: int,
    image_ids: Tensor,
    steps: int | None = None,
    variance: ReverseVariance = "small",
    levels: int | None = 256,
) -> Bound:
    """Return the bound of one chain; see `variational_bounds`.

    Args:
        variance: fixed variance of p(x_s | x_t), used where it is not learned; see `reverse_variance` for s = 0.

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.schedule import Linear
        >>> schedule, x_0 = Linear().make(1000), torch.full((2, 1, 2, 2), -1.0)
        >>> black = NetworkDenoiser(lambda x, row, cond: torch.full_like(x, -1.0), schedule, "x0")
        >>> found = variational_bound(black, schedule, x_0, seed=0, image_ids=torch.arange(2), steps=5)
        >>> found.terms.shape, found.timesteps.tolist(), bool((found.terms[:, 1:] < 1e-9).all())
        (torch.Size([2, 5]), [200, 400, 600, 800, 1000], True)
    """
    found = variational_bounds(
        denoiser, schedule, x_0, cond, seed=seed, image_ids=image_ids, steps=steps, variances=(variance,), levels=levels
    )
    return found[variance]


@torch.no_grad()
def variational_bounds(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_0: Tensor,
    cond: Conditioning | None = None,
    *,
    seed: int,
    image_ids: Tensor,
    steps: int | None = None,
    variances: Sequence[ReverseVariance] = ("small", "large"),
    levels: int | None = 256,
) -> dict[ReverseVariance, Bound]:
    """Return an unbiased estimate of every term of DDPM's bound (Ho et al. 2020, eq. 5), with fresh noise for each t.

    A chain has a bound for each fixed variance of its steps, all of the same predictions of the network. Which of them
    is the tighter depends on the data and the schedule: DDPM, sec. 3.2, says for which data each one is optimal.

    Each term draws its own x_t from q(x_t | x_0). One trajectory for all terms would correlate them. The noise is
    `step_noise(seed, image_ids, shape)(t)`.

    Args:
        denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`; called `steps` times. Wrap an
            eps-prediction model in `Clipped`, as DDPM's code does: near T its x_0, and so the last term, is unbounded.
        x_0: clean images in [-1, 1], [B, C, H, W].
        seed: seed of the noise.
        image_ids: id of each image, int64 [B]; an image with the same seed and id has the same bound in every batch.
        steps: steps of the reverse chain; None uses every step of the schedule, a smaller number respaces it.
        variances: fixed variances of p(x_s | x_t), used where it is not learned; see `reverse_variance` for s = 0.
        levels: number of grey levels of the data, for the discretized decoder (DDPM, eq. 13). None is for continuous
            data: the decoder is a density, so the bound is on a log-density and may be negative.

    Returns:
        variance -> bound.

    Raises:
        ValueError: `steps` is out of range, `image_ids` does not have one id per image, or x_0 has values that are not
            one of the grey levels.
    """
    check_image_ids(image_ids, x_0)
    if levels is not None:
        check_grid(x_0, levels)
    dtype, x_0 = x_0.dtype, x_0.double()
    noise = step_noise(seed, image_ids.to(x_0.device), tuple(x_0.shape[1:]))
    pairs = list(schedule.pairs(schedule.num_steps if steps is None else steps))[::-1]
    terms: dict[ReverseVariance, list[Tensor]] = {variance: [] for variance in variances}
    for t, s in pairs:
        x_t = q_sample(x_0, t, noise(t).double(), schedule)
        pred = in_float64(predict(denoiser, x_t.to(dtype), t, cond))
        for variance in variances:
            p = p_reverse(pred, x_t, t, s, schedule, variance)
            if s > 0:
                nats = kl(q_posterior(x_t, x_0, t, s, schedule), p)
            else:
                nats = -(p.log_prob(x_0) if levels is None else p.discretized_log_prob(x_0, levels))
            terms[variance].append(bits_per_dim(nats))
    prior, timesteps = _prior_term(x_0, schedule), torch.tensor([t for t, _ in pairs])
    return {variance: Bound(prior, torch.stack(found, dim=1), timesteps) for variance, found in terms.items()}


def _prior_term(x_0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return KL(q(x_T | x_0) || N(0, I)), [B]; it has no parameters and is 0 with zero terminal SNR."""
    alpha_bar = schedule.alpha_bar(schedule.num_steps).to(x_0)
    q = DiagonalGaussian(alpha_bar.sqrt() * x_0, 1 - alpha_bar)
    return bits_per_dim(kl(q, DiagonalGaussian(torch.zeros_like(x_0), torch.ones_like(alpha_bar))))


def mean_bits_per_dim(bits: Tensor, *, seed: int = 0, draws: int = 1000, level: float = 0.95) -> Interval:
    """Return the mean over a dataset with its confidence interval, from `Bound.total` or `bits_per_dim`.

    The interval covers the choice of images and, with it, the noise that each image was evaluated with.

    Args:
        bits: bits per dimension of each image, [N], N >= 2.
        seed: seed of the bootstrap.
        draws: number of bootstrap draws.
        level: confidence level, in (0, 1).

    Raises:
        ValueError: `bits` is not a vector of finite numbers, or `bootstrap` rejects its arguments.

    Examples:
        >>> found = mean_bits_per_dim(torch.tensor([3.0, 4.0, 5.0, 4.0]), draws=100)
        >>> found.value, found.low <= found.value <= found.high
        (4.0, True)
    """
    if bits.dim() != 1 or not bool(bits.isfinite().all()):
        raise ValueError(f"bits must be finite, [N], got shape {tuple(bits.shape)}, finite: {bits.isfinite().all()}")
    return bootstrap(lambda part: part.double().mean().item(), bits, draws=draws, seed=seed, level=level)


def in_float64(pred: Prediction) -> Prediction:
    """Return the same prediction in float64.

    Examples:
        >>> in_float64(Prediction(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))).x0.dtype
        torch.float64
    """
    fraction, gradient = pred.variance_fraction, pred.mean_gradient
    return Prediction(
        pred.x0.double(),
        pred.eps.double(),
        None if fraction is None else fraction.double(),
        None if gradient is None else gradient.double(),
    )


def bits_per_dim(nats: Tensor) -> Tensor:
    """Convert nats per element [B, C, H, W] to bits per dimension [B].

    Examples:
        >>> bits_per_dim(torch.full((2, 3, 4, 4), math.log(256), dtype=torch.float64)).tolist()  # all grey levels alike
        [8.0, 8.0]
    """
    return nats.flatten(1).mean(1) / math.log(2)


def check_image_ids(image_ids: Tensor, x_0: Tensor) -> None:
    """Raise unless there is one image id for each image.

    Raises:
        ValueError: `image_ids` is not [B], or the batch is empty.

    Examples:
        >>> check_image_ids(torch.arange(3), torch.zeros(2, 1, 8, 8))
        Traceback (most recent call last):
            ...
        ValueError: image_ids must be one number per image, [2], got shape (3,)
    """
    if image_ids.shape != x_0.shape[:1] or len(image_ids) == 0:
        raise ValueError(f"image_ids must be one number per image, [{len(x_0)}], got shape {tuple(image_ids.shape)}")


def check_grid(x_0: Tensor, levels: int) -> None:
    """Raise unless every value is one of the grey levels: others have no probability under a discretized decoder.

    Raises:
        ValueError: there are fewer than 2 levels, or a value is not one of them.

    Examples:
        >>> check_grid(torch.tensor([-1.0, 1 / 3]), levels=4)
        >>> check_grid(torch.tensor([0.5]), levels=4)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: x_0 must lie on the grid of 4 levels from -1 to 1, but is off it by up to ...
    """
    if levels < 2:
        raise ValueError(f"levels must be >= 2, got {levels}")
    grid = (x_0.double() + 1) * (levels - 1) / 2
    off = (grid - grid.round().clamp(0, levels - 1)).abs().max().item()
    if not off < 0.01:
        raise ValueError(
            f"x_0 must lie on the grid of {levels} levels from -1 to 1, but is off it by up to {off:.3g} levels: "
            "pass the data's `levels`, and x = 2 k / (levels - 1) - 1"
        )
