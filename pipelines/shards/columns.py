"""Texts and members of tars in columns, for so many rows that an object for each would fill the memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray


class Texts(Sequence[str]):
    """Texts one after the other in UTF-8, of which each is made when it is asked for.

    Args:
        ends: where each text ends, with a leading 0, int64 [n + 1].
        data: the bytes of all texts, uint8; they may be mapped from a file.
    """

    def __init__(self, ends: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        self.ends, self.data = ends, data

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Return texts as columns."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]  # JSON may hold half a surrogate pair
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(ends, np.frombuffer(b"".join(encoded), np.uint8))

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[str, ...]: ...
    def __getitem__(self, i: int | slice) -> str | tuple[str, ...]:
        """Return a text, or some of them."""
        at = range(len(self))[i]
        if isinstance(at, range):
            return tuple(self[each] for each in at)
        return self.data[self.ends[at] : self.ends[at + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        """Return whether both are the same texts."""
        if not isinstance(other, Texts):
            return NotImplemented
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.data, other.data)

    __hash__ = None  # type: ignore[assignment]


PARTS = ("offset", "size", "crc32")
BLOCK = 512
"""Bytes at whose multiples the members of a tar begin, the first one behind a header."""
COLUMN = np.dtype([("block", "<u4"), ("size", "<u4"), ("crc32", "<u4")])
"""A row of a column of members: of a sample without one, all are 0."""
WIDE_COLUMN = np.dtype([(part, "<i8") for part in PARTS])
"""A row of a column with a member of 4 GiB or more, or with numbers that a damaged tar has: all -1 without one."""


def member_column(rows: NDArray[np.int64]) -> NDArray[np.void]:
    """Return members as a column.

    Args:
        rows: offset, size and CRC-32 of each member, int64 [samples, 3]; the offset is below 0 where there is none.
    """
    there = rows[:, 0] >= 0
    blocks, odd = np.divmod(rows[:, 0], BLOCK)
    numbers = np.stack([blocks, rows[:, 1], rows[:, 2]], axis=1)[there]
    narrow = bool(((numbers >= 0) & (numbers < 2**32)).all() and (numbers[:, 0] > 0).all() and not odd[there].any())
    column = np.zeros(len(rows), COLUMN if narrow else WIDE_COLUMN)
    if narrow:
        for name, values in zip(COLUMN.names or (), numbers.T, strict=True):
            column[name][there] = values
    else:
        for name, values in zip(PARTS, rows.T, strict=True):
            column[name] = np.where(there, values, -1)
    return column


def member_rows(column: NDArray[np.void]) -> NDArray[np.int64]:
    """Return the members of a column as offset, size and CRC-32, int64 [samples, 3]; -1 where there is none."""
    names = column.dtype.names or ()
    rows = np.stack([column[name].astype(np.int64) for name in names], axis=1)
    if names != PARTS:
        missing = rows[:, 0] == 0
        rows[:, 0] *= BLOCK
        rows[missing] = -1
    return rows


_NUMBER = rb"(?:0|-?[1-9][0-9]{0,17})"
_NUMBERS = re.compile(rb'("(?:offset|size|crc32)":)\[(' + _NUMBER + rb"(?:," + _NUMBER + rb")*)\]")


def without_numbers(text: bytes) -> tuple[bytes, list[NDArray[np.int64]]]:
    """Return the JSON of a sidecar with the place in a list in place of each list of numbers, and that list.

    Numbers are read as columns, without an object for each. Lists that are written otherwise stay where they are.
    """
    found: list[NDArray[np.int64]] = []

    def taken(match: re.Match[bytes]) -> bytes:
        found.append(np.fromstring(match[2], np.int64, sep=","))
        return b"%s%d" % (match[1], len(found) - 1)

    return _NUMBERS.sub(taken, text), found
