"""The ledger of a run, `goodput/` in its folder: what its drivers recorded of their workers, a file for each driver."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from pipelines.storage import Storage, StorageError, join, layout
from pipelines.storage.retry import PATIENCE_S
from pipelines.training.goodput import Attempt, Goodput, Session, measure

VERSION = 1
WRITE_EVERY_S = 5.0
FINAL_WRITE_S = 60.0
logger = logging.getLogger(__name__)


def read_sessions(storage: Storage, folder: str) -> tuple[Session, ...]:
    """Return the sessions of a run so far, in the order of its drivers; none where nothing is recorded."""
    # An earlier release kept the sessions of all drivers in one file.
    uris = [join(folder, layout.EARLIER_GOODPUT), *(entry.uri for entry in storage.list(join(folder, layout.GOODPUT)))]
    found: list[Session] = []
    for data in filter(None, map(storage.find, uris)):
        plain = json.loads(data)
        if plain["version"] == VERSION:
            found += [_session(session) for session in plain["sessions"]]
    return tuple(found)


def write_session(
    storage: Storage, folder: str, epoch: int, session: Session, *, patience_s: float = PATIENCE_S
) -> None:
    """Write the session of a driver to its file, which no other driver writes.

    Args:
        epoch: number of the driver.
    """
    plain = {"version": VERSION, "sessions": [asdict(session)]}
    storage.write(
        join(folder, layout.GOODPUT, layout.numbered(epoch, 6)), json.dumps(plain).encode(), patience_s=patience_s
    )


class Ledger:
    """The sessions of a run, written while it goes on, so that the session of a driver that is killed counts too.

    Args:
        epoch: number of this driver.
    """

    def __init__(self, storage: Storage, folder: str, epoch: int) -> None:
        self.storage, self.folder, self.epoch = storage, folder, epoch
        self.sessions = read_sessions(storage, folder)
        self._ending = threading.Event()

    @contextmanager
    def session(self, began: float) -> Iterator[None]:
        """Record the session of this driver, for as long as the context lasts.

        Args:
            began: seconds since the epoch.
        """
        self.sessions = (*self.sessions, Session(began, time.time()))
        writer = threading.Thread(target=self._write, name="goodput", daemon=True)
        writer.start()
        try:
            yield
        finally:
            self.update(self.sessions[-1].attempts)
            self._ending.set()
            writer.join(FINAL_WRITE_S + WRITE_EVERY_S)
            if writer.is_alive():  # a daemon: it ends with the process
                logger.warning("the goodput ledger's last write takes long: it is left behind")

    def update(self, attempts: Sequence[Attempt]) -> None:
        """Replace the attempts of the current session."""
        current = replace(self.sessions[-1], ended=time.time(), attempts=tuple(attempts))
        self.sessions = (*self.sessions[:-1], current)

    def goodput(self) -> Goodput | None:
        """Return the goodput so far, None where there are no sessions."""
        return goodput_of(self.sessions)

    def _write(self) -> None:
        """Write every few seconds in a thread, so that an unreachable store does not block the driver."""
        while not self._ending.wait(WRITE_EVERY_S):
            self._write_once(patience_s=0)
        self._write_once(patience_s=FINAL_WRITE_S)

    def _write_once(self, patience_s: float) -> None:
        try:
            write_session(self.storage, self.folder, self.epoch, self.sessions[-1], patience_s=patience_s)
        except StorageError as error:
            logger.warning("the goodput ledger could not be written: %s", error)


def goodput_of(sessions: Sequence[Session]) -> Goodput | None:
    """Return the goodput of a run, None where nothing is recorded."""
    return measure(sessions) if sessions else None


def _session(plain: dict[str, Any]) -> Session:
    return Session(**{**plain, "attempts": tuple(Attempt(**attempt) for attempt in plain["attempts"])})
