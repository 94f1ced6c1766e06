"""Images whose hashes differ in few bits, found out of core.

Images of one hash are a group, and groups are compared with each other, so that a picture that is there a million times
costs no more than a million lines.

Two hashes of `WIDTH` bits that differ in at most r bits have, of m parts of their bits, at least m - r parts equal (the
pigeonhole principle). So for each choice of m - r parts the hashes are put into buckets by the bits of these parts, and
those of a bucket are compared with each other: every pair within r bits meets at least once, and none is missed. More
parts make more passes over the hashes, of smaller buckets; the number of parts is chosen by the number of hashes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import combinations, pairwise
from math import comb
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.ingest.spool import Record, Spool

WIDTH = 63
MOST_PARTS = 12
IN_A_FILE = 1 << 17
"""Hashes whose buckets are compared in memory."""
MOST_FILES = 256
_PAIR = np.dtype([("hash", np.uint64), ("position", np.int64)])
_ONES = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)
Hashes = Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]


def near_groups(hashes: Hashes, radius: int, scratch: Path) -> Iterator[tuple[int, Record]]:
    """Yield (position of an image, (its group, near groups)) where another image is in them, in order of the positions.

    A group is the images of one hash, and is named by the position of its first image.

    Args:
        hashes: (positions, their hashes), piece by piece.
        radius: largest number of bits in which the hashes of near groups differ.
        scratch: an empty folder on this machine, for at most 56 bytes a hash and for what is near.
    """
    whole, count = scratch / "hashes", 0
    with whole.open("wb") as file:
        for positions, values in hashes:
            rows = np.empty(len(values), _PAIR)
            rows["hash"], rows["position"] = values, positions
            rows.tofile(file)
            count += len(rows)
    groups, found = Spool(scratch / "groups"), Spool(scratch / "near")
    distinct, count = _distinct(whole, count, scratch, groups)
    for mask in _masks(parts_for(count, radius), radius):
        for bucketed in _divided(distinct, count, mask, scratch):
            for one, other in _within(bucketed, mask, radius):
                groups.add(one, None, other)
                groups.add(other, None, one)
    for group, records in groups.groups():
        near = tuple(sorted({other for _, other in records if other is not None}))
        for position in (group, *(member for member, _ in records if member is not None)):
            found.add(position, group, near)
    return iter(found)


def _distinct(whole: Path, count: int, scratch: Path, groups: Spool) -> tuple[Path, int]:
    """Write each hash once, with its first position; the others go to the groups as (first, other, None).

    Returns:
        The file, and the number of its hashes.
    """
    path, kept = scratch / "distinct", 0
    with path.open("wb") as file:
        for rows in _divided(whole, count, np.uint64((1 << WIDTH) - 1), scratch):
            rows.sort(order=("hash", "position"))
            firsts = np.flatnonzero(np.concatenate([[True], rows["hash"][1:] != rows["hash"][:-1]])[: len(rows)])
            rows[firsts].tofile(file)
            kept += len(firsts)
            group = np.repeat(rows["position"][firsts], np.diff(firsts, append=len(rows)))
            again = group != rows["position"]
            for first, position in zip(group[again].tolist(), rows["position"][again].tolist(), strict=True):
                groups.add(first, position, None)
    return path, kept


def parts_for(count: int, radius: int) -> int:
    """Return the number of parts with which the fewest hashes are read and compared."""

    def cost(parts: int) -> float:
        bucket = count / 2 ** (WIDTH * (parts - radius) / parts)
        return comb(parts, radius) * count * (1 + bucket / 2)

    return min(range(radius + 1, max(radius + 1, MOST_PARTS) + 1), key=cost)


def _masks(parts: int, radius: int) -> Iterator[np.uint64]:
    """Yield the bits of each choice of parts that have to be equal."""
    edges = [WIDTH * part // parts for part in range(parts + 1)]
    bits = [(1 << stop) - (1 << start) for start, stop in pairwise(edges)]
    for chosen in combinations(bits, parts - radius):
        yield np.uint64(sum(chosen))


def _ones(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the number of ones of each value."""
    counted: NDArray[np.int64] = _ONES[values.view(np.uint16)].reshape(-1, 4).sum(1, dtype=np.int64)
    return counted


def _divided(whole: Path, count: int, mask: np.uint64, scratch: Path) -> Iterator[NDArray[np.void]]:
    """Yield the hashes in pieces, those of a bucket in the same one."""
    files = min(MOST_FILES, -(-count // IN_A_FILE))
    if files <= 1:
        yield np.fromfile(whole, _PAIR)
        return
    paths = [scratch / f"buckets-{number:03d}" for number in range(files)]
    with ExitStack() as stack:
        opened = [stack.enter_context(path.open("wb")) for path in paths]
        with whole.open("rb") as file:
            while len(rows := np.fromfile(file, _PAIR, IN_A_FILE)):
                mixed = (rows["hash"] & mask) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing, Knuth 6.4
                number = (mixed >> np.uint64(40)) % np.uint64(files)
                for place in range(files):
                    rows[number == place].tofile(opened[place])
    for path in paths:
        yield np.fromfile(path, _PAIR)
        path.unlink()


def _within(rows: NDArray[np.void], mask: np.uint64, radius: int) -> Iterator[tuple[int, int]]:
    """Yield the positions of the pairs of each bucket that are near, each with the next, the second next, …"""
    rows = rows[np.argsort(rows["hash"] & mask, kind="stable")]
    keys, hashes, positions = rows["hash"] & mask, rows["hash"], rows["position"]
    at, step = np.arange(len(rows)), 1
    while len(at := at[at + step < len(rows)]):
        at = at[keys[at] == keys[at + step]]
        near = at[_ones(hashes[at] ^ hashes[at + step]) <= radius]
        yield from zip(positions[near].tolist(), positions[near + step].tolist(), strict=True)
        step += 1
