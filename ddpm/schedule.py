"""Noise schedules: betas, alpha_bar and log-SNR of a variance-preserving forward process.

A schedule is a table over the timesteps t = 0, 1, ..., T with alpha_bar(0) = 1, so that
q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)  (DDPM, Ho et al. 2020, eq. 4).
Between table points the *angle* atan2(sigma, alpha) of Salimans & Ho (2022, app. D) is interpolated. It is monotone,
finite at both ends even with zero terminal SNR, and keeps alpha^2 + sigma^2 = 1 exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpm.choices import Choices
from ddpm.settings import Settings, setting

MAX_BETA = 0.999
"""Upper bound on the betas of schedules that end in pure noise (Nichol & Dhariwal 2021, sec. 3.2)."""


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving noise schedule with float64 tables.

    Attributes:
        alphas_cumprod: alpha_bar for t = 0..T, float64 [T + 1], starts at 1, strictly decreasing, >= 0.
        closed_form: alpha_bar as a function of real t in [0, T]; None interpolates the table.

    Examples:
        >>> schedule = NoiseSchedule(torch.tensor([1, 0.5, 0.2], dtype=torch.float64))
        >>> schedule.betas.tolist(), round(schedule.snr(1).item(), 6)
        ([0.5, 0.6], 1.0)
        >>> round(schedule.timestep(schedule.angle(1.5)).item(), 6)  # the inverse
        1.5
    """

    alphas_cumprod: Tensor
    closed_form: Callable[[Tensor], Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.dtype != torch.float64 or table.dim() != 1 or len(table) < 2:
            raise ValueError(
                f"alphas_cumprod must be float64 [T + 1] with T >= 1, got {table.dtype} {tuple(table.shape)}"
            )
        if table[0] != 1:
            raise ValueError(f"alphas_cumprod[0] must be 1 (no noise at t = 0), got {table[0].item()}")
        if not bool(torch.isfinite(table).all()) or not bool((table.diff() < 0).all()) or table[-1] < 0:
            raise ValueError("alphas_cumprod must be finite, strictly decreasing and >= 0: every step has to add noise")

    @property
    def num_steps(self) -> int:
        """The number of noising steps, T."""
        return len(self.alphas_cumprod) - 1

    @property
    def betas(self) -> Tensor:
        """The betas 1 - alpha_bar_t / alpha_bar_{t-1} for t = 1..T, float64 [T]."""
        return 1 - self.alphas_cumprod[1:] / self.alphas_cumprod[:-1]

    def alpha_bar(self, t: Tensor | float) -> Tensor:
        """Return alpha_bar at real t in [0, T], float64, of t's shape; exact at table points.

        Raises:
            ValueError: t is outside [0, T].
        """
        t, last = torch.as_tensor(t, dtype=torch.float64), self.num_steps
        if not bool((t.clamp(0, last) == t).all()):
            raise ValueError(f"t must be in [0, {last}], got {t.min().item()}..{t.max().item()}")
        lower = t.long()
        at_table = self.alphas_cumprod.to(t.device)[lower]
        on_grid = t == lower
        if bool(on_grid.all()):
            return at_table
        between = self.closed_form(t) if self.closed_form is not None else self._interpolate(t, lower)
        return torch.where(on_grid, at_table, between)

    def _interpolate(self, t: Tensor, lower: Tensor) -> Tensor:
        """Return alpha_bar between table points, by PCHIP interpolation of the angles (Fritsch & Butland 1984)."""
        angle, tangent = (values.to(t.device) for values in self._angles)
        i = lower.clamp(max=self.num_steps - 1)
        j, u = i + 1, t - i
        v = 1 - u
        uu, vv = u * u, v * v
        h00, h10 = (1 + 2 * u) * vv, u * vv
        h01, h11 = uu * (3 - 2 * u), uu * (u - 1)
        return (h00 * angle[i] + h10 * tangent[i] + h01 * angle[j] + h11 * tangent[j]).cos().square()

    @cached_property
    def _angles(self) -> tuple[Tensor, Tensor]:
        """The angles of the table, and the slopes with which PCHIP goes through them."""
        angle = torch.atan2((1 - self.alphas_cumprod).sqrt(), self.alphas_cumprod.sqrt())
        slope = angle.diff()
        left, right = slope[:-1], slope[1:]
        inner = torch.where(left * right > 0, 2 * left * right / (left + right), torch.zeros_like(left))
        return angle, torch.cat([slope[:1], inner, slope[-1:]])

    def alpha(self, t: Tensor | float) -> Tensor:
        """Return the signal level sqrt(alpha_bar_t), float64."""
        return self.alpha_bar(t).sqrt()

    def sigma(self, t: Tensor | float) -> Tensor:
        """Return the noise level sqrt(1 - alpha_bar_t), float64."""
        return (1 - self.alpha_bar(t)).sqrt()

    def snr(self, t: Tensor | float) -> Tensor:
        """Return the signal-to-noise ratio alpha_bar / (1 - alpha_bar), float64; infinite at t = 0."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar / (1 - alpha_bar)

    def log_snr(self, t: Tensor | float) -> Tensor:
        """Return the log-SNR, lambda of Kingma et al. (2021) up to its sign; it decreases from +inf at t = 0."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar.log() - torch.log1p(-alpha_bar)

    def ratio(self, t: Tensor | float) -> Tensor:
        """Return k = sigma / alpha, the noise level of EDM's variance-exploding process, float64; infinite at SNR 0."""
        alpha_bar = self.alpha_bar(t)
        return ((1 - alpha_bar) / alpha_bar).sqrt()

    def flow_time(self, t: Tensor | float) -> Tensor:
        """Return tau = sigma / (alpha + sigma), float64 in [0, 1]: flow matching's time at this SNR; see `Flow`."""
        alpha_bar = self.alpha_bar(t)
        sigma = (1 - alpha_bar).sqrt()
        return sigma / (alpha_bar.sqrt() + sigma)

    def angle(self, t: Tensor | float) -> Tensor:
        """Return atan2(sigma, alpha), float64, from 0 at t = 0 to at most pi / 2 (Salimans & Ho 2022, app. D)."""
        alpha_bar = self.alpha_bar(t)
        return torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt())

    def timestep(self, angle: Tensor | float) -> Tensor:
        """Return the real t in [0, T] with this angle, float64: the inverse of `angle`, found by search.

        Raises:
            ValueError: the schedule does not reach the angle.
        """
        angle = torch.as_tensor(angle, dtype=torch.float64)
        table = self.angle(torch.arange(self.num_steps + 1)).to(angle.device)
        if bool((angle < 0).any()) or bool((angle > table[-1]).any()):
            raise ValueError(f"angles must be in [0, {table[-1].item():.6g}] for this schedule, got {angle.tolist()}")
        lower = (torch.searchsorted(table, angle.contiguous()).double() - 1).clamp(min=0)
        # Search in 64 parts instead of halves: a call costs the same for 64 points as for one; for many angles in 8.
        # 64^8 = 8^16 = 2^48 is the resolution of float64 at T = 1000.
        count, rounds = (64, 8) if angle.numel() <= 16 else (8, 16)
        width, parts = 1.0, torch.arange(count + 1, dtype=torch.float64, device=angle.device) / count
        for _ in range(rounds):
            points = (lower.unsqueeze(-1) + width * parts).clamp(max=self.num_steps)
            below = (self.angle(points) < angle.unsqueeze(-1)).sum(-1) - 1
            lower, width = lower + width * below.clamp(min=0) / count, width / count
        return torch.where(angle == 0, 0.0, (lower + width).clamp(max=self.num_steps))

    def timestep_of_ratio(self, ratio: Tensor | float) -> Tensor:
        """Return the real t in [0, T] with this k = sigma / alpha, float64: the inverse of `ratio`, found by search.

        Raises:
            ValueError: the schedule does not reach the ratio.
        """
        angle = torch.atan(torch.as_tensor(ratio, dtype=torch.float64))
        top = self.angle(self.num_steps).to(angle.device)
        # The ratio of T itself may have been rounded up.
        return self.timestep(torch.where(angle <= top * (1 + 1e-14), angle.minimum(top), angle))

    def timesteps(self, steps: int) -> list[int]:
        """Return `steps` + 1 integer timesteps from T down to 0, as evenly spaced as integers allow.

        Raises:
            ValueError: `steps` is outside 1..T.
        """
        self.check_steps(steps)
        return [round(i * self.num_steps / steps) for i in range(steps, -1, -1)]

    def check_steps(self, steps: int) -> None:
        """Raise unless the schedule has at least this number of steps.

        Raises:
            ValueError: `steps` is outside 1..T.
        """
        if not 1 <= steps <= self.num_steps:
            raise ValueError(f"steps must be in 1..{self.num_steps} for this schedule, got {steps}")

    def pairs(self, steps: int) -> Iterator[tuple[int, int]]:
        """Return pairs (t, s) of successive timesteps from T down to 0, s < t: one per network evaluation."""
        grid = self.timesteps(steps)
        return itertools.pairwise(grid)

    def respace(self, steps: int) -> NoiseSchedule:
        """Return a schedule of `steps` steps, with the marginals of `timesteps(steps)` (Improved DDPM, sec. 4)."""
        return NoiseSchedule(self.alphas_cumprod[torch.tensor(self.timesteps(steps)[::-1])])

    def zero_terminal_snr(self) -> NoiseSchedule:
        """Return the schedule rescaled to alpha_bar_T = 0 with the same alpha_bar_1 (Lin et al. 2024, algorithm 1)."""
        root = self.alphas_cumprod[1:].sqrt()
        first, last = root[0], root[-1]
        rescaled = ((root - last) * first / (first - last)).square()
        return NoiseSchedule(torch.cat([torch.ones(1, dtype=torch.float64), rescaled]))

    def shifted(self, log_snr_shift: float) -> NoiseSchedule:
        """Return the schedule with its log-SNR shifted by a constant at every t (Hoogeboom et al. 2023, eq. 4).

        A shift below 0 adds noise at every step, which larger images need because their neighbouring pixels are
        similar.
        """
        factor = math.exp(log_snr_shift)

        def move(alpha_bar: Tensor) -> Tensor:
            return alpha_bar * factor / (1 - alpha_bar + alpha_bar * factor)

        form = self.closed_form
        return NoiseSchedule(move(self.alphas_cumprod), None if form is None else lambda t: move(form(t)))


def from_betas(betas: Tensor | Sequence[float]) -> NoiseSchedule:
    """Return the schedule with these betas for t = 1..T, each in (0, 1] (1 only at t = T).

    Examples:
        >>> from_betas([0.5, 0.5]).alphas_cumprod.tolist()
        [1.0, 0.5, 0.25]
    """
    betas = torch.as_tensor(betas, dtype=torch.float64)
    if betas.dim() != 1 or len(betas) == 0 or bool((betas <= 0).any()) or bool((betas > 1).any()):
        raise ValueError("betas must be a non-empty vector with every value in (0, 1]")
    return NoiseSchedule(torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)]))


def from_log_snr(log_snr: Callable[[Tensor], Tensor], num_steps: int) -> NoiseSchedule:
    """Return the schedule with a decreasing log-SNR of u = t / T in (0, 1], evaluated in float64.

    Examples:
        >>> from_log_snr(lambda u: 10 - 20 * u, num_steps=4).log_snr(torch.arange(1, 5)).round(decimals=3).tolist()
        [5.0, 0.0, -5.0, -10.0]
    """

    def closed_form(t: Tensor) -> Tensor:
        u = t.double() / num_steps
        return torch.where(u == 0, torch.ones_like(u), torch.sigmoid(log_snr(u.clamp(min=1e-12))))

    return NoiseSchedule(closed_form(torch.arange(num_steps + 1, dtype=torch.float64)), closed_form)


class ScheduleKind(Protocol):
    """The settings of a family of noise schedules."""

    def make(self, num_steps: int) -> NoiseSchedule:
        """Return the schedule of `num_steps` steps.

        Raises:
            ValueError: the settings are not valid for that number of steps.
        """


@dataclass(frozen=True)
class Linear(Settings):
    """Linear betas (DDPM, sec. 4), scaled by 1000 / T so that x_T is as noisy for every T (Improved DDPM's code).

    Examples:
        >>> [round(Linear().make(steps).alpha_bar(steps).item(), 5) for steps in (100, 1000)]  # nearly pure noise
        [2e-05, 4e-05]
    """

    beta_start: float = setting(1e-4, "beta at t = 1, for 1,000 steps", gt=0)
    beta_end: float = setting(0.02, "beta at t = T, for 1,000 steps", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta_start <= self.beta_end:
            raise ValueError(f"need 0 < beta_start <= beta_end, got {self.beta_start} and {self.beta_end}")

    def make(self, num_steps: int) -> NoiseSchedule:
        """See `ScheduleKind`."""
        scale = 1000 / num_steps
        start, end = self.beta_start * scale, self.beta_end * scale
        if end >= 1:
            least = math.floor(1000 * self.beta_end) + 1
            raise ValueError(f"linear betas reach {end:.3g} >= 1 with num_steps={num_steps}: use num_steps >= {least}")
        return from_betas(torch.linspace(start, end, num_steps, dtype=torch.float64))


@dataclass(frozen=True)
class Cosine(Settings):
    """Squared-cosine alpha_bar with offset s, betas capped at 0.999 (Nichol & Dhariwal 2021, eq. 17).

    Examples:
        >>> Cosine(s=0.0).make(4).alpha_bar(torch.arange(4)).round(decimals=3).tolist()  # cos^2(t / T * pi / 2)
        [1.0, 0.854, 0.5, 0.146]
    """

    s: float = setting(0.008, "offset that keeps the first betas from being too small", ge=0)

    def make(self, num_steps: int) -> NoiseSchedule:
        """See `ScheduleKind`."""
        s = self.s

        def alpha_bar(t: Tensor) -> Tensor:
            return (
                torch.cos((t / num_steps + s) / (1 + s) * math.pi / 2).square()
                / math.cos(s / (1 + s) * math.pi / 2) ** 2
            )

        exact = alpha_bar(torch.arange(num_steps + 1, dtype=torch.float64))
        return from_betas((1 - exact[1:] / exact[:-1]).clamp(max=MAX_BETA))


@dataclass(frozen=True)
class Sigmoid(Settings):
    """Sigmoid alpha_bar (Jabri et al. 2022, sec. 2.3; Chen 2023, algorithm 1), betas capped at 0.999.

    Examples:
        >>> round(Sigmoid().make(1000).alpha_bar(500).item(), 6)
        0.5
    """

    start: float = setting(-3.0, "argument of the sigmoid at t = 0")
    end: float = setting(3.0, "argument of the sigmoid at t = T")
    tau: float = setting(1.0, "temperature: the larger, the more even the steps", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start < self.end:
            raise ValueError(f"need start < end, got {self.start} and {self.end}")

    def make(self, num_steps: int) -> NoiseSchedule:
        """See `ScheduleKind`."""
        start, end, tau = self.start, self.end, self.tau
        v_start, v_end = _sigmoid(start / tau), _sigmoid(end / tau)
        u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        alpha_bar = (v_end - torch.sigmoid((u * (end - start) + start) / tau)) / (v_end - v_start)
        alpha_bar[0] = 1
        return from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA))


@dataclass(frozen=True)
class EDM(Settings):
    """EDM's sampling levels as a schedule: k = sigma / alpha is even in k^(1/rho) (Karras et al. 2022, eq. 5).

    Examples:
        >>> round(EDM().make(18).ratio(18).item(), 4), round(EDM().make(18).ratio(0.001).item(), 4)
        (80.0, 0.002)
    """

    sigma_min: float = setting(0.002, "sigma / alpha in the limit of small t, the least noise", gt=0)
    sigma_max: float = setting(80.0, "sigma / alpha at t = T, the most noise", gt=0)
    rho: float = setting(7.0, "the larger, the more steps are at low noise", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"need sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def make(self, num_steps: int) -> NoiseSchedule:
        """See `ScheduleKind`."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return from_log_snr(lambda u: -2 * self.rho * (low + u * (high - low)).log(), num_steps)


@dataclass(frozen=True)
class Flow(Settings):
    """The straight path of flow matching, z = (1 - tau) x_0 + tau eps (Lipman et al. 2023; Liu et al. 2023).

    Divided by sqrt((1 - tau)^2 + tau^2) it is the variance-preserving process with sigma / alpha = tau / (1 - tau),
    tau = t / T, which is this schedule; it ends in pure noise. A shift multiplies sigma / alpha, which larger images
    need (SD3, Esser et al. 2024, eq. 23); it is a `NoiseSchedule.shifted` by -2 ln(shift).

    Examples:
        >>> schedule = Flow().make(4)
        >>> schedule.ratio(torch.arange(4)).round(decimals=6).tolist(), schedule.alpha_bar(4).item()
        ([0.0, 0.333333, 1.0, 3.0], 0.0)
        >>> Flow(shift=3.0).make(4).ratio(torch.arange(4)).round(decimals=6).tolist()
        [0.0, 1.0, 3.0, 9.0]
    """

    shift: float = setting(1.0, "factor of sigma / alpha at every t; above 1 for large images, 3 in SD3", gt=0)

    def make(self, num_steps: int) -> NoiseSchedule:
        """See `ScheduleKind`."""

        def alpha_bar(t: Tensor) -> Tensor:
            tau = t.double() / num_steps
            signal, noise = (1 - tau).square(), (self.shift * tau).square()
            return signal / (signal + noise)

        return NoiseSchedule(alpha_bar(torch.arange(num_steps + 1, dtype=torch.float64)), alpha_bar)


SCHEDULES: Choices[type[ScheduleKind]] = Choices(
    "schedule", "ddpm.schedules", {"linear": Linear, "cosine": Cosine, "sigmoid": Sigmoid, "edm": EDM, "flow": Flow}
)


def make_schedule(
    kind: str,
    *,
    num_steps: int = 1000,
    zero_terminal_snr: bool = False,
    log_snr_shift: float = 0.0,
    betas: Sequence[float] | None = None,
    **settings: Any,
) -> NoiseSchedule:
    """Return a schedule by the name of its family, as used in configuration files and stored models.

    Args:
        kind: a name in `SCHEDULES`; or "betas", for a schedule given by its `betas`.
        num_steps: T; for "betas" their number.
        zero_terminal_snr: whether to rescale it to end in pure noise; see `NoiseSchedule.zero_terminal_snr`.
        log_snr_shift: constant added to the log-SNR; see `NoiseSchedule.shifted`.
        betas: betas for t = 1..T, for kind "betas" only.
        settings: settings of the family.

    Raises:
        ValueError: `kind` is unknown, or a setting is out of range.
        TypeError: the family does not have a setting.

    Examples:
        >>> make_schedule("cosine", num_steps=100).num_steps
        100
        >>> make_schedule("linear", zero_terminal_snr=True).alpha_bar(1000).item()
        0.0
    """
    if (kind == "betas") != (betas is not None):
        raise ValueError(f"betas are given with the schedule 'betas' and no other, got kind={kind!r}")
    schedule = SCHEDULES.find(kind)(**settings).make(num_steps) if betas is None else from_betas(betas)
    if log_snr_shift:
        schedule = schedule.shifted(log_snr_shift)
    return schedule.zero_terminal_snr() if zero_terminal_snr else schedule


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
