"""The log lines of a run's workers, kept in `logs/` of its folder: their format, their files, and a reader.

Every rank of every attempt has objects of its own, whose names carry the driver's epoch, the rank and the attempt, so
that nobody overwrites another's. An object holds one JSON value a line.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from pipelines.presentation.errors import PipelineError
from pipelines.storage import Storage, join, layout
from pipelines.tracking import ENDED

LIVE_S = 60.0
"""Seconds without a write in a run's folder after which no driver can be alive: it writes there every few seconds."""
_NAME = re.compile(r"(?P<epoch>\d+)-rank-(?P<rank>\d+)-(?P<attempt>\w+)\.(?P<part>\d+)\.log")


class NoSuchRunError(PipelineError):
    """No run of this name has stored anything."""


@dataclass(frozen=True)
class LogLine:
    """A log line of a worker.

    Attributes:
        time: seconds since the epoch.
        level: as Python's logging names it, such as WARNING.
        rank: of the worker.
        logger: the module that said it.
        message: text, perhaps of several lines; an error's ends in its traceback.
    """

    time: float
    level: str
    rank: int
    logger: str
    message: str

    def to_json(self) -> str:
        """Return the line as it is stored."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        """Return the line with its local time, as it is shown."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))
        return f"{when}  rank {self.rank}  {self.level}  {self.message}"


def log_address(folder: str, epoch: int, rank: int, attempt: str, part: int) -> str:
    """Return the address of one part of the log of a rank in an attempt.

    Args:
        folder: address of all that the run stores.
        epoch: of the driver that the rank belongs to.
        attempt: letters and digits that no other attempt of this rank and driver has.
    """
    return join(folder, layout.LOGS, layout.log_part(epoch, rank, attempt, part))


class LogReader:
    """Reads the log lines of a run's workers, and on later calls the new ones.

    Args:
        folder: address of all that the run stores.
        rank: of the only worker that is asked for; None for all.
    """

    def __init__(self, storage: Storage, folder: str, rank: int | None = None) -> None:
        self.storage, self.folder, self.rank = storage, folder, rank
        self._read: dict[str, tuple[str, int]] = {}  # address -> (tag, lines) of what was read

    def new_lines(self) -> list[LogLine]:
        """Return the lines that no earlier call returned, in order of time."""
        found: list[LogLine] = []
        for entry in self.storage.list(join(self.folder, layout.LOGS)):
            name = _NAME.fullmatch(entry.uri.rsplit("/", 1)[-1])
            tag, seen = self._read.get(entry.uri, ("", 0))
            if name is None or entry.tag == tag or self.rank not in (None, int(name["rank"])):
                continue
            data = self.storage.find(entry.uri)
            if data is None:
                continue  # an early part, for which there was no more room
            lines = list(parse(data))
            found += lines[seen:]
            self._read[entry.uri] = (entry.tag, len(lines))
        return sorted(found, key=lambda line: line.time)


def parse(data: bytes) -> Iterator[LogLine]:
    """Yield the lines of an object."""
    for text in data.decode().splitlines():
        plain = json.loads(text)
        yield LogLine(**{name: plain[name] for name in LogLine.__dataclass_fields__})


def encode(lines: Iterable[LogLine]) -> bytes:
    """Return lines as the bytes of a stored object."""
    return "".join(f"{line.to_json()}\n" for line in lines).encode()


def has_ended(status: str | None, written: float | None, now: float) -> bool:
    """Return whether no driver trains a run any more.

    Args:
        status: of the MLflow run; None where MLflow does not answer or does not know it.
        written: when something was last written in its folder; None where the store does not say.
        now: in seconds since the epoch.
    """
    return status in ENDED or (written is not None and now - written > LIVE_S)


def last_write(storage: Storage, folder: str) -> float | None:
    """Return when anything in the folder of a run was last written, in seconds since the epoch.

    Returns:
        None where the store does not say.

    Raises:
        NoSuchRunError: there is nothing.
    """
    entries = storage.list(folder)
    if not entries:
        raise NoSuchRunError(f"nothing is stored at {folder}: check the run's name with `ddpm runs`, or storage.root=…")
    return max((entry.modified for entry in entries if entry.modified is not None), default=None)
