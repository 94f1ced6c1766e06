"""Texts and members of tars in columns, for so many rows that an object for each would fill the memory."""

from __future__ import annotations

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
COLUMN = np.dtype([("offset", "<i8"), ("size", "<u4"), ("crc32", "<u4")])
"""A row of a column of members: of a sample without one, the offset is -1 and the others are 0."""
WIDE_COLUMN = np.dtype([(part, "<i8") for part in PARTS])
"""A row of a column with a member of 4 GiB or more, or with numbers that a damaged tar has."""


def member_column(rows: NDArray[np.int64]) -> NDArray[np.void]:
    """Return members as a column.

    Args:
        rows: offset, size and CRC-32 of each member, int64 [samples, 3]; the offset is below 0 where there is none.
    """
    there = rows[:, 0] >= 0
    others = rows[there, 1:]
    narrow = bool(((others >= 0) & (others < 2**32)).all())
    column = np.zeros(len(rows), COLUMN if narrow else WIDE_COLUMN)
    column["offset"] = np.where(there, rows[:, 0], -1)
    column["size"], column["crc32"] = np.where(there, rows[:, 1], 0), np.where(there, rows[:, 2], 0)
    return column
