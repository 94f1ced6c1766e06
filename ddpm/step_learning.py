"""Levels and weights of a solver, learned for one trained model from the end points of its own fine trajectories.

The generalized solver of "GAS: Improving Discretization of Diffusion ODEs via Generalized Adversarial Solver" (arXiv
2510.17699), without its adversarial part: levels and weights of a known solver, each with a correction that is learned
by gradient descent through the few steps, so that samples end where fine trajectories from the same noise end. The
network is not changed. Only a few numbers are learned, so few trajectories and a few hundred updates suffice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.prediction import Denoiser
from ddpm.samplers.generalized import GeneralizedSolver, combine, rows
from ddpm.settings import Settings, setting

HELD_OUT = 4
"""One in this many trajectories is held out; they decide which update to keep."""


@dataclass(frozen=True)
class StepLearning(Settings):
    """The settings of learning a solver's levels and weights.

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.samplers import DDIM
        >>> from ddpm.samplers.generalized import weights_of
        >>> from ddpm.schedule import Linear
        >>> schedule, x_T, levels = Linear().make(1000), torch.ones(4, 1, 1, 1), (1000.0, 500.0, 0.0)
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")
        >>> weights, errors = weights_of(DDIM(steps=2), schedule, levels), []
        >>> given = (gaussian, levels, weights, x_T, x_T)  # trajectories of N(0, I) end where they begin
        >>> settings = StepLearning(updates=20, check_every=10)
        >>> solver = settings.learn(*given, on_check=lambda n, error: errors.append(error))
        >>> errors[-1] < errors[0], solver.steps
        (True, 2)
    """

    updates: int = setting(200, "updates of levels and weights, each on a batch of trajectories", ge=1)
    batch_size: int = setting(32, "trajectories of an update", ge=1)
    lr: float = setting(0.01, "learning rate of Adam at the beginning; it falls to 0 as a cosine", gt=0)
    check_every: int = setting(25, "updates between two comparisons on held-out trajectories", ge=1)

    def learn(
        self,
        denoiser: Denoiser,
        levels: Sequence[float],
        weights: Sequence[float],
        x_T: Tensor,
        ends: Tensor,
        cond: Conditioning | None = None,
        on_check: Callable[[int, float], None] | None = None,
    ) -> GeneralizedSolver:
        """Return the solver whose samples end nearest to the end points of trajectories.

        The first level, that of x_T, is fixed; the gaps between levels are learned as shares of it, so that levels
        always decrease. The solver that is best on the held-out trajectories is returned; the initial one is among the
        candidates, so the result is never worse.

        Args:
            denoiser: the model, guided and clipped as it will be sampled, in full precision.
            levels: N + 1 initial levels, the last 0.
            weights: those of a known solver for them, see `weights_of`.
            x_T: standard normal noise [B, C, H, W]; the last quarter is held out.
            ends: where trajectories from it end, [B, C, H, W].
            cond: conditions of the B images.
            on_check: called with the updates done and the root mean square per pixel on held-out trajectories.

        Raises:
            ValueError: there is one trajectory only.
        """
        if len(x_T) < 2:
            raise ValueError(f"learning steps needs 2 trajectories or more, got {len(x_T)}")
        held = max(1, len(x_T) // HELD_OUT)
        learned_from, held_out = torch.arange(len(x_T)).split([len(x_T) - held, held])
        solver = _Solver(levels, weights, x_T.device)
        optimizer = torch.optim.Adam(solver.corrections, lr=self.lr)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (1 + math.cos(math.pi * n / self.updates)) / 2)

        def error(ids: Tensor) -> Tensor:
            ids = ids.to(x_T.device)
            return solver.error(denoiser, x_T[ids], ends[ids], None if cond is None else cond[ids])

        def compare(update: int) -> float:
            with torch.no_grad():
                squares = [error(ids).item() * len(ids) for ids in held_out.split(64)]
            distance = math.sqrt(sum(squares) / len(held_out))
            if on_check is not None:
                on_check(update, distance)
            return distance

        least, found = compare(0), solver.settings()
        for update, ids in enumerate(itertools.islice(_batches(learned_from, self.batch_size), self.updates), 1):
            with torch.enable_grad():
                # Not backward(), which would leave gradients in the network. Of one step no level is free.
                grads = torch.autograd.grad(error(ids), solver.corrections, materialize_grads=True)
            for correction, grad in zip(solver.corrections, grads, strict=True):
                correction.grad = grad
            optimizer.step()
            decay.step()
            if update % self.check_every == 0 or update == self.updates:
                distance = compare(update)
                if distance < least:
                    least, found = distance, solver.settings()
        return found


class _Solver:
    """Levels and weights with their corrections.

    Attributes:
        corrections: of the logarithms of the gaps between levels, [N], and of the weights, [N (N + 3) / 2].
    """

    def __init__(self, levels: Sequence[float], weights: Sequence[float], device: torch.device) -> None:
        self._levels = torch.tensor(levels, dtype=torch.float64, device=device)
        self._log_gaps = (-self._levels.diff()).log()
        self._weights = torch.tensor(weights, dtype=torch.float64, device=device)
        self.corrections = [torch.zeros_like(x, requires_grad=True) for x in (self._log_gaps, self._weights)]

    def levels(self) -> Tensor:
        """Return the N levels of the evaluations; the first is as it was."""
        shares = torch.softmax(self._log_gaps + self.corrections[0], 0)
        return self._levels[0] * torch.cat([shares.new_ones(1), 1 - shares.cumsum(0)[:-1]])

    def error(self, denoiser: Denoiser, x_T: Tensor, ends: Tensor, cond: Conditioning | None) -> Tensor:
        """Return the mean square per pixel between samples and the ends of their trajectories."""
        x_t, predicted = x_T, [x_T]
        weights = list((self._weights + self.corrections[1]).to(x_T.dtype))
        for t, row in zip(self.levels(), rows(weights), strict=True):
            predicted.append(denoiser(x_t, t.expand(len(x_T)), cond).x0)
            x_t = combine(row, predicted)
        return (x_t - ends).square().mean()

    def settings(self) -> GeneralizedSolver:
        """Return the current sampler, rounded to a millionth, far below one grey level."""
        levels = (*(round(t, 3) for t in self.levels().tolist()), 0.0)
        weights = [round(w, 6) for w in (self._weights + self.corrections[1]).tolist()]
        return GeneralizedSolver(steps=len(levels) - 1, timesteps=levels, weights=tuple(weights))


def _batches(ids: Tensor, size: int) -> Iterator[Tensor]:
    """Yield batches of these ids without end, in an order that is new in every pass and the same in every call."""
    generator, size = torch.Generator().manual_seed(0), min(size, len(ids))
    while True:
        shuffled = ids[torch.randperm(len(ids), generator=generator)]
        yield from shuffled.split(size)[: len(ids) // size]
