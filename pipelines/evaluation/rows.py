"""Rows of numbers in a file, so that the memory of who reads them does not grow with their number."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

CHUNK = 4_096


class Rows:
    """Arrays of one shape and type, one after another in a file; written at any place, read in parts.

    Args:
        path: the file, which is made where there is none.
        shape: of one row.
        dtype: of the numbers.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self.row_bytes = math.prod(shape) * self.dtype.itemsize
        path.touch()

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.path.stat().st_size // self.row_bytes

    def write(self, at: int, rows: NDArray[np.generic]) -> None:
        """Put rows at a place."""
        assert rows.shape[1:] == self.shape, (rows.shape, self.shape)
        with self.path.open("r+b") as file:
            file.seek(at * self.row_bytes)
            file.write(np.ascontiguousarray(rows, self.dtype).tobytes())

    def read(self, start: int, stop: int) -> NDArray[np.generic]:
        """Return the rows [start, stop) that there are."""
        with self.path.open("rb") as file:
            data = os.pread(file.fileno(), max(stop - start, 0) * self.row_bytes, start * self.row_bytes)
        return np.frombuffer(bytearray(data), self.dtype).reshape(-1, *self.shape)

    def chunks(self, start: int, stop: int) -> Iterator[NDArray[np.generic]]:
        """Yield the rows [start, stop) in order, `CHUNK` at a time."""
        for first in range(start, stop, CHUNK):
            yield self.read(first, min(first + CHUNK, stop))

    def map(self) -> NDArray[np.generic]:
        """Return all rows as a read-only memory map."""
        count = len(self)
        if not count:
            return np.empty((0, *self.shape), self.dtype)
        return np.memmap(self.path, self.dtype, "r", shape=(count, *self.shape))
