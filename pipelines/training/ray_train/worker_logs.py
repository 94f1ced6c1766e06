"""Python's logging of a worker, sent to the run's folder and to the driver's terminal.

Ray keeps the output of its workers in files on their nodes, which nobody reads and which end with the cluster. A
thread of every rank writes its warnings and errors to `logs/` of the run instead, and posts those of this project to
the run's monitor, with what this project says at level INFO. Neither ever blocks a step, or fails one.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from pipelines.presentation.errors import PipelineError
from pipelines.storage import Storage
from pipelines.training.log_lines import LogLine, encode, log_address

OURS = ("pipelines", "ddpm")
TOGETHER_S = 0.2
"""Seconds for which lines are gathered before they are posted together."""
WRITE_EVERY_S = 3.0
CLOSE_S = 10.0
"""Seconds that the end of a training waits for its last lines to be stored."""
PART_BYTES = 1 << 20
PARTS = 4
"""How many parts of an attempt's log are kept: the first one and the last."""
MESSAGE_CHARACTERS = 16_000
WAITING_LINES = 2_000
"""Lines that wait for the thread; what comes while so many wait is counted only."""
SHOWN_CHARACTERS = 1_000
Post = Callable[[Sequence[tuple[int, str]]], object]
"""Takes (rank, text) of lines for the driver's terminal."""


class WorkerLog(logging.Handler):
    """Stores what is logged in this process, and posts what the driver should show.

    Two threads: posting must not wait for a store that does not answer, of which the posted line may warn.

    Args:
        address: returns the address of a part of this rank's log by its number.
        post: called in a thread with lines for the driver.
    """

    def __init__(self, storage: Storage, address: Callable[[int], str], rank: int, post: Post) -> None:
        super().__init__(logging.INFO)
        self.rank, self.post = rank, post
        self.file = _StoredLog(storage, address)
        self.waiting: deque[tuple[LogLine, bool]] = deque()
        self.left_out = 0
        self._wake, self._ending = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("worker-log-post", self._take), ("worker-log-store", self._store))
        ]
        for thread in self._threads:
            thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record; the threads do the rest."""
        if threading.current_thread() in self._threads:
            return  # about this log itself
        ours = record.name.split(".")[0] in OURS
        if record.levelno < logging.WARNING and not ours:
            return
        if len(self.waiting) >= WAITING_LINES:
            self.left_out += 1
            return
        try:
            message = record.getMessage()
            if record.exc_info:
                message = f"{message}\n{logging.Formatter().formatException(record.exc_info)}"
        except Exception:  # noqa: BLE001 - a wrong format string of someone's must not end a training
            message = str(record.msg)
        if len(message) > MESSAGE_CHARACTERS:
            half = MESSAGE_CHARACTERS // 2
            message = f"{message[:half]}\n…\n{message[-half:]}"
        line = LogLine(record.created, record.levelname, self.rank, record.name, message)
        self.waiting.append((line, ours or record.levelno >= logging.ERROR))
        self._wake.set()

    def close(self) -> None:
        """Post and store what is left, as far as that is possible in `CLOSE_S` seconds."""
        deadline = time.monotonic() + CLOSE_S
        self._ending.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        super().close()

    def _take(self) -> None:
        """Post lines that the driver shows, and pass all lines on to the stored log."""
        ending = False
        while not ending:
            self._wake.wait()
            self._wake.clear()
            ending = self._ending.wait(TOGETHER_S)
            taken = [self.waiting.popleft() for _ in range(len(self.waiting))]
            if self.left_out:
                text, self.left_out = f"{self.left_out:,} further lines came too fast and are left out", 0
                taken.append((LogLine(time.time(), "WARNING", self.rank, __name__, text), True))
            self.file.add([line for line, _ in taken])
            shown = [(line.rank, line.message[:SHOWN_CHARACTERS]) for line, show in taken if show]
            if shown:
                with suppress(Exception):  # without a driver there is nobody to show it to
                    self.post(shown)

    def _store(self) -> None:
        """Store every few seconds, and once more when all lines are taken."""
        while not self._ending.wait(WRITE_EVERY_S):
            self.file.write()
        self._threads[0].join(CLOSE_S)
        self.file.write()


class _StoredLog:
    """The stored parts of a rank's log; the last one is stored again whenever it has grown."""

    def __init__(self, storage: Storage, address: Callable[[int], str]) -> None:
        self.storage, self.address = storage, address
        self.parts: dict[int, bytes] = {0: b""}
        """Those that are not stored whole, and the last one."""
        self._stored: dict[int, int] = {}  # bytes of each
        self._lock = threading.Lock()

    def add(self, lines: Sequence[LogLine]) -> None:
        """Append lines; a new part begins where the last one is full."""
        with self._lock:
            for line in lines:
                data, last = encode([line]), max(self.parts)
                if self.parts[last] and len(self.parts[last]) + len(data) > PART_BYTES:
                    last += 1
                    self.parts[last] = b""
                    # Where storage stays away, the middle is lost: a process must not fill its memory with a log.
                    for part in sorted(self.parts)[1 : -PARTS + 1]:
                        del self.parts[part]
                self.parts[last] += data

    def write(self) -> None:
        """Store the new lines in a single try; the next call tries again."""
        with self._lock:
            grown = {part: data for part, data in self.parts.items() if len(data) > self._stored.get(part, 0)}
        with suppress(PipelineError):
            for part, data in sorted(grown.items()):
                self.storage.write(self.address(part), data, patience_s=0)
                self._stored[part] = len(data)
                for old in [p for p in self._stored if 0 < p < part - PARTS + 2]:
                    self.storage.delete(self.address(old), patience_s=0)
                    del self._stored[old]
        with self._lock:
            for part in list(self.parts)[:-1]:
                if len(self.parts[part]) == self._stored.get(part, 0):
                    del self.parts[part]


@contextmanager
def recorded(storage: Storage, folder: str, monitor: Any, *, epoch: int, rank: int, attempt: str) -> Iterator[None]:
    """Store what this process logs inside the context as the log of a rank, its failure included.

    Args:
        folder: address of all that the run stores.
        monitor: handle of the run's monitor actor.
        epoch: of the driver that this rank belongs to.
        attempt: letters and digits that no other attempt of this rank and driver has.
    """
    references: list[Any] = []

    def post(lines: Sequence[tuple[int, str]]) -> None:
        references[:] = [monitor.hear.remote(list(lines))]

    log = WorkerLog(storage, lambda part: log_address(folder, epoch, rank, attempt, part), rank, post)
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in OURS}
    root.addHandler(log)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except Exception as error:
        log.emit(_failure(error))
        raise
    finally:
        logging.captureWarnings(False)
        root.removeHandler(log)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        log.close()
        with suppress(RayError):  # the driver has ended
            ray.wait(references, timeout=CLOSE_S) if references else None


def _failure(error: BaseException) -> logging.LogRecord:
    """Return the record of an error that ends a rank; its first line is what the driver shows."""
    text = f"failed: {type(error).__name__}: {error}"
    info = (type(error), error, error.__traceback__)
    return logging.LogRecord(__name__, logging.ERROR, __file__, 0, text, None, info)


class LogDeduplicator:
    """Shows messages of workers on the driver's terminal, each once, with a count where it repeats.

    Texts that differ in their numbers only are the same one.

    Args:
        notice: called with lines for the user.
        name: of the run.
    """

    MOST = 100
    """Different texts that are shown; `ddpm logs` has all."""

    def __init__(self, notice: Callable[[str], None], name: str) -> None:
        self.notice, self.name = notice, name
        self.texts: dict[str, _Text] = {}

    def add(self, lines: Sequence[tuple[int, str]]) -> None:
        """Add new messages of workers, as (rank, text)."""
        due: dict[str, _Text] = {}
        for rank, full in lines:
            text = full.split("\nTraceback (most recent call last):")[0].rstrip()
            key = re.sub(r"\d+", "#", text)
            if key not in self.texts and len(self.texts) >= self.MOST:
                key = text = f"there is more, which `ddpm logs {self.name}` shows"
            said = self.texts.setdefault(key, _Text())
            said.text, said.count = text, said.count + 1
            said.ranks.add(rank)
            if said.count in (1, 10, 100, 1_000, 10_000, 100_000):
                due[key] = said
        for said in due.values():
            self._tell(said)

    def close(self) -> None:
        """Show the new counts of messages that have repeated since they were shown."""
        for said in self.texts.values():
            if said.count > said.told:
                self._tell(said)

    def _tell(self, said: _Text) -> None:
        ranks = sorted(said.ranks)
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_listed(ranks)}"
        said.told = said.count
        self.notice(f"{who}: {said.text}" + (f" ({said.count:,} times)" if said.count > len(ranks) else ""))


@dataclass
class _Text:
    """A message, its count and ranks, and its count when it was last shown."""

    text: str = ""
    count: int = 0
    told: int = 0
    ranks: set[int] = field(default_factory=set)


def _listed(ranks: Sequence[int]) -> str:
    """Return the first few numbers, and how many more there are."""
    more = len(ranks) - 4
    return ", ".join(str(rank) for rank in ranks[:4]) + (f" and {more} more" if more > 0 else "")
