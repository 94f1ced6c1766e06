"""Training objectives: the variational bound in its forms, the simplified loss and its weights, timestep sampling.

Everything here is a loss per sample, [B]; who averages, over which batch and how many machines, is not decided here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ddpm.gaussian import ReverseVariance, kl, p_reverse, q_posterior, q_sample, q_transition, reverse_variance
from ddpm.noise import Purpose, integers, uniform, words
from ddpm.prediction import Conditioning, Parameterization, Prediction, from_output, split_output, target
from ddpm.schedule import NoiseSchedule

Loss = Literal["simple", "hybrid", "vlb"]
Weight = Literal["uniform", "min_snr"]


@dataclass(frozen=True)
class Objective:
    """What a network predicts, and how it is judged.

    Attributes:
        prediction: what the network's output means.
        loss: "simple", the squared error of the output (DDPM, eq. 14); "hybrid", that plus `vlb_weight` L_vlb, which
            trains a learned variance only (Improved DDPM, eq. 16); "vlb", L_vlb alone.
        weight: of the squared error: "uniform", or "min_snr" (Hang et al. 2023).
        min_snr_gamma: gamma of the latter.
        vlb_weight: lambda of "hybrid"; L_vlb is in bits per dimension and summed over the timesteps.
    """

    prediction: Parameterization = "eps"
    loss: Loss = "simple"
    weight: Weight = "uniform"
    min_snr_gamma: float = 5.0
    vlb_weight: float = 1e-3

    def __post_init__(self) -> None:
        if self.loss not in ("simple", "hybrid", "vlb"):
            raise ValueError(f"unknown loss {self.loss!r}; allowed: simple, hybrid, vlb")
        if self.weight not in ("uniform", "min_snr"):
            raise ValueError(f"unknown weight {self.weight!r}; allowed: uniform, min_snr")
        if self.min_snr_gamma <= 0 or self.vlb_weight <= 0:
            raise ValueError("min_snr_gamma and vlb_weight must be > 0")

    def losses(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        x_0: Tensor,
        t: Tensor,
        eps: Tensor,
        cond: Conditioning | None = None,
    ) -> Tensor:
        """Loss of each sample, float32 (float64 for a network in float64), [B].

        Args:
            network: maps (x_t [B, C, H, W], table index t - 1 [B], cond) to [B, C, H, W], or [B, 2 C, H, W] where it
                learns the variance.
            x_0: clean images in [-1, 1], [B, C, H, W].
            t: timesteps in 1..T, int64 [B].
            eps: standard normal noise like x_0.

        Raises:
            ValueError: "hybrid" for a network that learns no variance.
        """
        x_t = q_sample(x_0, t, eps, schedule)
        output, fraction = split_output(network(x_t, (t - 1).float(), cond), x_0.shape[1])
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.loss == "vlb":
            return self._vlb(output, fraction, x_0, x_t, t, schedule)
        error = output - target(x_0, eps, t, schedule, self.prediction)
        loss = self.weights(schedule, t).to(x_0) * error.square().flatten(1).mean(1)
        if self.loss == "simple":
            return loss
        if fraction is None:
            raise ValueError("the hybrid loss trains a learned variance: the network needs twice the output channels")
        # L_simple trains the mean: the bound's noisier gradient stops there (Improved DDPM, sec. 3.1).
        return loss + self.vlb_weight * self._vlb(output.detach(), fraction, x_0, x_t, t, schedule)

    def weights(self, schedule: NoiseSchedule, t: Tensor) -> Tensor:
        """Weight of the squared error at t, float64 of t's shape."""
        if self.weight == "min_snr":
            return min_snr_weight(schedule, t, self.min_snr_gamma, self.prediction)
        return torch.ones_like(t, dtype=torch.float64)

    def _vlb(
        self, output: Tensor, fraction: Tensor | None, x_0: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule
    ) -> Tensor:
        """T times one term of the bound: for uniform t an unbiased estimate of the sum, in bits per dimension."""
        # In float64, because the terms are differences of nearly equal Gaussians.
        x_t = x_t.double()
        pred = from_output(output.double(), x_t, t, schedule, self.prediction)
        pred = replace(pred, variance_fraction=None if fraction is None else fraction.double())
        return (schedule.num_steps * vlb_term(pred, x_0.double(), x_t, t, schedule)).to(output.dtype)


def simple_loss(
    network: nn.Module,
    schedule: NoiseSchedule,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    cond: Conditioning | None = None,
    *,
    kind: Parameterization = "eps",
) -> Tensor:
    """L_simple per sample, [B]: mean squared error of the network's output (DDPM, Ho et al. 2020, eq. 14)."""
    return Objective(prediction=kind).losses(network, schedule, x_0, t, eps, cond)


def score_matching_loss(score: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Denoising score matching per sample, [B] (Vincent 2011, eq. 11; Song & Ermon 2019, eq. 5).

    The squared distance, over pixels on average, from grad log q(x_t | x_0) = -eps / sigma_t. For score = -eps_theta /
    sigma_t this is 1 / sigma_t^2 times the squared error of eps_theta: the same objective up to the weight, sigma_t^2
    being the one that turns it into L_simple.

    Args:
        score: the model's at x_t = alpha_t x_0 + sigma_t eps, [B, C, H, W].
    """
    return (score - target(torch.zeros_like(eps), eps, t, schedule, "score")).square().flatten(1).mean(1)


# --- the variational bound -----------------------------------------------------------------------------------


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
    """The bound's term at t in its KL form, bits per dimension, [B] (DDPM, eq. 5; the tutorial's second form).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 1, and -log p(x_0 | x_1), discretized, at t = 1.

    Args:
        pred: a denoiser's at (x_t, t).
        t: timesteps 1..T, int64 [B].
        variance: of p, where it is not learned.
        levels: grey levels of the data.
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
    """The bound's term at t from one drawn pair (x_{t-1}, x_t), bits per dimension, [B] (DDPM, eq. 3).

    The tutorial's first, Monte-Carlo form, log q(x_t | x_{t-1}) - log p(x_{t-1} | x_t): summed over t = 1..T together
    with -log p(x_T) its expectation is the bound on a continuous x_0. A single term differs in expectation from
    `vlb_term` by E[log q(x_t | x_0) - log q(x_{t-1} | x_0)], which has no parameters and sums to the prior's term.
    With x_0, it is log q(x_{t-1} | x_t, x_0) - log p(x_{t-1} | x_t) for t > 1, of `vlb_term`'s expectation at every t.

    Args:
        pred: a denoiser's at (x_t, t).
        x_s: x_{t-1}, drawn together with x_t.
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
    """What multiplies |eps - eps_theta|^2 in the bound's term at t, in nats, float64 of t's shape (DDPM, eq. 12).

    beta^2 / (2 var (1 - beta) (1 - alpha_bar)), var being p's fixed one; L_simple's weight is 1 for every t.
    """
    beta = schedule.betas.to(t.device)[t - 1]
    var = reverse_variance(t, t - 1, schedule, variance)
    return beta.square() / (2 * var * (1 - beta) * (1 - schedule.alpha_bar(t)))


def min_snr_weight(schedule: NoiseSchedule, t: Tensor, gamma: float, kind: Parameterization) -> Tensor:
    """Weight of the output's squared error at t, float64 of t's shape (min-SNR-gamma, Hang et al. 2023, sec. 3.4).

    In every parameterization the error of x_0 is weighted by min(SNR, gamma). An error of x_0 is one of eps times
    sigma / alpha, of v times sigma, and of the score times sigma^2 / alpha, whence the factors.
    """
    alpha_bar, snr = schedule.alpha_bar(t), schedule.snr(t)
    clipped = snr.clamp(max=gamma)
    if kind == "x0":
        return clipped
    if kind == "v":
        return clipped / (snr + 1)
    # min(SNR, gamma) / SNR, which is 1 and not 0 / 0 where there is no signal.
    eps = torch.where(snr < gamma, 1, gamma / snr)
    if kind == "eps":
        return eps
    if kind == "score":
        return eps * (1 - alpha_bar)
    raise ValueError(f"unknown parameterization {kind!r}; allowed: eps, x0, v, score")


# --- timesteps -----------------------------------------------------------------------------------------------


def uniform_timesteps(seed: int, ordinals: Tensor, num_steps: int) -> Tensor:
    """t uniform in 1..T for each sample, int64 [B], a function of (seed, ordinal)."""
    return integers(seed, ordinals, Purpose.TIMESTEP, num_steps) + 1


def stratified_timesteps(seed: int, ordinals: Tensor, num_steps: int, batch_size: int) -> Tensor:
    """t uniform in 1..T for each sample, int64 [B], spread evenly over every global batch.

    The axis is cut into `batch_size` equal strata and each sample of a batch falls into one of its own, at a place of
    its own within it: stratified sampling. (The low-variance sampler of Kingma et al. 2021, app. I.1, shares one offset
    over the batch, u_0 + i / k: its samples are evenly spaced, ours are jittered.) Which stratum is a random
    permutation per batch, so that no place of the batch always gets the same noise: a function of (seed, ordinal),
    whoever computes which part of the batch.

    Args:
        ordinals: int64 [B], any part of one or more global batches.
        batch_size: of the global batch; batch i holds the ordinals from i batch_size on.
    """
    batches, which = torch.unique(ordinals // batch_size, return_inverse=True)
    members = batches[:, None] * batch_size + torch.arange(batch_size, device=ordinals.device)
    keys = words(seed, members.flatten(), Purpose.STRATUM, 1).reshape(members.shape)
    strata = keys.argsort(dim=1, stable=True).argsort(dim=1)[which, ordinals % batch_size]
    u = (strata + uniform(seed, ordinals, Purpose.TIMESTEP)[:, 0]) / batch_size
    return (u * num_steps).long().clamp(max=num_steps - 1) + 1


class ImportanceTimesteps:
    """t with probability proportional to sqrt(E[L_t^2]) over the last losses (Improved DDPM, sec. 3.3, eq. 18).

    Until every timestep has `history` losses t is uniform. The state is a function of the losses in the order in which
    they are given: give all workers the same, in ordinal order, and their samplers stay the same.

    Attributes:
        losses: the last losses of each timestep, float64 [T, history].
        counts: how many of them there are, int64 [T].
    """

    def __init__(self, num_steps: int, history: int = 10, uniform_fraction: float = 1e-3) -> None:
        if num_steps < 1 or history < 1 or not 0 <= uniform_fraction < 1:
            raise ValueError("need num_steps >= 1, history >= 1 and uniform_fraction in [0, 1)")
        self.uniform_fraction = uniform_fraction
        self.losses = torch.zeros(num_steps, history, dtype=torch.float64)
        self.counts = torch.zeros(num_steps, dtype=torch.long)

    def probabilities(self) -> Tensor:
        """p_t for t = 1..T, float64 [T]."""
        num_steps, history = self.losses.shape
        if bool((self.counts < history).any()):
            return torch.full((num_steps,), 1 / num_steps, dtype=torch.float64)
        size = self.losses.square().mean(1).sqrt()
        p = size / size.sum()
        return p * (1 - self.uniform_fraction) + self.uniform_fraction / num_steps

    def sample(self, seed: int, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """(t int64 [B], weight float64 [B]): E[weight L_t] is the mean of L_t over uniform t."""
        p = self.probabilities().to(ordinals.device)
        u = uniform(seed, ordinals, Purpose.TIMESTEP)[:, 0]
        index = torch.searchsorted(p.cumsum(0), u).clamp(max=len(p) - 1)
        return index + 1, 1 / (len(p) * p[index])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Append unweighted losses [B] at timesteps t [B], oldest first; each pushes out the oldest of its timestep."""
        history = self.losses.shape[1]
        for step, loss in zip(t.tolist(), losses.double().tolist(), strict=True):
            row = self.losses[step - 1]
            row[:-1] = row[1:].clone()
            row[-1] = loss
            self.counts[step - 1] = min(int(self.counts[step - 1]) + 1, history)

    def state_dict(self) -> dict[str, Tensor]:
        """The history, for a checkpoint."""
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a history back.

        Raises:
            ValueError: of another number of timesteps or losses.
        """
        if state["losses"].shape != self.losses.shape:
            raise ValueError(
                f"the history is of shape {tuple(state['losses'].shape)}, expected {tuple(self.losses.shape)}"
            )
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()
