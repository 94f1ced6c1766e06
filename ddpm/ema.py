"""Averages of weights: the classical EMA, and power-function averages whose width can be chosen after training.

Late in a run an update changes an average by less than float32 can represent, so a float32 average would stop moving.
Therefore each average is a pair of float32 tensors, the rounded value and the rounding residual (compensated summation,
Kahan 1965), about 48 bits in all. Checkpoints store the pair exactly, and it works on devices without float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


class EMA:
    """A classical EMA with a ramp, counted in images so that it does not depend on the batch size.

    After a batch of b images the new weights get the share 1 - 0.5^(b / h). The half-life h is the smaller of
    `half_life` images and `ramp` times the images seen so far, so early weights are forgotten (EDM, Karras et al. 2022,
    app. F.2).

    Attributes:
        shadow: name -> averaged float32 tensor, detached.
        residual: name -> average minus `shadow`, float32, at most half a unit in the last place of `shadow`.

    Examples:
        >>> average = EMA(nn.Linear(1, 1), half_life=100, ramp=1.0)
        >>> average.decay(images_seen=1000, batch_size=100), average.decay(images_seen=50, batch_size=100)
        (0.5, 0.25)
    """

    def __init__(self, module: nn.Module, half_life: float, ramp: float = 0.05) -> None:
        if half_life <= 0 or ramp <= 0:
            raise ValueError(f"half_life and ramp must be > 0, got {half_life} and {ramp}")
        self.half_life = half_life
        self.ramp = ramp
        self.shadow = {name: p.detach().float().clone() for name, p in module.state_dict().items()}
        self.residual = {name: torch.zeros_like(average) for name, average in self.shadow.items()}

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Return the weight of the old average in the update that ends at `images_seen`."""
        half_life = min(self.half_life, max(self.ramp * images_seen, 1e-8))
        return 0.5 ** (batch_size / half_life)

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, batch_size: int) -> None:
        """Update the average with the module's weights after a step that ended at `images_seen` images."""
        weight = 1 - self.decay(images_seen, batch_size)
        _move(self.shadow, self.residual, _float(module.state_dict().values()), weight)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights, ready for `module.load_state_dict`."""
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the averaged weights and set the residuals to 0; the names must be those of the module."""
        if state.keys() != self.shadow.keys():
            raise ValueError(f"EMA names differ: {sorted(state.keys() ^ self.shadow.keys())[:5]}")
        for name, tensor in state.items():
            self.shadow[name].copy_(tensor)
            self.residual[name].zero_()


WIDEST = 1 / (2 * 3**0.5)
"""sigma_rel of the plain mean over the run (gamma = 0); a wider profile would give early weights the most weight."""


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Return the exponent gamma >= 0 of the profile of relative width `sigma_rel` (EDM2, Karras et al. 2024a, eq. 126).

    Raises:
        ValueError: `sigma_rel` is outside (0, `WIDEST`].

    Examples:
        >>> round(gamma_from_sigma_rel(0.1), 2), gamma_from_sigma_rel(WIDEST) < 1e-6
        (6.94, True)
        >>> round(sigma_rel_from_gamma(gamma_from_sigma_rel(0.1)), 12)
        0.1
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(
            f"sigma_rel must be in (0, {WIDEST:.4f}], got {sigma_rel}: it is the width of the average as a fraction of "
            "the run, 0.05 to 0.15 are usual, and the largest is the plain mean over all of it"
        )
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def sigma_rel_from_gamma(gamma: float) -> float:
    """Return the standard deviation of the profile (gamma + 1) u^gamma on [0, 1] (EDM2, eq. 123).

    Raises:
        ValueError: `gamma` is negative.

    Examples:
        >>> sigma_rel_from_gamma(0.0) == WIDEST  # the plain mean
        True
        >>> round(sigma_rel_from_gamma(6.94), 3)
        0.1
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}: below 0 the earliest weights would count most")
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


@dataclass(frozen=True)
class PowerSnapshot:
    """A copy of a power-function average at one time, from which `reconstruct` computes averages of other widths.

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
    weights after image tau. It does not depend on an initial value, and its profile keeps its shape during training:
    the standard deviation is always `sigma_rel` n. From snapshots of two widths, saved throughout the run,
    `reconstruct` computes the average of any width in between, at any time, after training (sec. 3.2).

    Attributes:
        sigma_rels: relative widths.
        gammas: exponent of each width.
        shadows: for each width, name -> averaged float32 tensor, detached.
        residuals: for each width, name -> average minus shadow, float32.
        images_seen: number of images included in the averages.

    Examples:
        >>> network = nn.Linear(1, 1, bias=False)
        >>> average = PowerEMA(network, sigma_rels=(WIDEST,))  # gamma = 0: the mean of the weights after every image
        >>> for step, weight in enumerate([1.0, 2.0, 6.0], 1):
        ...     _ = network.load_state_dict({"weight": torch.tensor([[weight]])})
        ...     average.update(network, images_seen=10 * step, batch_size=10)
        >>> round(average.shadows[0]["weight"].item(), 4)
        3.0
    """

    def __init__(self, module: nn.Module, sigma_rels: Sequence[float] = (0.05, 0.10), images_seen: int = 0) -> None:
        """Start the averages from the module's current weights.

        Args:
            module: the network to average; its current weights count for all images it has already seen.
            sigma_rels: relative widths, without duplicates.
            images_seen: number of images the module has already seen.

        Raises:
            ValueError: `sigma_rels` is empty, has duplicates or a width out of range, or `images_seen` < 0.
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
        """Update the averages with the module's weights after a step of `batch_size` images ending at `images_seen`.

        Raises:
            ValueError: the step does not start where the previous one ended.
        """
        if batch_size < 1 or images_seen - batch_size != self.images_seen:
            raise ValueError(
                f"a step of {batch_size} images that ends at {images_seen} does not follow an average at "
                f"{self.images_seen}: update after every step, and load the average's state when a run is resumed"
            )
        weights = _float(module.state_dict().values())
        for gamma, shadow, residual in zip(self.gammas, self.shadows, self.residuals, strict=True):
            _move(shadow, residual, weights, 1 - power_decay(gamma, images_seen, batch_size))
        self.images_seen = images_seen

    def snapshot(self) -> list[PowerSnapshot]:
        """Return a copy of the current averages on the CPU, one for each width.

        Raises:
            ValueError: no image has been seen yet.
        """
        if self.images_seen == 0:
            raise ValueError("nothing is averaged before the first update: take the first snapshot after a step")
        return [
            PowerSnapshot({k: v.to("cpu", copy=True) for k, v in shadow.items()}, self.images_seen, sigma_rel)
            for sigma_rel, shadow in zip(self.sigma_rels, self.shadows, strict=True)
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state by flat names: `images_seen`, `sigma_rels`, `i.NAME` and `residual.i.NAME` for width i."""
        state = {f"{i}.{name}": tensor for i, shadow in enumerate(self.shadows) for name, tensor in shadow.items()}
        state |= {f"residual.{i}.{name}": t for i, low in enumerate(self.residuals) for name, t in low.items()}
        state["images_seen"] = torch.tensor(self.images_seen)
        state["sigma_rels"] = torch.tensor(self.sigma_rels, dtype=torch.float64)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state; residuals that are missing, as in states of older releases, are set to 0.

        Raises:
            ValueError: widths, names or shapes differ from this object's; nothing is changed then.
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
    """Return (1 - b / n)^(gamma + 1), the old average's weight in an update of b images ending at n (EDM2, eq. 127).

    The product over consecutive batches telescopes to (n' / n)^(gamma + 1), so the profile is independent of batch
    size.

    Examples:
        >>> round(power_decay(1.0, images_seen=20, batch_size=10), 6)
        0.25
        >>> round(power_decay(1.0, 20, 10) * power_decay(1.0, 40, 20), 6), round(power_decay(1.0, 40, 30), 6)
        (0.0625, 0.0625)
    """
    if batch_size >= images_seen:
        return 0.0
    # log1p, because 1 - b / n would lose the digits of b for large n.
    return math.exp((gamma + 1) * math.log1p(-batch_size / images_seen))


def posthoc_weights(
    images_seen: Sequence[int], sigma_rels: Sequence[float], target_images: int, target_sigma_rel: float
) -> list[float]:
    """Return coefficients of snapshots that best approximate another average (EDM2, Karras et al. 2024a, app. C.3).

    The weighted sum of the snapshots' profiles is the least-squares fit to the target profile, computed in float64 from
    the closed form of their inner products. The coefficients are scaled to sum to 1, so weights that never changed are
    reproduced exactly. If the target is one of the snapshots, its coefficient is 1 and the others are 0.

    Args:
        images_seen: number of images of each snapshot.
        sigma_rels: relative width of each snapshot.
        target_images: number of images of the wanted average.
        target_sigma_rel: relative width of the wanted average.

    Raises:
        ValueError: there are no snapshots or duplicates, a width or number of images is out of range, or the target is
            later than the last snapshot.

    Examples:
        >>> posthoc_weights([10, 20], [0.1, 0.1], target_images=20, target_sigma_rel=0.1)
        [0.0, 1.0]
        >>> round(sum(posthoc_weights([10, 20, 20], [0.1, 0.1, 0.2], 20, 0.15)), 9)
        1.0
    """
    snapshots = list(zip(images_seen, sigma_rels, strict=True))
    if not snapshots or len(set(snapshots)) < len(snapshots):
        raise ValueError(f"need at least one snapshot and none twice, got (images_seen, sigma_rel) = {snapshots}")
    if min(*images_seen, target_images) < 1:
        raise ValueError(f"images_seen must be >= 1, got {sorted(images_seen)[0]} and a target of {target_images}")
    if target_images > max(images_seen):
        raise ValueError(
            f"the target is at {target_images} images, the last snapshot at {max(images_seen)}: weights after it "
            "are not known; choose images_seen up to that"
        )
    target_gamma = gamma_from_sigma_rel(target_sigma_rel)
    if (target_images, target_sigma_rel) in snapshots:
        return [float(s == (target_images, target_sigma_rel)) for s in snapshots]
    times = np.array([float(n) for n in images_seen])
    gammas = np.array([gamma_from_sigma_rel(s) for s in sigma_rels])
    # Normalise the profiles to length 1: those of early snapshots are much larger, which would cost precision.
    lengths = _inner_product(times, gammas, times, gammas) ** 0.5
    gram = _inner_product(times[:, None], gammas[:, None], times, gammas) / (lengths[:, None] * lengths)
    projection = _inner_product(times, gammas, np.array(float(target_images)), np.array(target_gamma)) / lengths
    solution = np.linalg.lstsq(gram, projection, rcond=None)[0] / lengths
    return [float(w) for w in solution / solution.sum()]


def reconstruct(snapshots: Sequence[PowerSnapshot], images_seen: int, sigma_rel: float) -> dict[str, Tensor]:
    """Return the average of any width at any time, from snapshots of others (EDM2, Karras et al. 2024a, sec. 3.2).

    The error falls with more frequent snapshots; it is smallest for widths between the tracked ones.

    Args:
        snapshots: snapshots of one run, of at least two widths, the last at `images_seen` or later.
        images_seen: number of images of the wanted average.
        sigma_rel: relative width of the wanted average.

    Returns:
        name -> averaged float32 tensor, ready for `module.load_state_dict`.

    Raises:
        ValueError: as for `posthoc_weights`; or the snapshots are of different networks.

    Examples:
        >>> weights = {"weight": torch.tensor([2.0])}
        >>> snapshots = [PowerSnapshot(weights, 100, sigma_rel) for sigma_rel in (0.05, 0.1)]
        >>> reconstruct(snapshots, images_seen=100, sigma_rel=0.07)["weight"].tolist()  # weights that never changed
        [2.0]
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
        total = torch.zeros(shape, dtype=torch.float64)  # coefficients of opposite signs cancel
        for coefficient, snapshot in zip(coefficients, snapshots, strict=True):
            if coefficient != 0:
                total += coefficient * snapshot.weights[name].to("cpu", torch.float64)
        averaged[name] = total.float()
    return averaged


def _inner_product(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Return inner products of profiles (gamma + 1) tau^gamma / t^(gamma + 1) on (0, t] (EDM2, eq. 151)."""
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


CACHED = 1 << 15
"""Numbers that are averaged at a time on a CPU: they stay in its cache, and are too few for threads to wait for."""


def _move(shadow: Mapping[str, Tensor], residual: Mapping[str, Tensor], weights: list[Tensor], weight: float) -> None:
    """Update averages in place: shadow + residual becomes (1 - weight) (shadow + residual) + weight w."""
    high, low = _local(shadow.values()), _local(residual.values())
    if not high or high[0].device.type != "cpu":
        _move_together(high, low, weights, weight)
        return
    for tensors in zip(high, low, weights, strict=True):
        flat = all(tensor.is_contiguous() for tensor in tensors)
        parts = [tensor.view(-1).split(CACHED) if flat else (tensor,) for tensor in tensors]
        for one, rest, new in zip(*parts, strict=True):
            _move_together([one], [rest], [new], weight)


def _move_together(high: list[Tensor], low: list[Tensor], weights: list[Tensor], weight: float) -> None:
    if weight == 1:
        torch._foreach_copy_(high, weights)
        torch._foreach_zero_(low)
        return
    # Add the change, weight ((w - high) - low), to the residual, which is small and so has 24 bits for it.
    change = torch._foreach_sub(weights, high)
    torch._foreach_sub_(change, low)
    torch._foreach_add_(low, change, alpha=weight)
    # Round high + low to the new high; the new low, the rounding error, is exact in float32 (fast two-sum, Dekker
    # 1971).
    total = torch._foreach_add(high, low)
    torch._foreach_sub_(high, total)
    torch._foreach_add_(low, high)
    torch._foreach_copy_(high, total)


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's local part of sharded tensors (FSDP2); averaging works on each part independently."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def _float(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the local parts of tensors without a gradient, such as those of a state dict, in float32."""
    return [t.float() for t in _local(tensors)]
