"""The cost of drawing an image, in network evaluations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm.model import Model
from ddpm.models.classifier import NoisyClassifier


class Meter:
    """Count the network evaluations of sampling, in evaluations of the model's own network on one image.

    An evaluation of a guiding network counts as the ratio of its floating-point operations to those of the model's
    network; a classifier's backward pass is included. What is compiled is not counted.
    """

    def __init__(self, model: Model) -> None:
        self.count = 0.0
        self._shape = model.spec.shape
        self._unit = self._flops(model.network)
        self._watched = [self._watch(model.network, 1.0)]
        for guide in (model.classifier, model.weak):
            if guide is not None:
                self.guide(guide)

    def guide(self, guide: NoisyClassifier | Model) -> None:
        """Count the evaluations of a guiding network as well."""
        network = guide.network if isinstance(guide, Model) else guide
        cost = self._flops(network, backward=isinstance(guide, NoisyClassifier)) / self._unit
        self._watched.append(self._watch(network, cost))

    def close(self) -> None:
        """Count no more."""
        for watched in self._watched:
            watched.remove()

    def _watch(self, network: nn.Module, cost: float) -> Any:
        """Count `cost` for every image of every evaluation of a network."""

        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.count += cost * len(inputs[0])

        return network.register_forward_pre_hook(count)

    def _flops(self, network: nn.Module, backward: bool = False) -> int:
        """Return the floating-point operations of one evaluation on one image."""
        device = next(network.parameters()).device
        x = torch.zeros(1, *self._shape, device=device, requires_grad=backward)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            output = network(x, torch.zeros(1, device=device))
            if backward:
                output.sum().backward()
        return counter.get_total_flops()
