"""Objects with tensors in Ray's object store, which has the numbers of each tensor once on every node.

Ray pickles a tensor into bytes before it stores these, and its reader has the bytes beside the tensor. Arrays of NumPy
it writes and reads in place.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import cloudpickle
from torch import Tensor, nn

Packed = tuple[bytes, list[NDArray[Any]]]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
"""Those that NumPy has too."""


def packed(value: Any) -> Packed:
    """Return a value as what Ray stores without a copy in this process: (everything but tensors, arrays of these)."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), [tensor.detach().numpy() for tensor in pickler.tensors]


def unpacked(stored: Packed) -> Any:
    """Return the value that was packed, whose tensors have memory of their own."""
    return _Unpickler(*stored).load()


class _Pickler(cloudpickle.Pickler):
    """Leaves out plain tensors in CPU memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self.places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> tuple[int, bool, bool] | None:
        """Return (place among the tensors, whether it is a parameter, whether it is trained); None to pickle it."""
        if type(obj) not in (Tensor, nn.Parameter) or obj.dtype not in DTYPES or vars(obj) or not obj.is_leaf:
            return None
        if obj.device.type != "cpu" or obj.layout != torch.strided or not obj.is_contiguous():
            return None
        if id(obj) not in self.places:
            self.places[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self.places[id(obj)], isinstance(obj, nn.Parameter), obj.requires_grad


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, arrays: list[NDArray[Any]]) -> None:
        super().__init__(io.BytesIO(data))
        self.arrays = arrays
        self.found: dict[int, Tensor] = {}

    def persistent_load(self, pid: tuple[int, bool, bool]) -> Tensor:
        place, parameter, trained = pid
        if place not in self.found:
            array = self.arrays[place]
            tensor = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype)
            np.copyto(tensor.numpy(), array)
            self.found[place] = nn.Parameter(tensor, trained) if parameter else tensor.requires_grad_(trained)
        return self.found[place]
