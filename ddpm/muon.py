"""Muon, an optimizer that orthogonalizes the update of every hidden matrix, with AdamW for all other parameters.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon).

`torch.optim.Muon` takes only 2-D weights and iterates in bfloat16. Here the kernel of a convolution is the matrix
[out, in * height * width] that multiplies patches, and the caller chooses the precision of the iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen by Jordan et al. so that small singular values grow fast."""
STEPS = 5
RMS = 0.2
"""Root mean square of an AdamW update; that of a matrix is scaled to it, so that both share one learning rate and one
weight decay (Liu et al. 2025, "Muon is Scalable for LLM Training", sec. 2.2)."""


def orthogonalized(matrix: Tensor, dtype: torch.dtype, steps: int = STEPS) -> Tensor:
    """Return approximately U V^T for a matrix U S V^T [M, N], by the Newton-Schulz iteration.

    Singular values not far below the largest end up between about 0.7 and 1.2; 0 stays 0.

    Args:
        dtype: dtype of the iteration; the result has the dtype of the matrix.

    Examples:
        >>> matrix = torch.tensor([[3.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
        >>> found = orthogonalized(matrix, torch.float64)
        >>> found.sign().tolist(), found.diagonal().abs().round(decimals=1).tolist()
        ([[1.0, 0.0], [0.0, -1.0]], [1.1, 0.7])
    """
    a, b, c = COEFFICIENTS
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix  # the smaller Gram matrix
    x = x.to(dtype)
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


def hidden_matrices(network: nn.Module) -> list[Tensor]:
    """Return the weights of a network's hidden linear layers and convolutions: all but those of its first and last one.

    "First" and "last" refer to the order of definition. Embeddings, norms and biases are not hidden matrices.

    Examples:
        >>> network = nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> [tuple(matrix.shape) for matrix in hidden_matrices(network)]
        [(8, 8)]
    """
    layers = [
        module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ]
    return [layer.weight for layer in layers[1:-1] if layer.weight.requires_grad]


Function = Callable[[Tensor], Tensor]


def _of_whole(function: Function, tensor: Tensor) -> Tensor:
    """Return the function of a tensor that is whole already."""
    return function(tensor)


class Muon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the other parameters, as one optimizer.

    A matrix W [out, in] of gradient g becomes W - lr (R orthogonalized(g + mu b) + weight_decay W), where b = mu b + g
    is Nesterov's momentum and R = 0.2 sqrt(max(out, in)).

    Args:
        matrices: parameters with two or more dimensions; all but the first are flattened into one.
        others: all other parameters.
        lr: learning rate of both parts.
        betas: decay rates of AdamW's averages.
        weight_decay: decoupled weight decay of both parts.
        momentum: mu of Muon, in [0, 1).
        dtype: dtype of the iteration; None for that of the weights.
        on_whole: applies a shape-preserving function to a whole matrix. Where a process holds only parts of matrices,
        it gathers the matrix first and returns this process's part of the result.

    Examples:
        >>> matrix = nn.Parameter(torch.zeros(8, 8))
        >>> matrix.grad = torch.diag(torch.arange(1.0, 9.0))
        >>> Muon([matrix], [], lr=0.1).step()
        >>> round(matrix.square().mean().sqrt().item() / 0.1, 1)  # `RMS`
        0.2
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
        on_whole: Callable[[Function, Tensor], Tensor] = _of_whole,
    ) -> None:
        rest = list(others)
        # With "fused", torch moves AdamW's step counts to the device of the weights, where the kernel reads them.
        groups: list[dict[str, Any]] = [{"params": list(matrices)}, {"params": rest, "fused": True}]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype, self.on_whole, self.adamw = dtype, on_whole, None
        if rest:
            self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
            self.adamw.state = self.state  # one state dict for both, keyed by parameter

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`; torch replaces the state, so both parts are made to share it again."""
        super().load_state_dict(state_dict)
        if self.adamw is not None:
            self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Raises:
            ValueError: a closure is given, which an optimizer of two parts would call twice.
        """
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the gradients before the step")
        matrices, others = self.param_groups
        for parameter in matrices["params"]:
            if parameter.grad is not None:
                self._update(parameter, parameter.grad, matrices)
        if self.adamw is not None:
            self.adamw.param_groups[0]["lr"] = others["lr"]
            self.adamw.step()

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        ahead = gradient.add(buffer, alpha=group["momentum"])
        update = self.on_whole(self._orthogonalized, ahead)
        largest = max(parameter.shape[0], math.prod(parameter.shape[1:]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * RMS * math.sqrt(largest))

    def _orthogonalized(self, whole: Tensor) -> Tensor:
        matrix = whole.flatten(1)
        return orthogonalized(matrix, self.dtype or matrix.dtype).reshape(whole.shape)
