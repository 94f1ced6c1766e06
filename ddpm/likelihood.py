"""How probable a model finds images, by the probability-flow ODE, in bits per dimension.

A denoiser is called in the dtype of the images that it is given; everything round the calls is float64. Random numbers
belong to (seed, image), never to a batch.

Three conventions make numbers comparable, and all are explicit here. 8-bit data is x = k / 127.5 - 1; a dequantized
density of x becomes one of k by an offset of log2(127.5) bits per dimension; and the ODE's data is taken to lie at the
noise level of `t_min`, with N(0, I) at T for its prior. The last costs bits whatever the solver: `truncation_cost`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ddpm.bound import check_grid, check_image_ids, in_float64
from ddpm.conditioning import Conditioning
from ddpm.noise import Purpose, uniform, words
from ddpm.prediction import Denoiser
from ddpm.samplers.base import predict
from ddpm.schedule import NoiseSchedule

Trace = Literal["hutchinson", "exact"]
OdeMethod = Literal["dopri5", "dopri8", "bosh3"]
LogDensity = Callable[[Tensor], Tensor]

SIGMA_MIN = 1e-3
"""Noise level at which the ODE's data is taken to lie by default: that of score_sde, whose t = 1e-5 has this sigma."""

_MAX_STEPS = 1_000  # some dozens are usual


@dataclass(frozen=True)
class OdeDensity:
    """What the probability-flow ODE says about x.

    Attributes:
        log_density: of x at t_min, in nats, float64 [B].
        x_T: where the flow takes x, float64 [B, C, H, W].
        nfe: evaluations of the denoiser.
        t_min: the level at which x was taken to lie.
    """

    log_density: Tensor
    x_T: Tensor  # noqa: N815
    nfe: int
    t_min: float


def log_density(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    cond: Conditioning | None = None,
    *,
    probes: Tensor | None = None,
    t_min: float | None = None,
    prior: LogDensity | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: OdeMethod = "dopri5",
    dtype: torch.dtype | None = None,
) -> OdeDensity:
    """log p(x) by the probability-flow ODE from `t_min` to T (Song et al. 2021b, sec. 4.3, app. D.2).

    In the angle phi = atan2(sigma, alpha) the ODE of a variance-preserving process is exactly dx / dphi = v(x, phi) =
    alpha eps - sigma x_0 (Salimans & Ho 2022, app. D), finite up to T with zero terminal SNR too. Along it
    d log p / dphi = -div v, so that log p(x) = log prior(x_T) + the integral of div v. The adaptive steps are the whole
    batch's, so a result depends on the batch, within the tolerance, which the worst image of every step keeps.

    Args:
        denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`, t real; differentiable in x_t, which
            `ClassifierGuided` is not, since it takes its own gradient for a constant.
        x: at noise level `t_min`, [B, C, H, W].
        probes: [P, B, C, H, W] of mean 0 and covariance I, such as `rademacher`: Hutchinson's unbiased estimate of the
            divergence (Grathwohl et al. 2019, eq. 7-8), with the same probes all along the way. None is the exact
            divergence. P or C H W vector-Jacobian products an evaluation.
        t_min: level at which x is taken to lie, in (0, T); None is where sigma is `SIGMA_MIN`. At t = 0 itself scores
            may be singular, and below t = 1 a network is asked what it was trained on at 1; the higher the level, the
            more bits it costs (`truncation_cost`).
        prior: log-density of x_T in nats, [B, C, H, W] -> [B]; None is N(0, I).
        rtol, atol: tolerances, relative and absolute, of x and of the log-density per dimension.
        method: an adaptive Runge-Kutta method of torchdiffeq.
        dtype: in which the denoiser is called; None is x's.

    Raises:
        ValueError: an argument out of range, a denoiser that cannot be differentiated, or an ODE that cannot be solved.
        ImportError: torchdiffeq is not installed.
    """
    t_min = schedule.timestep(math.asin(SIGMA_MIN)).item() if t_min is None else t_min
    if not 0 < t_min < schedule.num_steps:
        raise ValueError(
            f"t_min must be in (0, {schedule.num_steps}), got {t_min}: at t = 0 itself the score may be singular"
        )
    if probes is not None and (probes.shape[1:] != x.shape or len(probes) == 0):
        raise ValueError(f"probes must be [P, *x.shape] with P >= 1, got {tuple(probes.shape)} for {tuple(x.shape)}")
    flow = _Flow(denoiser, schedule, cond, probes, x.dtype if dtype is None else dtype)
    x_T, change = _integrate(flow, x.detach().double(), schedule.angle(t_min).item(), rtol, atol, method)
    return OdeDensity((prior or _standard_normal)(x_T) + change, x_T, flow.nfe, t_min)


@dataclass(frozen=True)
class OdeBitsPerDim:
    """Likelihood of quantized images under the probability-flow ODE.

    Attributes:
        bits_per_dim: -log2 p(x) / D + offset for the dequantized images, float64 [B]. On average over dequantizations
            it is at least the bits per dimension of the quantized ones (Flow++, Ho et al. 2019, sec. 3.1).
        offset: log2((levels - 1) / 2), from a density of x to one of the levels.
        nfe: evaluations of the denoiser.
        t_min: the level at which the dequantized images were taken to lie.
        truncation_cost: bits per dimension, contained in `bits_per_dim`, that this costs where a pixel has one value in
            all images, which is the most that it can cost an exact model; smooth data hardly notices. See
            `truncation_cost`.
    """

    bits_per_dim: Tensor
    offset: float
    nfe: int
    t_min: float
    truncation_cost: float


def ode_bits_per_dim(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_0: Tensor,
    cond: Conditioning | None = None,
    *,
    seed: int,
    image_ids: Tensor,
    trace: Trace = "hutchinson",
    probes: int = 1,
    levels: int = 256,
    t_min: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: OdeMethod = "dopri5",
) -> OdeBitsPerDim:
    """Bits per dimension of uniformly dequantized images by `log_density`, which explains what is not said here.

    Args:
        x_0: images in [-1, 1] on the grid of `levels`, [B, C, H, W].
        seed: of the dequantization and the probes.
        image_ids: their numbers, int64 [B]: image i of a seed gets the same noise and probes in every batch.
        trace: "hutchinson", an unbiased estimate of the divergence, or "exact", for small images.
        probes: of the former, >= 1, `rademacher`'s.
        levels: grey levels of the data.

    Raises:
        ValueError: an argument out of range, images that are off the grid, or what `log_density` refuses.
        ImportError: torchdiffeq is not installed.
    """
    if trace not in get_args(Trace):
        raise ValueError(f"unknown trace {trace!r}; allowed: {', '.join(get_args(Trace))}")
    x = dequantize(x_0, levels, seed=seed, image_ids=image_ids)
    vectors = rademacher(seed, image_ids, tuple(x_0.shape[1:]), probes) if trace == "hutchinson" else None
    density = log_density(
        denoiser, schedule, x, cond, probes=vectors, t_min=t_min, rtol=rtol, atol=atol, method=method, dtype=x_0.dtype
    )
    offset = math.log2((levels - 1) / 2)
    bits = -density.log_density / (x_0[0].numel() * math.log(2)) + offset
    cost = truncation_cost(schedule.sigma(density.t_min).item(), levels)
    return OdeBitsPerDim(bits, offset, density.nfe, density.t_min, cost)


def truncation_cost(sigma: float, levels: int = 256) -> float:
    """Bits per dimension that a pixel of one constant value costs because the ODE stops at noise level `sigma`.

    Dequantized, such a pixel is uniform in its bin, and its quantized value costs an exact model 0 bits. At noise level
    sigma the density is that uniform one blurred by N(0, sigma^2), and the mean of -log2 of its mass per bin is what is
    returned: at 256 levels 1.75 bits at sigma = 0.01 (t = 1 of the linear schedule), 1.20 at 0.0064 (t = 1 of cosine),
    0.18 at 0.001, 0.018 at 0.0001. The prior N(0, I) costs besides what q(x_T) differs from it, 1e-5 bits and less.

    Args:
        sigma: noise level of `t_min`, > 0.
        levels: grey levels of the data.
    """
    half = 1 / (levels - 1)
    points = 8192
    u = half * ((2 * torch.arange(points, dtype=torch.float64) + 1) / points - 1)
    mass = torch.special.ndtr((half - u) / sigma) - torch.special.ndtr((-half - u) / sigma)
    return -mass.log2().mean().item()


def dequantize(x_0: Tensor, levels: int = 256, *, seed: int, image_ids: Tensor) -> Tensor:
    """x_0 + (2 u - 1) / (levels - 1), u uniform in (0, 1): uniform in the bin round each level, float64 like x_0.

    Level k of x = 2 k / (levels - 1) - 1 becomes 2 (k + u - 1/2) / (levels - 1) - 1, between -levels / (levels - 1)
    and its opposite.

    Args:
        x_0: images in [-1, 1] on the grid of `levels`, [B, C, H, W].
        image_ids: their numbers, int64 [B].

    Raises:
        ValueError: images that are off the grid, or `image_ids` not one number per image.
    """
    check_image_ids(image_ids, x_0)
    check_grid(x_0, levels)
    u = uniform(seed, image_ids.to(x_0.device), Purpose.DEQUANTIZE, x_0[0].numel()).reshape(x_0.shape)
    grid = ((x_0.double() + 1) * (levels - 1) / 2).round()  # float32 images are off by their rounding
    return 2 * (grid + u - 0.5) / (levels - 1) - 1


def rademacher(seed: int, image_ids: Tensor, shape: tuple[int, ...], probes: int = 1) -> Tensor:
    """Random signs for Hutchinson's estimate, float64 [probes, B, *shape]; each image has its own.

    Raises:
        ValueError: fewer than 1 probe.
    """
    if probes < 1:
        raise ValueError(f"probes must be >= 1, got {probes}")
    # Key 0 of this purpose is the dequantization's, with 2^32 images per key before two could share an ordinal.
    bits = [words(seed, image_ids + ((i + 1) << 32), Purpose.DEQUANTIZE, math.prod(shape)) >> 31 for i in range(probes)]
    return (2 * torch.stack(bits).double() - 1).unflatten(2, shape)


class _Flow:
    """The right-hand side of the ODE in (x, log-density per dimension), which counts its evaluations."""

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        cond: Conditioning | None,
        probes: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.denoiser, self.schedule, self.cond, self.probes, self.dtype = denoiser, schedule, cond, probes, dtype
        self.end = schedule.angle(schedule.num_steps).item()
        self.nfe = 0

    def __call__(self, phi: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.nfe += 1
        angle = min(phi.item(), self.end)  # the solver's first guess of a step may look beyond the end
        t = self.schedule.timestep(angle).item()
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            pred = in_float64(predict(self.denoiser, x.to(self.dtype), t, self.cond))
            velocity = math.cos(angle) * pred.eps - math.sin(angle) * pred.x0
        if not velocity.requires_grad:
            raise ValueError("the denoiser's answer has no gradient with respect to x_t, which the divergence needs")
        if not bool(velocity.isfinite().all()):
            raise ValueError(f"the denoiser's answer is not finite at t = {t:.6g}: a larger t_min may help")
        return velocity.detach(), self._divergence(velocity, x) / x[0].numel()

    def _divergence(self, y: Tensor, x: Tensor) -> Tensor:
        """Trace of dy/dx, [B]; a vector's product with the batch is one with each image, as none depends on another."""

        def product(vector: Tensor) -> Tensor:
            return torch.autograd.grad(y, x, vector, retain_graph=True)[0].flatten(1)

        if self.probes is not None:
            return torch.stack([(v.flatten(1) * product(v)).sum(1) for v in self.probes.to(x)]).mean(0)
        basis = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).unflatten(1, x.shape[1:])
        return torch.stack([product(v.expand_as(x))[:, i] for i, v in enumerate(basis)]).sum(0)


def _integrate(
    flow: _Flow, x: Tensor, start: float, rtol: float, atol: float, method: OdeMethod
) -> tuple[Tensor, Tensor]:
    """x_T and the integral of the divergence in nats [B], from x at angle `start`."""
    if method not in get_args(OdeMethod):
        raise ValueError(f"unknown method {method!r}; allowed: {', '.join(get_args(OdeMethod))}")
    if not rtol > 0 or not atol > 0:
        raise ValueError(f"rtol and atol must be > 0, got {rtol} and {atol}")
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("the probability-flow likelihood needs torchdiffeq: pip install torchdiffeq") from error

    def worst(scaled: tuple[Tensor, Tensor]) -> Tensor:
        """Of all images: in the solver's own norm a bad one hides among many good ones."""
        return torch.maximum(scaled[0].flatten(1).square().mean(1).sqrt(), scaled[1].abs()).max()

    span = torch.tensor([start, flow.end], dtype=x.dtype, device=x.device)
    # Without step_t the solver steps over the end and interpolates back; there may be nothing beyond.
    options = {"norm": worst, "step_t": span[1:], "max_num_steps": _MAX_STEPS}
    state = (x, torch.zeros(len(x), dtype=x.dtype, device=x.device))
    try:
        xs, changes = odeint(flow, state, span, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as error:  # this is how torchdiffeq gives up
        raise ValueError(
            f"the probability-flow ODE cannot be solved to rtol={rtol}, atol={atol} ({error}): a larger t_min avoids "
            "a singular score, larger tolerances the rounding of a float32 network"
        ) from error
    return xs[-1], x[0].numel() * changes[-1]


def _standard_normal(x: Tensor) -> Tensor:
    return -(x.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2
