"""The likelihood of images under a model by the probability-flow ODE, in bits per dimension.

The denoiser is called in the dtype of the images; all other arithmetic is float64. Random numbers depend on (seed,
image id), never on the batch.

Results depend on three conventions. 8-bit data is x = k / 127.5 - 1. The density of dequantized x is converted to one
of k by an offset of log2(127.5) bits per dimension. The ODE starts at the noise level of `t_min` and has the prior N(0,
I) at T; starting above 0 costs bits that no solver can avoid, see `truncation_cost`.
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
"""Default noise level at which the ODE starts: the sigma of score_sde's t = 1e-5."""

_MAX_STEPS = 1_000  # a few dozen are usual


@dataclass(frozen=True)
class OdeDensity:
    """The log-density of x under the probability-flow ODE.

    Attributes:
        log_density: log-density of x at t_min, in nats, float64 [B].
        x_T: solution of the ODE at T, float64 [B, C, H, W].
        nfe: number of denoiser evaluations.
        t_min: the level at which the ODE starts from x.
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
    """Return log p(x) by the probability-flow ODE from `t_min` to T (Song et al. 2021b, sec. 4.3, app. D.2).

    In the angle phi = atan2(sigma, alpha) the ODE of a variance-preserving process is exactly dx / dphi = v(x, phi) =
    alpha eps - sigma x_0 (Salimans & Ho 2022, app. D), which is finite up to T, with zero terminal SNR
    too. Along a solution d log p / dphi = -div v, so that log p(x) = log prior(x_T) + the integral of div v. The whole
    batch shares the adaptive steps, so a result depends on its batch, within the tolerances, which hold for every
    image.

    Args:
        denoiser: maps (x_t [B, C, H, W], t [B], cond) to a `Prediction`, t real; must be differentiable in x_t.
            `ClassifierGuided` is not, because it treats its own gradient as a constant.
        x: images at noise level `t_min`, [B, C, H, W].
        probes: [P, B, C, H, W] of mean 0 and covariance I, such as `rademacher`, for Hutchinson's unbiased estimate of
            the divergence (Grathwohl et al. 2019, eq. 7-8); the same probes are used in every step. None computes the
            exact divergence. Each evaluation needs P or C H W vector-Jacobian products.
        t_min: level at which the ODE starts from x, in (0, T); None is the t with sigma = `SIGMA_MIN`. Scores may be
            singular at t = 0, and below t = 1 a network is given its input for t = 1. A higher level costs more bits
            (`truncation_cost`).
        prior: log-density of x_T in nats, [B, C, H, W] -> [B]; None is N(0, I).
        rtol, atol: relative and absolute tolerance of x and of the log-density per dimension.
        method: an adaptive Runge-Kutta method of torchdiffeq.
        dtype: dtype in which the denoiser is called; None is that of x.

    Raises:
        ValueError: an argument is out of range, the denoiser is not differentiable, or the solver fails.
        ImportError: torchdiffeq is not installed.

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.schedule import Linear
        >>> schedule, x = Linear().make(1000), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")  # the best denoiser of N(0, I)
        >>> round(log_density(gaussian, schedule, x).log_density.item(), 6), round(-4 * math.log(2 * math.pi) / 2, 6)
        (-3.675754, -3.675754)
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
    """The likelihood of quantized images under the probability-flow ODE.

    Attributes:
        bits_per_dim: -log2 p(x) / D + offset for the dequantized images, float64 [B]. Its mean over dequantizations is
            an upper bound on the bits per dimension of the quantized images (Flow++, Ho et al. 2019, sec. 3.1).
        offset: log2((levels - 1) / 2), which converts a density of x to one of the levels.
        nfe: number of denoiser evaluations.
        t_min: the level at which the ODE starts from the dequantized images.
        truncation_cost: the largest part of `bits_per_dim` that starting at t_min instead of 0 can cause for an exact
            model, reached by a pixel with the same value in all images; for smooth data it is far less. See
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
    """Return bits per dimension of uniformly dequantized images by `log_density`, which documents the other arguments.

    Args:
        x_0: images in [-1, 1] with values on the grid of `levels`, [B, C, H, W].
        seed: seed of the dequantization and the probes.
        image_ids: id of each image, int64 [B]; the same seed and id give the same noise and probes in every batch.
        trace: "hutchinson", an unbiased estimate of the divergence, or "exact", for small images.
        probes: number of `rademacher` probes for "hutchinson", >= 1.
        levels: number of grey levels of the data.

    Raises:
        ValueError: an argument is out of range, x_0 has values off the grid, or `log_density` rejects an argument.
        ImportError: torchdiffeq is not installed.

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.schedule import Linear
        >>> schedule = Linear().make(1000)
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")  # the best denoiser of N(0, I)
        >>> x_0 = torch.full((1, 1, 2, 2), 1 / 255)  # one of the two greys next to 0
        >>> found = ode_bits_per_dim(gaussian, schedule, x_0, seed=0, image_ids=torch.arange(1), trace="exact")
        >>> round(found.bits_per_dim.item(), 3), round(math.log2(127.5 * math.sqrt(2 * math.pi)), 3)  # N(0, I) at 0
        (8.32, 8.32)
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
    """Return the bits per dimension that a pixel of constant value costs because the ODE starts at noise level `sigma`.

    An exact model needs 0 bits for the quantized value of such a pixel. Dequantized, the pixel is uniform in its bin;
    at noise level sigma its density is that uniform one convolved with N(0, sigma^2). The cost is the mean of -log2 of
    this density, relative to the uniform one. At 256 levels it is 1.75 bits for sigma = 0.01 (t = 1 of the linear
    schedule), 1.20 for 0.0064 (t = 1 of cosine), 0.18 for 0.001 and 0.018 for 0.0001. The difference between q(x_T) and
    the prior N(0, I) costs another 1e-5 bits or less.

    Args:
        sigma: noise level of `t_min`, > 0.
        levels: number of grey levels of the data.

    Examples:
        >>> [round(truncation_cost(sigma), 3) for sigma in (0.01, 0.001, 0.0001)]
        [1.748, 0.176, 0.018]
    """
    half = 1 / (levels - 1)
    points = 8192
    u = half * ((2 * torch.arange(points, dtype=torch.float64) + 1) / points - 1)
    mass = torch.special.ndtr((half - u) / sigma) - torch.special.ndtr((-half - u) / sigma)
    return -mass.log2().mean().item()


def dequantize(x_0: Tensor, levels: int = 256, *, seed: int, image_ids: Tensor) -> Tensor:
    """Return x_0 + (2 u - 1) / (levels - 1) with u uniform in (0, 1), float64 of x_0's shape.

    The result is uniform in the bin around each level. Level k, which is x = 2 k / (levels - 1) - 1, becomes
    2 (k + u - 1/2) / (levels - 1) - 1, which lies within +-levels / (levels - 1).

    Args:
        x_0: images in [-1, 1] with values on the grid of `levels`, [B, C, H, W].
        image_ids: id of each image, int64 [B].

    Raises:
        ValueError: x_0 has values off the grid, or `image_ids` does not have one id per image.

    Examples:
        >>> x_0 = torch.tensor([-1.0, 1 / 3]).reshape(1, 1, 1, 2)
        >>> x = dequantize(x_0, levels=4, seed=0, image_ids=torch.arange(1))
        >>> bool(((x - x_0).abs() < 1 / 3).all())  # within half a level
        True
    """
    check_image_ids(image_ids, x_0)
    check_grid(x_0, levels)
    u = uniform(seed, image_ids.to(x_0.device), Purpose.DEQUANTIZE, x_0[0].numel()).reshape(x_0.shape)
    grid = ((x_0.double() + 1) * (levels - 1) / 2).round()  # removes the rounding error of float32 images
    return 2 * (grid + u - 0.5) / (levels - 1) - 1


def rademacher(seed: int, image_ids: Tensor, shape: tuple[int, ...], probes: int = 1) -> Tensor:
    """Return random signs for Hutchinson's estimate, float64 [probes, B, *shape], different for each image.

    Raises:
        ValueError: `probes` < 1.

    Examples:
        >>> probes = rademacher(0, torch.arange(2), (3, 8, 8), probes=4)
        >>> probes.shape, probes.unique().tolist()
        (torch.Size([4, 2, 3, 8, 8]), [-1.0, 1.0])
    """
    if probes < 1:
        raise ValueError(f"probes must be >= 1, got {probes}")
    # Dequantization uses key 0 of this purpose. Each key has room for 2^32 images.
    bits = [words(seed, image_ids + ((i + 1) << 32), Purpose.DEQUANTIZE, math.prod(shape)) >> 31 for i in range(probes)]
    return (2 * torch.stack(bits).double() - 1).unflatten(2, shape)


class _Flow:
    """The right-hand side of the ODE in (x, log-density per dimension); it counts its evaluations."""

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
        angle = min(phi.item(), self.end)  # the solver's first trial step may go beyond the end
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
        """Return the trace of dy/dx, [B]; one vector-Jacobian product serves the batch, as images are independent."""

        def product(vector: Tensor) -> Tensor:
            return torch.autograd.grad(y, x, vector, retain_graph=True)[0].flatten(1)

        if self.probes is not None:
            return torch.stack([(v.flatten(1) * product(v)).sum(1) for v in self.probes.to(x)]).mean(0)
        basis = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).unflatten(1, x.shape[1:])
        return torch.stack([product(v.expand_as(x))[:, i] for i, v in enumerate(basis)]).sum(0)


def _integrate(
    flow: _Flow, x: Tensor, start: float, rtol: float, atol: float, method: OdeMethod
) -> tuple[Tensor, Tensor]:
    """Return x_T and the integral of the divergence in nats [B], from x at angle `start`."""
    if method not in get_args(OdeMethod):
        raise ValueError(f"unknown method {method!r}; allowed: {', '.join(get_args(OdeMethod))}")
    if not rtol > 0 or not atol > 0:
        raise ValueError(f"rtol and atol must be > 0, got {rtol} and {atol}")
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("the probability-flow likelihood needs torchdiffeq: pip install torchdiffeq") from error

    def worst(scaled: tuple[Tensor, Tensor]) -> Tensor:
        """Return the largest error of all images; the solver's own norm would average over the batch."""
        return torch.maximum(scaled[0].flatten(1).square().mean(1).sqrt(), scaled[1].abs()).max()

    span = torch.tensor([start, flow.end], dtype=x.dtype, device=x.device)
    # Without step_t the solver steps beyond the end and interpolates back, but the ODE may not exist beyond T.
    options = {"norm": worst, "step_t": span[1:], "max_num_steps": _MAX_STEPS}
    state = (x, torch.zeros(len(x), dtype=x.dtype, device=x.device))
    try:
        xs, changes = odeint(flow, state, span, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as error:  # torchdiffeq raises AssertionError when it fails
        raise ValueError(
            f"the probability-flow ODE cannot be solved to rtol={rtol}, atol={atol} ({error}): a larger t_min avoids "
            "a singular score, larger tolerances the rounding of a float32 network"
        ) from error
    return xs[-1], x[0].numel() * changes[-1]


def _standard_normal(x: Tensor) -> Tensor:
    return -(x.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2
