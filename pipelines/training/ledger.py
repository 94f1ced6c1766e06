"""The ledger of a run, `goodput.json` in its folder: what its drivers recorded of their workers."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

from pipelines.retry import PATIENCE_S
from pipelines.storage import NotFoundError, Storage, StorageError, join
from pipelines.training.goodput import Attempt, Goodput, Session, measure

VERSION = 1
WRITE_EVERY_S = 5.0
FINAL_WRITE_S = 60.0
logger = logging.getLogger(__name__)


def read_sessions(storage: Storage, folder: str) -> tuple[Session, ...]:
    """Return the sessions of a run so far, from `goodput.json` in its folder; none where there is no such file."""
    try:
        plain = json.loads(storage.read(join(folder, "goodput.json")))
    except NotFoundError:
        return ()
    if plain["version"] != VERSION:
        return ()
    return tuple(
        Session(**{**session, "attempts": tuple(Attempt(**a) for a in session["attempts"])})
        for session in plain["sessions"]
    )


def write_sessions(
    storage: Storage, folder: str, sessions: Sequence[Session], *, patience_s: float = PATIENCE_S
) -> None:
    """Write the sessions of a run to `goodput.json` in its folder."""
    plain = {"version": VERSION, "sessions": [asdict(session) for session in sessions]}
    storage.write(join(folder, "goodput.json"), json.dumps(plain).encode(), patience_s=patience_s)


class Ledger:
    """The sessions of a run, written while it goes on, so that the session of a driver that is killed counts too."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self.storage, self.folder = storage, folder
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
        return measure(self.sessions) if self.sessions else None

    def _write(self) -> None:
        """Write every few seconds in a thread, so that an unreachable store does not block the driver."""
        while not self._ending.wait(WRITE_EVERY_S):
            try:
                write_sessions(self.storage, self.folder, self.sessions, patience_s=0)
            except StorageError as error:
                logger.warning("the goodput ledger could not be written: %s", error)
        try:
            write_sessions(self.storage, self.folder, self.sessions, patience_s=FINAL_WRITE_S)
        except StorageError as error:
            logger.warning("the goodput ledger could not be written: %s", error)
