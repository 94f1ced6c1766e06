"""Where the wall time of a run went, over all its restarts: what it learned from, what it lost, and to what.

Pure functions of what the driver writes down. A *session* is the life of a driver, an *attempt* that of a group of
workers within one. Work is lost where an attempt resumes below the images that an earlier one had seen.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipelines.retry import PATIENCE_S
from pipelines.storage import NotFoundError, Storage, StorageError, join

VERSION = 1
KEEP_EVERY_S = 5.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """What rank 0 last told of one life of the workers.

    Attributes:
        began, ended: seconds since the epoch.
        resumed_at, images_seen: where it took up the stream, and how far it came.
        seconds: by kind, as in `Progress`.
        uploaded_bytes, upload_s: of checkpoints, while training went on.
    """

    began: float
    ended: float
    resumed_at: int
    images_seen: int
    seconds: Mapping[str, float]
    uploaded_bytes: int = 0
    upload_s: float = 0.0


@dataclass(frozen=True)
class Session:
    """The life of a driver, and the attempts in it, oldest first."""

    began: float
    ended: float
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by what they were for; they add up to `wall_s`.

    Attributes:
        productive_s: optimizer steps whose result was kept.
        data_s, checkpoint_s, grid_s: the loop stood still for batches, for checkpoints, for sample grids.
        restart_s: no worker was in its loop while a driver was there: start-up, failures, restarts, shutdown.
        recomputed_s, recomputed_images: steps whose result was lost, and so were computed again.
        idle_s: no driver was there.
        unaccounted_s: within attempts, but of no kind; small, or something is not measured.
        attempts, sessions: lives of the workers and of drivers.
        uploaded_bytes, upload_s: of checkpoints, beside training.
    """

    wall_s: float
    productive_s: float
    data_s: float
    checkpoint_s: float
    grid_s: float
    restart_s: float
    recomputed_s: float
    idle_s: float
    unaccounted_s: float
    recomputed_images: int
    images_seen: int
    attempts: int
    sessions: int
    uploaded_bytes: int
    upload_s: float

    @property
    def fraction(self) -> float:
        """The productive part of the time in which a driver was there."""
        return self.productive_s / max(self.wall_s - self.idle_s, 1e-9)

    def parts(self) -> dict[str, float]:
        """Seconds by what they were for, in the order in which they are shown."""
        names = ["productive", "data", "checkpoint", "grid", "restart", "recomputed", "idle", "unaccounted"]
        return {name: getattr(self, f"{name}_s") for name in names}

    def metrics(self) -> dict[str, float]:
        """As MLflow shows it."""
        values = {f"goodput/{name}_s": value for name, value in self.parts().items()}
        counts = {f"goodput/{k}": float(getattr(self, k)) for k in ("recomputed_images", "attempts", "sessions")}
        uploads = {"goodput/uploaded_mib": self.uploaded_bytes / 2**20, "goodput/upload_s": self.upload_s}
        return {"goodput/fraction": self.fraction, "goodput/wall_s": self.wall_s, **values, **counts, **uploads}

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"fraction": self.fraction, **asdict(self)}

    def lines(self) -> list[str]:
        """For people."""
        shown = [f"{name} {value:,.1f} s" for name, value in self.parts().items() if value >= 0.05]
        lives = f"{self.attempts} start{'s' * (self.attempts != 1)} of the workers, {self.sessions} of the driver"
        again = f", {self.recomputed_images:,} images computed twice" if self.recomputed_images else ""
        return [f"{self.fraction:.1%} of {self.wall_s:,.1f} s: {', '.join(shown)}", f"{lives}{again}"]


def measure(sessions: Sequence[Session]) -> Goodput:
    """The ledger of a run from all its sessions, oldest first.

    The steps of an attempt take equally long, so what was lost of it costs its step time times the lost part of its
    images.
    """
    attempts = [a for session in sessions for a in session.attempts]
    lost = list(_lost_images(attempts))
    total: dict[str, float] = {}
    for attempt in attempts:
        for kind, seconds in attempt.seconds.items():
            total[kind] = total.get(kind, 0.0) + seconds
    recomputed = sum(
        attempt.seconds.get("step", 0.0) * images / (attempt.images_seen - attempt.resumed_at)
        for attempt, images in zip(attempts, lost, strict=True)
        if images
    )
    wall = sessions[-1].ended - sessions[0].began if sessions else 0.0
    present = sum(s.ended - s.began for s in sessions)
    in_attempts = sum(a.ended - a.began for a in attempts)
    kinds = ("startup", "step", "data", "checkpoint", "grid")
    return Goodput(
        wall_s=wall,
        productive_s=total.get("step", 0.0) - recomputed,
        data_s=total.get("data", 0.0),
        checkpoint_s=total.get("checkpoint", 0.0),
        grid_s=total.get("grid", 0.0),
        restart_s=present - in_attempts + total.get("startup", 0.0),
        recomputed_s=recomputed,
        idle_s=wall - present,
        unaccounted_s=in_attempts - sum(total.get(kind, 0.0) for kind in kinds),
        recomputed_images=sum(lost),
        images_seen=max((a.images_seen for a in attempts), default=0),
        attempts=len(attempts),
        sessions=len(sessions),
        uploaded_bytes=sum(a.uploaded_bytes for a in attempts),
        upload_s=sum(a.upload_s for a in attempts),
    )


def _lost_images(attempts: Sequence[Attempt]) -> Iterator[int]:
    """Of each attempt: how many of its images a later attempt had to see again."""
    for i, attempt in enumerate(attempts):
        back_to = min((later.resumed_at for later in attempts[i + 1 :]), default=attempt.images_seen)
        yield max(0, attempt.images_seen - max(attempt.resumed_at, back_to))


def read_sessions(storage: Storage, folder: str) -> tuple[Session, ...]:
    """The sessions of a run so far, from `goodput.json` in its folder; none where it has none."""
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
    """Keep the sessions of a run, so that those of a driver that is killed count."""
    plain = {"version": VERSION, "sessions": [asdict(session) for session in sessions]}
    storage.write(join(folder, "goodput.json"), json.dumps(plain).encode(), patience_s=patience_s)


class Ledger:
    """The sessions of a run, kept beside its checkpoints while it goes on: a driver that is killed leaves its own."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self.storage, self.folder = storage, folder
        self.sessions = read_sessions(storage, folder)
        self._ending = threading.Event()

    @contextmanager
    def session(self, began: float) -> Iterator[None]:
        """The life of this driver, which began at a time since the epoch."""
        self.sessions = (*self.sessions, Session(began, time.time()))
        keeper = threading.Thread(target=self._keep, name="goodput", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            self.update(self.sessions[-1].attempts)
            self._ending.set()
            keeper.join()

    def update(self, attempts: Sequence[Attempt]) -> None:
        """What the workers have told by now."""
        current = replace(self.sessions[-1], ended=time.time(), attempts=tuple(attempts))
        self.sessions = (*self.sessions[:-1], current)

    def goodput(self) -> Goodput | None:
        """The ledger so far, None where there is nothing."""
        return measure(self.sessions) if self.sessions else None

    def _keep(self) -> None:
        """Write now and then, beside the driver's other work: a store that is away must not hold that up."""
        while not self._ending.wait(KEEP_EVERY_S):
            try:
                write_sessions(self.storage, self.folder, self.sessions, patience_s=0)
            except StorageError as error:
                logger.warning("the goodput ledger could not be kept: %s", error)
        try:
            write_sessions(self.storage, self.folder, self.sessions, patience_s=60)
        except StorageError as error:
            logger.warning("the goodput ledger could not be kept: %s", error)
