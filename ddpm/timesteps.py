"""Samplers of training timesteps: functions of (seed, ordinal) and, for importance sampling, of past losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ddpm.choices import Choices
from ddpm.noise import Purpose, integers, uniform, words
from ddpm.schedule import NoiseSchedule
from ddpm.settings import Settings, setting


class TimestepSampler(Protocol):
    """A sampler that draws each sample's timestep as a function of its ordinal, the same on every rank.

    Attributes:
        learns: whether it adapts to the losses; if so, every step must pass the loss of every sample to `update`.
    """

    learns: ClassVar[bool]

    def sample(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """Return (t in 1..T, int64 [B]; the weight of each sample's loss, float64 [B]) for ordinals int64 [B].

        The weights make it unbiased: E[weight L_t] is the mean of L_t over uniform t. Those of a sampler whose settings
        say `unbiased = False` are 1: how often a timestep is drawn is part of the objective then.
        """

    def update(self, ordinals: Tensor, losses: Tensor) -> None:
        """Adapt to the unweighted losses [N] of a global batch, with ordinals [N] in ascending order."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the state by name, without copying; empty if the sampler does not learn."""


class Timesteps(Protocol):
    """The settings of a timestep sampler.

    A class may say `unbiased: ClassVar[bool] = False`; see `TimestepSampler.sample`.
    """

    def make(self, schedule: NoiseSchedule, batch_size: int, seed: int) -> TimestepSampler:
        """Return the timestep sampler of a run.

        Args:
            schedule: of T steps; its noise levels matter only to samplers that are defined by them.
            batch_size: global batch size; batch i has the ordinals from i batch_size to (i + 1) batch_size - 1.
            seed: seed of the run.
        """


class _Fixed:
    """Base of samplers that do not learn from losses."""

    learns: ClassVar[bool] = False

    def update(self, ordinals: Tensor, losses: Tensor) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}


@dataclass(frozen=True)
class UniformTimesteps(Settings):
    """t uniform in 1..T, independently for each sample (DDPM, Ho et al. 2020, algorithm 1).

    Examples:
        >>> from ddpm.schedule import Linear
        >>> sampler = UniformTimesteps().make(Linear().make(1000), batch_size=4, seed=0)
        >>> whole, (part, weights) = sampler.sample(torch.arange(8))[0], sampler.sample(torch.arange(2, 4))
        >>> torch.equal(part, whole[2:4]), weights.tolist()
        (True, [1.0, 1.0])
    """

    def make(self, schedule: NoiseSchedule, batch_size: int, seed: int) -> TimestepSampler:
        """See `Timesteps`."""
        return _Uniform(schedule.num_steps, seed)


@dataclass(frozen=True)
class _Uniform(_Fixed):
    num_steps: int
    seed: int

    def sample(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        t = integers(self.seed, ordinals, Purpose.TIMESTEP, self.num_steps) + 1
        return t, torch.ones_like(t, dtype=torch.float64)


@dataclass(frozen=True)
class StratifiedTimesteps(Settings):
    """t uniform in 1..T for each sample, stratified over every global batch.

    The range is divided into `batch_size` equal strata. Each sample of a batch has its own stratum, by a random
    permutation per batch, and a random place within it. (The low-variance sampler of Kingma et al. 2021, app. I.1, uses
    one offset for the batch, u_0 + i / k: its samples are evenly spaced, these are jittered.) The result is a function
    of (seed, ordinal), independent of how the batch is split over ranks.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> t, _ = StratifiedTimesteps().make(Linear().make(1000), batch_size=4, seed=0).sample(torch.arange(4))
        >>> ((t - 1) // 250).sort().values.tolist()  # one in each quarter
        [0, 1, 2, 3]
    """

    def make(self, schedule: NoiseSchedule, batch_size: int, seed: int) -> TimestepSampler:
        """See `Timesteps`."""
        return _Stratified(schedule.num_steps, batch_size, seed)


@dataclass(frozen=True)
class _Stratified(_Fixed):
    num_steps: int
    batch_size: int
    seed: int

    def sample(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        u = stratified(self.seed, ordinals, self.batch_size)
        t = (u * self.num_steps).long().clamp(max=self.num_steps - 1) + 1
        return t, torch.ones_like(t, dtype=torch.float64)


def stratified(seed: int, ordinals: Tensor, batch_size: int) -> Tensor:
    """Return a uniform number in (0, 1) for each sample, float64 [B], with one in each stratum of a global batch.

    Examples:
        >>> (stratified(0, torch.arange(4), 4) * 4).long().sort().values.tolist()
        [0, 1, 2, 3]
    """
    strata = permuted_places(seed, ordinals, batch_size)
    return (strata + uniform(seed, ordinals, Purpose.TIMESTEP)[:, 0]) / batch_size


def permuted_places(seed: int, ordinals: Tensor, batch_size: int) -> Tensor:
    """Return each sample's place in a random permutation of its global batch, int64 [B] in 0..batch_size - 1.

    Args:
        ordinals: ordinals of any part of one or more global batches, int64 [B].
        batch_size: global batch size; batch i has the ordinals from i batch_size to (i + 1) batch_size - 1.

    Examples:
        >>> places = permuted_places(0, torch.arange(8), batch_size=4)
        >>> places[:4].sort().values.tolist(), places[4:].sort().values.tolist()
        ([0, 1, 2, 3], [0, 1, 2, 3])
        >>> torch.equal(permuted_places(0, torch.tensor([6]), 4), places[6:7])
        True
    """
    batches, which = torch.unique(ordinals // batch_size, return_inverse=True)
    members = batches[:, None] * batch_size + torch.arange(batch_size, device=ordinals.device)
    keys = words(seed, members.flatten(), Purpose.STRATUM, 1).reshape(members.shape)
    return keys.argsort(dim=1, stable=True).argsort(dim=1)[which, ordinals % batch_size]


@dataclass(frozen=True)
class LowDiscrepancyTimesteps(Settings):
    """t uniform in 1..T for each sample, evenly spaced over every global batch (Kingma et al. 2021, app. I.1).

    The k samples of a batch share one offset u_0 and have u_0 + i / k modulo 1, where i is the sample's place in a
    random permutation of the batch. `StratifiedTimesteps` instead draws a random place within each stratum.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> t, _ = LowDiscrepancyTimesteps().make(Linear().make(1000), batch_size=4, seed=0).sample(torch.arange(4))
        >>> t.sort().values.diff().tolist()
        [250, 250, 250]
    """

    def make(self, schedule: NoiseSchedule, batch_size: int, seed: int) -> TimestepSampler:
        """See `Timesteps`."""
        return _LowDiscrepancy(schedule.num_steps, batch_size, seed)


@dataclass(frozen=True)
class _LowDiscrepancy(_Fixed):
    num_steps: int
    batch_size: int
    seed: int

    def sample(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        places = permuted_places(self.seed, ordinals, self.batch_size)
        first = ordinals // self.batch_size * self.batch_size  # the offset is drawn with the batch's first ordinal
        u = (uniform(self.seed, first, Purpose.TIMESTEP)[:, 0] + places / self.batch_size) % 1
        t = (u * self.num_steps).long().clamp(max=self.num_steps - 1) + 1
        return t, torch.ones_like(t, dtype=torch.float64)


@dataclass(frozen=True)
class LogNormalTimesteps(Settings):
    """ln k ~ N(p_mean, p_std^2) for k = sigma_t / alpha_t, stratified over every global batch (EDM's training noise).

    The distribution of Karras et al. (2022), sec. 5 and table 1, on a schedule's discrete levels: a timestep has the
    probability of the values of ln k that are nearest to its own, so the first and the last one have what lies beyond.
    It is the logit-normal distribution of flow matching (SD3, Esser et al. 2024, eq. 19), because ln k is the logit of
    its time tau = sigma / (alpha + sigma): p_mean 0 and p_std 1 there, 0.8 and 0.8 in JiT (Li & He 2025).
    Losses are not weighted back to uniform timesteps: which levels are drawn is a part of the objective, as there.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> schedule = Linear().make(1000)
        >>> t, _ = LogNormalTimesteps(p_mean=-1.2).make(schedule, batch_size=64, seed=0).sample(torch.arange(64))
        >>> round(schedule.ratio(t).log().median().item(), 1)
        -1.2
    """

    unbiased: ClassVar[bool] = False

    p_mean: float = setting(-1.2, "mean of ln(sigma / alpha) of the trained noise levels; the paper's is for [-1, 1]")
    p_std: float = setting(1.2, "standard deviation of ln(sigma / alpha) of the trained noise levels", gt=0)
    uniform_fraction: float = setting(
        0.0, "share of the samples that is drawn uniformly over all timesteps; 0 is the paper's", ge=0, lt=1
    )

    def make(self, schedule: NoiseSchedule, batch_size: int, seed: int) -> TimestepSampler:
        """See `Timesteps`."""
        return _ByProbability(self.probability_below(schedule), batch_size, seed)

    def probability_below(self, schedule: NoiseSchedule) -> Tensor:
        """Return the probability of a timestep <= t for t = 1..T - 1, float64 [T - 1]."""
        log_k = -schedule.log_snr(torch.arange(1, schedule.num_steps + 1)) / 2
        edges = (log_k[:-1] + log_k[1:]) / 2  # infinite before a T without signal, which is never drawn then
        below = torch.special.ndtr((edges - self.p_mean) / self.p_std)
        evenly = torch.arange(1, schedule.num_steps, dtype=torch.float64) / schedule.num_steps
        return (1 - self.uniform_fraction) * below + self.uniform_fraction * evenly


@dataclass(frozen=True)
class _ByProbability(_Fixed):
    """Timesteps of given probabilities, stratified over every global batch.

    Attributes:
        below: probability of a timestep <= t for t = 1..T - 1.
    """

    below: Tensor
    batch_size: int
    seed: int

    def sample(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        u = stratified(self.seed, ordinals, self.batch_size)
        t = torch.searchsorted(self.below.to(u.device), u, right=True) + 1
        return t, torch.ones_like(t, dtype=torch.float64)


@dataclass(frozen=True)
class ImportanceTimesteps(Settings):
    """t with probability proportional to sqrt(E[L_t^2]) over the last losses (Improved DDPM, sec. 3.3, eq. 18).

    t is uniform until every timestep has `history` losses.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> sampler = ImportanceTimesteps().make(Linear().make(1000), batch_size=4, seed=0)
        >>> t, weights = sampler.sample(torch.arange(4))  # uniform as long as there are no losses
        >>> weights.round(decimals=6).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    history: int = setting(10, "number of last losses kept for each timestep", ge=1)
    uniform_fraction: float = setting(1e-3, "share of the probability that is uniform over all timesteps", ge=0, lt=1)

    def make(self, schedule: NoiseSchedule, batch_size: int, seed: int) -> ImportanceSampler:
        """See `Timesteps`."""
        return ImportanceSampler(schedule.num_steps, seed, self.history, self.uniform_fraction)


class ImportanceSampler:
    """The sampler of `ImportanceTimesteps`.

    Its state depends on the losses and their order. Pass the same losses, in ordinal order, on every rank, so that the
    samplers of all ranks stay equal.

    Attributes:
        losses: the last losses of each timestep, float64 [T, history].
        counts: number of losses of each timestep, int64 [T].

    Examples:
        >>> sampler = ImportanceSampler(num_steps=2, seed=0, history=1, uniform_fraction=0.0)
        >>> sampler.record(torch.tensor([1, 2]), torch.tensor([3.0, 1.0]))
        >>> sampler.probabilities().tolist()
        [0.75, 0.25]
    """

    learns: ClassVar[bool] = True

    def __init__(self, num_steps: int, seed: int, history: int, uniform_fraction: float) -> None:
        self.seed, self.uniform_fraction = seed, uniform_fraction
        self.losses = torch.zeros(num_steps, history, dtype=torch.float64)
        self.counts = torch.zeros(num_steps, dtype=torch.long)

    def probabilities(self) -> Tensor:
        """Return p_t for t = 1..T, float64 [T]."""
        num_steps, history = self.losses.shape
        if bool((self.counts < history).any()):
            return torch.full((num_steps,), 1 / num_steps, dtype=torch.float64)
        size = self.losses.square().mean(1).sqrt()
        p = size / size.sum()
        return p * (1 - self.uniform_fraction) + self.uniform_fraction / num_steps

    def sample(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """See `TimestepSampler`."""
        p = self.probabilities().to(ordinals.device)
        u = uniform(self.seed, ordinals, Purpose.TIMESTEP)[:, 0]
        index = torch.searchsorted(p.cumsum(0), u).clamp(max=len(p) - 1)
        return index + 1, 1 / (len(p) * p[index])

    def update(self, ordinals: Tensor, losses: Tensor) -> None:
        """See `TimestepSampler`."""
        # Use the device where t was drawn, because cumulative sums may round differently on another device.
        t, _ = self.sample(ordinals)
        self.record(t, losses)

    def record(self, t: Tensor, losses: Tensor) -> None:
        """Append losses [N] at timesteps t [N], oldest sample first; each replaces the oldest loss of its timestep."""
        history = self.losses.shape[1]
        for step, loss in zip(t.tolist(), losses.double().tolist(), strict=True):
            row = self.losses[step - 1]
            row[:-1] = row[1:].clone()
            row[-1] = loss
            self.counts[step - 1] = min(int(self.counts[step - 1]) + 1, history)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the history without copying, so that it can be overwritten in place."""
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a history.

        Raises:
            ValueError: the history has another number of timesteps or losses.
        """
        if state["losses"].shape != self.losses.shape:
            raise ValueError(
                f"the history is of shape {tuple(state['losses'].shape)}, expected {tuple(self.losses.shape)}"
            )
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])


TIMESTEPS: Choices[type[Timesteps]] = Choices(
    "timestep sampler",
    "ddpm.timesteps",
    {
        "uniform": UniformTimesteps,
        "stratified": StratifiedTimesteps,
        "importance": ImportanceTimesteps,
        "low_discrepancy": LowDiscrepancyTimesteps,
        "log_normal": LogNormalTimesteps,
    },
)
