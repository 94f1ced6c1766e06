"""The likelihood of real images under a model: the variational bound with its terms, and the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.bound import variational_bounds
from ddpm.conditioning import Conditioning
from ddpm.likelihood import ode_bits_per_dim
from ddpm.model import Model
from pipelines.evaluation.drawing import with_labels
from pipelines.evaluation.real import Real
from pipelines.shards.captions import Captions

BOUND_STEPS = 250
"""Steps of the chain whose bound is computed, respaced from the schedule's own where it has more: each is one network
evaluation, and more of them give a tighter bound."""
ODE_TOLERANCE = 1e-4
BATCH = 16
"""Images of one call."""


@dataclass(frozen=True)
class Bounds:
    """The variational bound of images in bits per dimension, for each fixed variance of the chain's steps.

    A network that learns the variance has one bound, under "learned".

    Attributes:
        totals: variance -> upper bound on -log2 p(x_0), float64 [B].
        terms: variance -> its terms by increasing noise, the prior last, float64 [B, steps + 1].
        timesteps: t of each term, int64 [steps + 1].
    """

    totals: Mapping[str, NDArray[np.float64]]
    terms: Mapping[str, NDArray[np.float64]]
    timesteps: NDArray[np.int64]

    @property
    def tighter(self) -> str:
        """The variance whose bound has the lower mean."""
        return min(self.totals, key=lambda variance: float(self.totals[variance].mean()))

    @classmethod
    def joined(cls, parts: Sequence[Bounds]) -> Bounds:
        """Return the bounds of the images of all parts."""

        def join(of: Callable[[Bounds], Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
            return {variance: np.concatenate([of(part)[variance] for part in parts]) for variance in of(parts[0])}

        return cls(join(lambda part: part.totals), join(lambda part: part.terms), parts[0].timesteps)


@dataclass(frozen=True)
class Likelihood:
    """Bits per dimension of images, by both methods.

    Attributes:
        bounds: upper bounds on -log2 p(x_0).
        ode: -log2 p(x_0) by the probability-flow ODE, float64 [B].
    """

    bounds: Bounds
    ode: NDArray[np.float64]


def likelihood(model: Model, x_0: Tensor, cond: Conditioning | None, image_ids: Tensor, seed: int) -> Likelihood:
    """Return the likelihood of images under the model without guidance; arguments as for `bound_bits`."""
    bounds = bound_bits(model, x_0, cond, image_ids, seed)
    return Likelihood(bounds, ode_bits(model, x_0, cond, image_ids, seed).cpu().numpy())


def bound_bits(model: Model, x_0: Tensor, cond: Conditioning | None, image_ids: Tensor, seed: int) -> Bounds:
    """Return the variational bounds of images in bits per dimension.

    Args:
        x_0: images in [-1, 1] on the model's device, [B, C, H, W].
        cond: their condition, or None.
        image_ids: numbers of the images, on which their noise depends, int64 [B].
        seed: of the noise.
    """
    schedule = model.schedule
    learned = model.spec.network.out_channels == 2 * model.spec.shape[0]
    found = variational_bounds(
        model.spec.sampling.clipping.wrap(model.denoiser, schedule),
        schedule,
        x_0,
        cond,
        seed=seed,
        image_ids=image_ids,
        steps=min(BOUND_STEPS, schedule.num_steps),
        variances=("small",) if learned else ("small", "large"),
    )
    named = {"learned": found["small"]} if learned else found
    totals = {str(variance): bound.total.double().cpu().numpy() for variance, bound in named.items()}
    terms = {
        str(variance): torch.cat([bound.terms, bound.prior[:, None]], 1).double().cpu().numpy()
        for variance, bound in named.items()
    }
    timesteps = found["small"].timesteps
    return Bounds(totals, terms, np.append(timesteps.cpu().numpy(), schedule.num_steps))


def ode_bits(model: Model, x_0: Tensor, cond: Conditioning | None, image_ids: Tensor, seed: int) -> Tensor:
    """Return bits per dimension of images by the probability-flow ODE, float64 [B]; arguments as for `bound_bits`."""
    found = ode_bits_per_dim(
        model.denoiser,
        model.schedule,
        x_0,
        cond,
        seed=seed,
        image_ids=image_ids,
        rtol=ODE_TOLERANCE,
        atol=ODE_TOLERANCE,
    )
    return found.bits_per_dim.double()


def held_out_images(
    real: Real, captions: Captions | None, most: int | None = None
) -> tuple[Tensor, Conditioning | None]:
    """Return the stored test images, [N, C, H, W] in [-1, 1], with their classes and captions, if any.

    Args:
        captions: of these images.
        most: number of images, the first ones; all of them by default.
    """
    images, labels = real.held_out()
    x_0 = torch.from_numpy(images[:most]).float() / 127.5 - 1
    text = None if captions is None else captions.condition(torch.arange(len(x_0)), labels=False)
    return x_0, with_labels(text, None if labels is None else labels[:most])
