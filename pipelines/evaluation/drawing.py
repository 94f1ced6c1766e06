"""Images of a model by their numbers, drawn in this process: what an encoder says of them, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm.bound import variational_bound
from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling
from ddpm.model import Model
from pipelines.evaluation.devices import task_device
from pipelines.evaluation.evaluators.base import Encoded, FeatureEncoder
from pipelines.evaluation.images import to_levels

HELD_OUT_STEPS = 64
"""Steps of the chain whose bound judges the trials of a study."""


@dataclass(frozen=True, eq=False)
class JudgedModel:
    """A model, and what encodes its images.

    An image depends on its number, its condition, the seed and the settings, and not on the other images.

    Attributes:
        model: with the guiding networks that its settings name; its weights may be those of a training, for a while.
        encode: maps images uint8 [N, C, H, W] to features.
        device: of both.
    """

    model: Model
    encode: FeatureEncoder
    device: torch.device

    @classmethod
    def here(cls, model: Model, encoder: FeatureEncoder) -> JudgedModel:
        """Return both on the device of this process; networks are moved in place."""
        device = task_device()
        return cls(model.to(device), encoder.to(device), device)

    def condition(self, cond: Conditioning | None, image_ids: Tensor) -> Conditioning | None:
        """Return what the model takes of the conditions of images by their numbers.

        Args:
            cond: N conditions, of which image i has number i modulo N; None for none.
            image_ids: int64 [B].
        """
        spec = self.model.spec
        if cond is not None and not spec.classes:
            cond = replace(cond, label=None)
        if cond is not None and not spec.network.text_dim:
            cond = replace(cond, text=None, text_mask=None, pooled=None)
        return None if cond is None or not cond.present else cond[image_ids % len(cond)].to(self.device)

    def images(
        self, cond: Conditioning | None, image_ids: Tensor, sampling: Sampling, seed: int, batch_size: int = 64
    ) -> Tensor:
        """Return the images of these numbers and conditions in [-1, 1], [B, C, H, W], on the device.

        Args:
            cond: of these images, [B]; None for none.
            image_ids: numbers of the images, int64 [B].
            sampling: settings, whose guiding networks the model has.
            seed: of the noise.
            batch_size: images to draw at a time.
        """
        return self.model.generate(
            None if cond is None else cond.label,
            text=None if cond is None or cond.present == ("label",) else replace(cond, label=None),
            sampling=sampling,
            seed=seed,
            image_ids=image_ids.to(self.device),
            batch_size=batch_size,
        )

    def encoded(self, cond: Conditioning | None, image_ids: Tensor, sampling: Sampling, seed: int) -> Encoded:
        """Return what the encoder says of images, rounded to the levels that a user receives; see `images`."""
        return self.encode(to_levels(self.images(cond, image_ids, sampling, seed)))

    def evaluations(self, cond: Conditioning | None, image_ids: Tensor, sampling: Sampling, seed: int) -> float:
        """Return how many network evaluations an image takes; see `counted` and `images`."""
        with counted(self.model) as count:
            self.images(cond, image_ids, sampling.with_fields(compile=False), seed)
        return count() / len(image_ids)

    @torch.no_grad()
    def bound(self, images: Tensor, cond: Conditioning | None, image_ids: Tensor, seed: int) -> Tensor:
        """Return the variational bound of some real images on a chain of `HELD_OUT_STEPS` steps, in bits/dim, [B].

        Args:
            images: all of them in [-1, 1], [N, C, H, W].
            cond: of all of them, [N]; None for none.
            image_ids: numbers of those whose bound is asked for, int64 [B].
            seed: of the noise.
        """
        model = self.model
        return variational_bound(
            model.spec.sampling.clipping.wrap(model.denoiser, model.schedule),
            model.schedule,
            images[image_ids].to(self.device),
            self.condition(cond, image_ids),
            seed=seed,
            image_ids=image_ids.to(self.device),
            steps=min(HELD_OUT_STEPS, model.schedule.num_steps),
        ).total


def with_labels(text: Conditioning | None, labels: NDArray[np.int64] | None) -> Conditioning | None:
    """Return texts [N] with classes int64 [N], on the CPU; None without either."""
    if labels is None:
        return text
    return replace(Conditioning() if text is None else text, label=torch.from_numpy(labels))


@contextmanager
def counted(model: Model) -> Iterator[Callable[[], float]]:
    """Return what counts the network evaluations meanwhile, in evaluations of the model's own network on one image.

    An evaluation of a guiding network counts as the ratio of its floating-point operations to those of the model's
    network; a classifier's backward pass is included. What is compiled is not counted.
    """
    networks = [model.network, model.classifier, None if model.weak is None else model.weak.network]
    asked: Counter[nn.Module] = Counter()

    def note(network: nn.Module, inputs: tuple[Any, ...]) -> None:
        asked[network] += len(inputs[0])

    def evaluations() -> float:
        shape, guides = model.spec.shape, asked.keys() - {model.network}
        costs = [asked[guide] * _flops(guide, shape, guide is model.classifier) for guide in guides]
        return asked[model.network] + (sum(costs) / _flops(model.network, shape) if costs else 0.0)

    hooks = [network.register_forward_pre_hook(note) for network in networks if network is not None]
    try:
        yield evaluations
    finally:
        for hook in hooks:
            hook.remove()


def _flops(network: nn.Module, shape: tuple[int, ...], backward: bool = False) -> int:
    """Return the floating-point operations of one evaluation on one image."""
    device = next(network.parameters()).device
    x = torch.zeros(1, *shape, device=device, requires_grad=backward)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = network(x, torch.zeros(1, device=device))
        if backward:
            output.sum().backward()
    return counter.get_total_flops()
