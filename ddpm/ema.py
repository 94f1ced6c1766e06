"""Averages of weights: the classical EMA, and power-function averages whose width can be chosen after training.

Late in a run an update moves an average by less than float32 resolves: added to a float32 number it would be lost, and
the average would stand still. So each average is a pair of float32 tensors, the rounded value and the residual that
rounding left over (compensated summation, Kahan 1965), about 48 bits in all. The pair is exact in a checkpoint and
works on devices without float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


class EMA:
    """Classical EMA with a ramp, counted in images so that it does not depend on the batch size.

    After a batch of b images the average moves by 1 - 0.5^(b / h), where the half-life h is at most `half_life` images
    and at most `ramp` times the images seen so far (EDM, Karras et al. 2022, app. F.2: early weights are forgotten).

    Attributes:
        shadow: name -> averaged float32 tensor, detached.
        residual: name -> what `shadow` lacks of the average, float32, at most half a unit in its last place.
    """

    def __init__(self, module: nn.Module, half_life: float, ramp: float = 0.05) -> None:
        if half_life <= 0 or ramp <= 0:
            raise ValueError(f"half_life and ramp must be > 0, got {half_life} and {ramp}")
        self.half_life = half_life
        self.ramp = ramp
        self.shadow = {name: p.detach().float().clone() for name, p in module.state_dict().items()}
        self.residual = {name: torch.zeros_like(average) for name, average in self.shadow.items()}

    def decay(self, images_seen: int, batch_size: int) -> float:
        """The weight of the old average in the update that ends at `images_seen`."""
        half_life = min(self.half_life, max(self.ramp * images_seen, 1e-8))
        return 0.5 ** (batch_size / half_life)

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move towards the module's weights after a step that ended at `images_seen` images."""
        weight = 1 - self.decay(images_seen, batch_size)
        _move(self.shadow, self.residual, _float(module.state_dict().values()), weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, ready for `module.load_state_dict`."""
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the averaged weights, with residuals of 0; names must be the module's."""
        if state.keys() != self.shadow.keys():
            raise ValueError(f"EMA names differ: {sorted(state.keys() ^ self.shadow.keys())[:5]}")
        for name, tensor in state.items():
            self.shadow[name].copy_(tensor)
            self.residual[name].zero_()


WIDEST = 1 / (2 * 3**0.5)
"""sigma_rel of the plain mean over the whole run (gamma = 0); wider profiles would favour the earliest weights."""


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent gamma >= 0 of the profile of relative width `sigma_rel` (EDM2, Karras et al. 2024a, eq. 126).

    Raises:
        ValueError: `sigma_rel` outside (0, `WIDEST`].
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(
            f"sigma_rel must be in (0, {WIDEST:.4f}], got {sigma_rel}: it is the width of the average as a fraction of "
            "the run, 0.05 to 0.15 are usual, and the largest is the plain mean over all of it"
        )
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def sigma_rel_from_gamma(gamma: float) -> float:
    """Standard deviation of the profile (gamma + 1) u^gamma on [0, 1] (EDM2, eq. 123).

    Raises:
        ValueError: negative `gamma`.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}: below 0 the earliest weights would count most")
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


@dataclass(frozen=True)
class PowerSnapshot:
    """A power-function average as it stood at one time; what `reconstruct` makes others from.

    Attributes:
        weights: name -> averaged float32 tensor, ready for `module.load_state_dict`.
        images_seen: images trained on so far.
        sigma_rel: relative width of the average.
    """

    weights: Mapping[str, Tensor]
    images_seen: int
    sigma_rel: float


class PowerEMA:
    """Power-function averages of several widths (EDM2, Karras et al. 2024a, sec. 3.1), counted in images.

    At n images the average is the integral over tau in (0, n] of (gamma + 1) tau^gamma / n^(gamma + 1) times the
    weights that were reached with image tau. It has no initial value to forget and keeps its shape as training goes on:
    its standard deviation is always `sigma_rel` n. Snapshots of two widths, kept through the run, are enough to
    `reconstruct` the average of any width and time between afterwards (sec. 3.2).

    Attributes:
        sigma_rels: the widths.
        gammas: their exponents.
        shadows: for each width, name -> averaged float32 tensor, detached.
        residuals: for each width, name -> what the shadow lacks of the average, float32.
        images_seen: where the averages stand.
    """

    def __init__(self, module: nn.Module, sigma_rels: Sequence[float] = (0.05, 0.10), images_seen: int = 0) -> None:
        """Begin to average.

        Args:
            module: whose weights are averaged; its present ones count for the images it has seen already.
            sigma_rels: relative widths, each once.
            images_seen: by the module so far.

        Raises:
            ValueError: no width, one twice or out of range, or `images_seen` < 0.
        """
        if not sigma_rels or len(set(sigma_rels)) < len(sigma_rels):
            raise ValueError(f"sigma_rels must name at least one width and none twice, got {tuple(sigma_rels)}")
        if images_seen < 0:
            raise ValueError(f"images_seen must be >= 0, got {images_seen}")
        self.sigma_rels = tuple(float(s) for s in sigma_rels)
        self.gammas = tuple(gamma_from_sigma_rel(s) for s in self.sigma_rels)
        self.images_seen = images_seen
        self.shadows = [
            {name: p.detach().float().clone() for name, p in module.state_dict().items()} for _ in self.sigma_rels
        ]
        self.residuals = [{name: torch.zeros_like(a) for name, a in shadow.items()} for shadow in self.shadows]

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move towards the module's weights after a step on `batch_size` images that ended at `images_seen` images.

        Raises:
            ValueError: the step does not begin where the last one ended.
        """
        if batch_size < 1 or images_seen - batch_size != self.images_seen:
            raise ValueError(
                f"a step of {batch_size} images that ends at {images_seen} does not follow an average that stands at "
                f"{self.images_seen}: update after every step, and load the average's state when a run is resumed"
            )
        weights = _float(module.state_dict().values())
        for gamma, shadow, residual in zip(self.gammas, self.shadows, self.residuals, strict=True):
            _move(shadow, residual, weights, 1 - power_decay(gamma, images_seen, batch_size))
        self.images_seen = images_seen

    def snapshot(self) -> list[PowerSnapshot]:
        """The averages as they stand, one for each width, copied to the CPU.

        Raises:
            ValueError: before the first image.
        """
        if self.images_seen == 0:
            raise ValueError("nothing is averaged before the first update: take the first snapshot after a step")
        return [
            PowerSnapshot({k: v.to("cpu", copy=True) for k, v in shadow.items()}, self.images_seen, sigma_rel)
            for sigma_rel, shadow in zip(self.sigma_rels, self.shadows, strict=True)
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything by flat names: `images_seen`, `sigma_rels`, and `i.NAME`, `residual.i.NAME` of the i-th width."""
        state = {f"{i}.{name}": tensor for i, shadow in enumerate(self.shadows) for name, tensor in shadow.items()}
        state |= {f"residual.{i}.{name}": t for i, low in enumerate(self.residuals) for name, t in low.items()}
        state["images_seen"] = torch.tensor(self.images_seen)
        state["sigma_rels"] = torch.tensor(self.sigma_rels, dtype=torch.float64)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the averages of another; residuals that it lacks, as a state of an older release does, are 0.

        Raises:
            ValueError: other widths, names or shapes than this one's; nothing is taken over then.
        """
        widths = state["sigma_rels"].tolist() if "sigma_rels" in state else None
        if widths != list(self.sigma_rels):
            raise ValueError(
                f"the stored averages have sigma_rels {widths}, these {list(self.sigma_rels)}: "
                "a run keeps the widths that it began with, others can be reconstructed from its snapshots"
            )
        own = self.state_dict()
        state = {**{name: torch.zeros_like(t) for name, t in own.items() if name.startswith("residual.")}, **state}
        if state.keys() != own.keys():
            raise ValueError(f"power EMA names differ: {sorted(state.keys() ^ own.keys())[:5]}")
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"power EMA {name}: shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
        for i, (shadow, residual) in enumerate(zip(self.shadows, self.residuals, strict=True)):
            for name, tensor in shadow.items():
                tensor.copy_(state[f"{i}.{name}"])
                residual[name].copy_(state[f"residual.{i}.{name}"])
        self.images_seen = int(state["images_seen"])


def power_decay(gamma: float, images_seen: int, batch_size: int) -> float:
    """The weight (1 - b / n)^(gamma + 1) of the old average in an update by b images that ends at n (EDM2, eq. 127).

    Products over consecutive batches telescope to (n' / n)^(gamma + 1), so no batch size changes the profile.
    """
    if batch_size >= images_seen:
        return 0.0
    # 1 - b / n would lose b's digits where n is large.
    return math.exp((gamma + 1) * math.log1p(-batch_size / images_seen))


def posthoc_weights(
    images_seen: Sequence[int], sigma_rels: Sequence[float], target_images: int, target_sigma_rel: float
) -> list[float]:
    """Coefficients of snapshots whose sum comes closest to another average (EDM2, Karras et al. 2024a, app. C.3).

    The profiles' weighted sum is the least-squares approximation of the target's profile, from the closed form of
    their inner products in float64, scaled to sum to 1 so that weights that never changed are met exactly. Where the
    target is a snapshot, its coefficient is 1 and the others are 0.

    Args:
        images_seen: of each snapshot.
        sigma_rels: relative width of each snapshot.
        target_images: where the wanted average stands.
        target_sigma_rel: its relative width.

    Raises:
        ValueError: no snapshot or one twice, a width or time out of range, or a target after the last snapshot.
    """
    snapshots = list(zip(images_seen, sigma_rels, strict=True))
    if not snapshots or len(set(snapshots)) < len(snapshots):
        raise ValueError(f"need at least one snapshot and none twice, got (images_seen, sigma_rel) = {snapshots}")
    if min(*images_seen, target_images) < 1:
        raise ValueError(f"images_seen must be >= 1, got {sorted(images_seen)[0]} and a target of {target_images}")
    if target_images > max(images_seen):
        raise ValueError(
            f"the target stands at {target_images} images, the last snapshot at {max(images_seen)}: weights after it "
            "are not known; choose images_seen up to that"
        )
    target_gamma = gamma_from_sigma_rel(target_sigma_rel)
    if (target_images, target_sigma_rel) in snapshots:
        return [float(s == (target_images, target_sigma_rel)) for s in snapshots]
    times = np.array([float(n) for n in images_seen])
    gammas = np.array([gamma_from_sigma_rel(s) for s in sigma_rels])
    # Profiles of length 1: those of early snapshots are much larger, which would cost digits.
    lengths = _inner_product(times, gammas, times, gammas) ** 0.5
    gram = _inner_product(times[:, None], gammas[:, None], times, gammas) / (lengths[:, None] * lengths)
    projection = _inner_product(times, gammas, np.array(float(target_images)), np.array(target_gamma)) / lengths
    solution = np.linalg.lstsq(gram, projection, rcond=None)[0] / lengths
    return [float(w) for w in solution / solution.sum()]


def reconstruct(snapshots: Sequence[PowerSnapshot], images_seen: int, sigma_rel: float) -> dict[str, Tensor]:
    """The average of any width at any time, from snapshots of others (EDM2, Karras et al. 2024a, sec. 3.2).

    The error falls as snapshots get denser in time; widths between those tracked are met best.

    Args:
        snapshots: of one run, of two widths or more, the last at `images_seen` or later.
        images_seen: where the wanted average stands.
        sigma_rel: its relative width.

    Returns:
        name -> averaged float32 tensor, ready for `module.load_state_dict`.

    Raises:
        ValueError: see `posthoc_weights`; or snapshots of different networks.
    """
    coefficients = posthoc_weights(
        [s.images_seen for s in snapshots], [s.sigma_rel for s in snapshots], images_seen, sigma_rel
    )
    shapes = {name: w.shape for name, w in snapshots[0].weights.items()}
    for snapshot in snapshots:
        differing = shapes.items() ^ {name: w.shape for name, w in snapshot.weights.items()}.items()
        if differing:
            raise ValueError(f"snapshots of different networks: they differ in {sorted({n for n, _ in differing})[:5]}")
    averaged = {}
    for name, shape in shapes.items():
        total = torch.zeros(shape, dtype=torch.float64)  # coefficients of both signs cancel
        for coefficient, snapshot in zip(coefficients, snapshots, strict=True):
            if coefficient != 0:
                total += coefficient * snapshot.weights[name].to("cpu", torch.float64)
        averaged[name] = total.float()
    return averaged


def _inner_product(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Integral of the product of two profiles (gamma + 1) tau^gamma / t^(gamma + 1) on (0, t] (EDM2, eq. 151)."""
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def _move(shadow: Mapping[str, Tensor], residual: Mapping[str, Tensor], weights: list[Tensor], weight: float) -> None:
    """Move averages towards weights in place: shadow + residual becomes (1 - weight) (shadow + residual) + weight w."""
    high, low = _local(shadow.values()), _local(residual.values())
    if weight == 1:
        torch._foreach_copy_(high, weights)
        torch._foreach_zero_(low)
        return
    # The residual takes the change, weight ((w - high) - low), which is small beside high and keeps its own 24 bits.
    change = torch._foreach_sub(weights, high)
    torch._foreach_sub_(change, low)
    torch._foreach_add_(low, change, alpha=weight)
    # high takes what its own bits hold of it; the rest is exact in float32 (fast two-sum, Dekker 1971).
    total = torch._foreach_add(high, low)
    torch._foreach_sub_(high, total)
    torch._foreach_add_(low, high)
    torch._foreach_copy_(high, total)


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of sharded tensors (FSDP2): a part's average is the average's part."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def _float(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.float() for t in _local(t.detach() for t in tensors)]
