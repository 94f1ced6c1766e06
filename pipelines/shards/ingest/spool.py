"""Order by disk, and calls ahead: what an ingest needs to hold few of its sources in memory, however many there are."""

from __future__ import annotations

import heapq
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Record = tuple[Any, ...]

HELD = 1 << 15
"""Records in memory, a few hundred bytes each; more are written to a sorted file, a *run*."""
BLOCK = 64
"""Records of a run that are read at once."""
FAN_IN = 64
"""Runs that are merged at a time: with more of them, they become one."""


class Spool:
    """Sorts records of any number in a folder: first by their key, then as they were added.

    Args:
        folder: an empty folder on this machine, which holds all records once; the caller deletes it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.count = folder, 0
        self.held: list[tuple[Any, Record]] = []
        self.levels: list[list[Path]] = [[]]

    def __len__(self) -> int:
        """Return the number of records."""
        return self.count

    def add(self, key: Any, *record: Any) -> None:
        """Add a record; keys of a spool are all of one type that can be compared."""
        self.held.append((key, record))
        self.count += 1
        if len(self.held) == HELD:
            self._write_run()

    def __iter__(self) -> Iterator[tuple[Any, Record]]:
        """Yield (key, record) in order; may be called again, and after further records."""
        self.held.sort(key=itemgetter(0))
        runs = [_read(path) for level in reversed(self.levels) for path in level]  # the oldest are in the last level
        return heapq.merge(*runs, self.held, key=itemgetter(0))

    def groups(self) -> Iterator[tuple[Any, list[Record]]]:
        """Yield each key with its records in the order in which they were added."""
        for key, found in groupby(self, key=itemgetter(0)):
            yield key, [record for _, record in found]

    def _write_run(self) -> None:
        self.held.sort(key=itemgetter(0))
        self._store(0, iter(self.held))
        self.held = []

    def _store(self, level: int, records: Iterator[tuple[Any, Record]]) -> None:
        """Write sorted records as a run of a level; a full level becomes one run of the next."""
        if level == len(self.levels):
            self.levels.append([])
        runs = self.levels[level]
        path = self.folder / f"{level}-{len(runs):04d}"
        with path.open("wb") as file:
            while block := list(islice(records, BLOCK)):
                pickle.dump(block, file, pickle.HIGHEST_PROTOCOL)
        runs.append(path)
        if len(runs) == FAN_IN:
            self._store(level + 1, heapq.merge(*map(_read, runs), key=itemgetter(0)))
            for run in runs:
                run.unlink()
            runs.clear()


def _read(path: Path) -> Iterator[tuple[Any, Record]]:
    with path.open("rb") as file:
        while file.peek(1):
            yield from pickle.load(file)


def ahead(pool: Executor, call: Callable[[T], R], items: Iterable[T], at_once: int) -> Iterator[R]:
    """Yield the result of a call for each item, in order, while a pool works on the next ones.

    Args:
        at_once: items that are taken before the result of the first of them is yielded.
    """
    coming = iter(items)
    running: deque[Future[R]] = deque(pool.submit(call, item) for item in islice(coming, at_once))
    try:
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(call, item) for item in islice(coming, 1))
            yield result
    finally:
        for future in running:
            future.cancel()
