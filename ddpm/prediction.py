"""Predictions of a denoiser in every parameterization, and the `Denoiser` protocol of samplers and guidance.

At a given (x_t, t) the forms are linear in each other (Salimans & Ho 2022, sec. 4; Song et al. 2021b, eq. 9):
    x_t = alpha_t x_0 + sigma_t eps,   v = alpha_t eps - sigma_t x_0,   score = -eps / sigma_t.
"x0_skip" is x_0 by EDM's skip connection (Karras et al. 2022, eq. 7 and table 1, for data of standard deviation s),
    x_0 = (s^2 alpha_t x_t + r_t sigma_t F) / r_t^2,   r_t^2 = sigma_t^2 + s^2 alpha_t^2,
for an output F that is in units of x_0 instead of s. Where nearly all is noise it is F, and at t = 0 it is x_t.
"flow" is the velocity u of flow matching on the straight path z from x_0 to eps (Lipman et al. 2023; Liu et al. 2023),
    z = x_t / (alpha_t + sigma_t) = (1 - tau) x_0 + tau eps,   tau = sigma_t / (alpha_t + sigma_t),   u = eps - x_0,
which every schedule has up to that factor: u = (sigma_t - alpha_t) x_t + (alpha_t + sigma_t) v. A network with this
output sees z and the time 1,000 tau, so that what it computes does not depend on the schedule.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ddpm.conditioning import Conditioning
from ddpm.schedule import NoiseSchedule
from ddpm.settings import Settings, setting

Parameterization = Literal["eps", "x0", "v", "score", "x0_skip", "flow"]
PARAMETERIZATIONS: tuple[Parameterization, ...] = ("eps", "x0", "v", "score", "x0_skip", "flow")
FLOW_TIME = 1000.0
"""Factor of tau in the time that a network of "flow" sees: that of SD3 and diffusers."""
SIGMA_DATA = 0.5
"""Standard deviation of images in [-1, 1], of "x0_skip" (EDM, Karras et al. 2022, table 1)."""


@dataclass(frozen=True)
class Prediction:
    """The prediction of a denoiser at (x_t, t): clean image and noise, [B, C, H, W] each.

    Attributes:
        x0: the clean image, E[x_0 | x_t] for an ideal denoiser.
        eps: the noise, with x_t = alpha_t x0 + sigma_t eps.
        variance_fraction: interpolation between the log-variances of the posterior (0) and beta (1), v of Improved
            DDPM, eq. 15; None if the network does not learn the variance. Unlike a variance, it is valid for any step
            size.
        mean_gradient: shift of a reverse step's mean per unit of the step's variance (classifier guidance by algorithm
            1 of Dhariwal & Nichol 2021), or None. If set, x0 and eps are not guided, and only samplers with a reverse
            variance can be used.
    """

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None
    mean_gradient: Tensor | None = None


class Denoiser(Protocol):
    """A function that estimates x_0 and eps from x_t [B, C, H, W] at t [B] in [0, T]; cond None: null condition."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction: ...


def coefficients(schedule: NoiseSchedule, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (alpha_t, sigma_t) in the dtype and on the device of `like`, shaped to broadcast over [B, C, H, W].

    Examples:
        >>> schedule = NoiseSchedule(torch.tensor([1, 0.36]).double())  # alpha_1 = 0.6, sigma_1 = 0.8
        >>> alpha, sigma = coefficients(schedule, torch.tensor([0, 1]), torch.zeros(2, 3, 8, 8))
        >>> alpha.shape, round(sigma[1].item(), 4)
        (torch.Size([2, 1, 1, 1]), 0.8)
    """
    alpha_bar = schedule.alpha_bar(t)
    return per_sample(alpha_bar.sqrt(), like), per_sample((1 - alpha_bar).sqrt(), like)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return a scalar or [B] in the dtype and on the device of `like`, shaped to broadcast over [B, C, H, W].

    Examples:
        >>> per_sample(torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 1, 1, 1])
    """
    return values.to(device=like.device, dtype=like.dtype).reshape(-1, *(1,) * (like.dim() - 1))


def skip_coefficients(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of x_t and of the output in the x_0 of "x0_skip"; see the module's text.

    Examples:
        >>> skip, out = skip_coefficients(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        >>> skip.tolist(), out.tolist()
        ([1.0, 0.0], [0.0, 1.0])
    """
    total = sigma.square() + (SIGMA_DATA * alpha).square()
    return SIGMA_DATA**2 * alpha / total, sigma / total.sqrt()


def from_output(
    output: Tensor, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule, kind: Parameterization
) -> Prediction:
    """Return the `Prediction` for a network output of this parameterization.

    Raises:
        ValueError: the kind is unknown, or the output does not determine x_0 at this t (eps at alpha_t = 0).

    Examples:
        >>> schedule = NoiseSchedule(torch.tensor([1, 0.36]).double())  # alpha_1 = 0.6, sigma_1 = 0.8
        >>> from_output(torch.zeros(1), torch.ones(1), 1, schedule, "v")
        Prediction(x0=tensor([0.6000]), eps=tensor([0.8000]), variance_fraction=None, mean_gradient=None)
    """
    alpha, sigma = coefficients(schedule, t, x_t)
    if kind == "v":
        return Prediction(x0=alpha * x_t - sigma * output, eps=sigma * x_t + alpha * output)
    if kind == "flow":
        total = alpha + sigma
        return Prediction(x0=(x_t - sigma * output) / total, eps=(x_t + alpha * output) / total)
    if kind == "x0_skip":
        skip, out = skip_coefficients(alpha, sigma)
        output, kind = skip * x_t + out * output, "x0"
    if kind == "x0":
        return Prediction(x0=output, eps=eps_from_x0(output, x_t, t, schedule))
    if kind == "score":
        output, kind = -sigma * output, "eps"
    if kind == "eps":
        if bool((alpha == 0).any()):
            raise ValueError("eps does not determine x_0 where alpha_t = 0 (zero terminal SNR): predict v or x0")
        return Prediction(x0=(x_t - sigma * output) / alpha, eps=output)
    raise ValueError(f"unknown parameterization {kind!r}; allowed: {', '.join(PARAMETERIZATIONS)}")


def network_input(x_t: Tensor, t: Tensor, schedule: NoiseSchedule, kind: Parameterization) -> tuple[Tensor, Tensor]:
    """Return what a network of this parameterization sees of (x_t, t): images [B, C, H, W] and times, float32 [B].

    They are x_t and the table index t - 1. For t in [0, 1) that is the index 0, the lowest noise level that the network
    was trained on. "flow" sees z and 1,000 tau; see the module's text.

    Args:
        t: timesteps in [0, T], [B].

    Examples:
        >>> schedule, x_t = NoiseSchedule(torch.tensor([1, 0.5]).double()), torch.ones(1, 1, 1, 1)
        >>> [round(float(seen), 4) for seen in network_input(x_t, torch.tensor([1]), schedule, "flow")]
        [0.7071, 500.0]
    """
    if kind == "flow":
        alpha, sigma = coefficients(schedule, t, x_t)
        return x_t / (alpha + sigma), (FLOW_TIME * schedule.flow_time(t)).float()
    return x_t, (t - 1).clamp(min=0).float()


def target(x_0: Tensor, eps: Tensor, t: Tensor | float, schedule: NoiseSchedule, kind: Parameterization) -> Tensor:
    """Return the regression target of this parameterization for x_t = alpha_t x_0 + sigma_t eps.

    Examples:
        >>> schedule = NoiseSchedule(torch.tensor([1, 0.36]).double())  # alpha_1 = 0.6, sigma_1 = 0.8
        >>> [round(target(torch.zeros(1), torch.ones(1), 1, schedule, k).item(), 4) for k in ("eps", "v", "score")]
        [1.0, 0.6, -1.25]
    """
    alpha, sigma = coefficients(schedule, t, x_0)
    if kind == "eps":
        return eps
    if kind == "x0":
        return x_0
    if kind == "v":
        return alpha * eps - sigma * x_0
    if kind == "score":
        return -eps / sigma
    if kind == "flow":
        return eps - x_0
    if kind == "x0_skip":
        skip, out = skip_coefficients(alpha, sigma)
        return (x_0 - skip * (alpha * x_0 + sigma * eps)) / out
    raise ValueError(f"unknown parameterization {kind!r}; allowed: {', '.join(PARAMETERIZATIONS)}")


def eps_from_x0(x_0: Tensor, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule) -> Tensor:
    """Return the eps with x_t = alpha_t x_0 + sigma_t eps; 0 at t = 0, where sigma_t is 0.

    Examples:
        >>> schedule = NoiseSchedule(torch.tensor([1, 0.36]).double())  # alpha_1 = 0.6, sigma_1 = 0.8
        >>> round(eps_from_x0(torch.tensor([1.0]), torch.tensor([2.2]), 1, schedule).item(), 4)
        2.0
    """
    alpha, sigma = coefficients(schedule, t, x_t)
    return torch.where(sigma > 0, (x_t - alpha * x_0) / torch.where(sigma > 0, sigma, 1), torch.zeros_like(x_t))


def clip_x0(
    prediction: Prediction, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule, bound: float
) -> Prediction:
    """Return the prediction with x_0 clipped to [-bound, bound] and eps recomputed to match x_t.

    Examples:
        >>> schedule = NoiseSchedule(torch.tensor([1, 0.36]).double())  # alpha_1 = 0.6, sigma_1 = 0.8
        >>> clipped = clip_x0(Prediction(torch.tensor([3.0]), torch.zeros(1)), torch.tensor([1.4]), 1, schedule, 1.0)
        >>> clipped.x0.item(), round(clipped.eps.item(), 4)
        (1.0, 1.0)
    """
    x_0 = prediction.x0.clamp(-bound, bound)
    return replace(prediction, x0=x_0, eps=eps_from_x0(x_0, x_t, t, schedule))


@dataclass(frozen=True)
class Clipped:
    """A denoiser whose x_0 is clipped to [-bound, bound] (DDPM's code), with eps recomputed to match.

    Attributes:
        denoiser: the denoiser whose x_0 is clipped.
        schedule: noise schedule of the denoiser.
        bound: bound on |x_0|; 1 for images in [-1, 1].
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    bound: float = 1.0

    def __post_init__(self) -> None:
        if self.bound <= 0:
            raise ValueError(f"bound must be > 0, got {self.bound}")

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        """See `Denoiser`."""
        return clip_x0(self.denoiser(x_t, t, cond), x_t, t, self.schedule, self.bound)


@dataclass(frozen=True)
class DynamicThreshold:
    """A denoiser with Imagen's dynamic thresholding (Saharia et al. 2022, sec. 2.3), against saturation by guidance.

    x_0 is clipped to [-s, s] and divided by s, where s is the image's own `quantile` of |x_0|, at least 1.

    Attributes:
        denoiser: the denoiser whose x_0 is thresholded.
        schedule: noise schedule of the denoiser.
        quantile: quantile of |x_0| over an image, in (0, 1]; 1 scales without clipping.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    quantile: float = 0.995

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile must be in (0, 1], got {self.quantile}")

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        """See `Denoiser`."""
        pred = self.denoiser(x_t, t, cond)
        exact = torch.promote_types(pred.x0.dtype, torch.float32)  # torch.quantile has no half precision
        size = torch.quantile(pred.x0.abs().flatten(1).to(exact), self.quantile, dim=1).clamp(min=1)
        s = per_sample(size, x_t)
        x_0 = pred.x0.clamp(-s, s) / s
        return replace(pred, x0=x_0, eps=eps_from_x0(x_0, x_t, t, self.schedule))


@dataclass(frozen=True)
class Clipping(Settings):
    """The settings that keep a predicted x_0 within the range of images.

    Examples:
        >>> schedule = NoiseSchedule(torch.tensor([1, 0.36]).double())  # alpha_1 = 0.6, sigma_1 = 0.8
        >>> [type(Clipping(threshold=q).wrap(nn.Identity(), schedule)).__name__ for q in (None, 0.995)]
        ['Clipped', 'DynamicThreshold']
    """

    clip: float | None = setting(1.0, "bound on the predicted |x_0|; null for no clipping", gt=0)
    threshold: float | None = setting(None, "quantile of dynamic thresholding, instead of clipping", gt=0, le=1)
    clip_when: Literal["after_guidance", "before_guidance"] = setting(
        "after_guidance", "whether the guided prediction is clipped, or each prediction that guidance combines"
    )

    def wrap(self, denoiser: Denoiser, schedule: NoiseSchedule) -> Denoiser:
        """Return the denoiser with its x_0 clipped, or thresholded where `threshold` is set."""
        if self.threshold is not None:
            return DynamicThreshold(denoiser, schedule, self.threshold)
        return denoiser if self.clip is None else Clipped(denoiser, schedule, self.clip)


def computes_bf16(device: torch.device) -> bool:
    """Return whether a device computes faster in bfloat16 than in float32.

    A T4, a V100 and older processors only emulate it. Intel's processors have instructions for it without AMX, too, but
    multiply matrices by them in twice the time that float32 takes, where AMD's take half; see docs/performance.md.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and _processor_maker() != "GenuineIntel"


@cache
def _processor_maker(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the maker of this machine's processor, as it says itself; "" where that is not known."""
    found = re.search(r"^vendor_id\s*: (\S+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return found.group(1) if found else ""


@dataclass(frozen=True)
class HalfPrecision:
    """A denoiser whose networks compute convolutions and matrix products in bfloat16 (autocast), all else as before.

    On a device that is slower in bfloat16 they compute in float32, with a warning.

    Attributes:
        denoiser: the denoiser, with its guidance.
    """

    denoiser: Denoiser

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        """See `Denoiser`."""
        if not computes_bf16(x_t.device):
            # Once a process: Python shows a warning of one place once.
            warnings.warn(
                "precision = bf16: this device computes more slowly in it than in fp32, in which the networks compute "
                "here",
                stacklevel=2,
            )
            return self.denoiser(x_t, t, cond)
        with torch.autocast(x_t.device.type, torch.bfloat16):
            return self.denoiser(x_t, t, cond)


@dataclass(frozen=True)
class Arithmetic(Settings):
    """The settings of the arithmetic in which a model draws.

    Examples:
        >>> type(Arithmetic(precision="bf16").wrap(nn.Identity())).__name__
        'HalfPrecision'
    """

    precision: Literal["fp32", "bf16"] = setting(
        "fp32",
        "arithmetic of the networks while they draw; bf16 is faster where the machine computes in it, and else fp32",
    )
    compile: bool = setting(False, "whether torch.compile translates the networks first, which takes a minute or so")

    def of_network(self, denoiser: Denoiser) -> Denoiser:
        """Return a network's denoiser with that compiled, where it is asked for; any other stays as it is."""
        if self.compile and isinstance(denoiser, NetworkDenoiser):
            return replace(denoiser, compiled=True)
        return denoiser

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        """Return the denoiser in this arithmetic; with "fp32" it is the networks' own."""
        return HalfPrecision(denoiser) if self.precision == "bf16" else denoiser


def check_parameterization(kind: str) -> None:
    """Raise unless the parameterization exists.

    Raises:
        ValueError: `kind` is not in `PARAMETERIZATIONS`.

    Examples:
        >>> check_parameterization("noise")
        Traceback (most recent call last):
            ...
        ValueError: unknown parameterization 'noise'; allowed: eps, x0, v, score, x0_skip, flow
    """
    if kind not in PARAMETERIZATIONS:
        raise ValueError(f"unknown parameterization {kind!r}; allowed: {', '.join(PARAMETERIZATIONS)}")


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Return (prediction, variance fraction) from a network's output for images of `channels` channels.

    A network with twice as many output channels learns the variance: the second half, mapped from [-1, 1] to [0, 1] but
    not clamped, is the variance fraction (Improved DDPM, Nichol & Dhariwal 2021, sec. 3.1). Otherwise it is None.

    Examples:
        >>> prediction, fraction = split_output(torch.ones(2, 6, 8, 8), channels=3)
        >>> prediction.shape, fraction.max().item()
        (torch.Size([2, 3, 8, 8]), 1.0)
    """
    if output.shape[1] == 2 * channels:
        prediction, raw = output.split(channels, dim=1)
        return prediction, (raw + 1) / 2
    return output, None


def _call(network: nn.Module, x_t: Tensor, row: Tensor, cond: Conditioning | None) -> Tensor:
    output: Tensor = network(x_t, row, cond)
    return output


@cache
def _compiled_call() -> Callable[..., Tensor]:
    # One function for all networks, which are its arguments: compiled code goes with the network that it is of.
    return torch.compile(_call)


@dataclass(frozen=True)
class NetworkDenoiser:
    """A trained network as a `Denoiser`.

    Attributes:
        network: maps (x_t, table index t - 1 [B], cond) to an output of `kind`, [B, C, H, W], or [B, 2 C, H, W] if it
            learns the variance; see `network_input`.
        schedule: noise schedule that the network was trained with.
        kind: parameterization of the network's output.
        compiled: whether `torch.compile` translates the network at its first call. A second batch size is translated
            once more, for all sizes; those of a training step are not touched.

    Examples:
        >>> schedule = NoiseSchedule(torch.tensor([1, 0.36]).double())  # alpha_1 = 0.6, sigma_1 = 0.8
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")  # the best denoiser of N(0, I)
        >>> pred = gaussian(torch.ones(1, 1, 1, 1), torch.tensor([1]))
        >>> round(pred.x0.item(), 4), round(pred.eps.item(), 4)
        (0.6, 0.8)
    """

    network: nn.Module
    schedule: NoiseSchedule
    kind: Parameterization = "eps"
    compiled: bool = False

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        """Return the prediction of one forward pass; see `Denoiser`."""
        t = torch.as_tensor(t, dtype=torch.float64, device=x_t.device).expand(len(x_t))
        call = _compiled_call() if self.compiled else _call
        output = call(self.network, *network_input(x_t, t, self.schedule, self.kind), cond).to(x_t.dtype)
        output, fraction = split_output(output, x_t.shape[1])
        return replace(from_output(output, x_t, t, self.schedule, self.kind), variance_fraction=fraction)
