"""Goodput: how the wall time of a run was spent over all its restarts, and how much of it was lost.

`measure` is a pure function of the sessions and attempts in a run's ledger (`ledger.py`). A *session* is the life of a
driver, an *attempt* that of a group of workers within one. Work is lost where an attempt resumes below the images that
an earlier one had seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

CAUSES = {
    "process": "a process of a worker ended, or did not answer",
    "node": "a node was lost",
    "preemption": "a node was taken away, as had been announced",
    "resize": "the number of workers changed",
    "error": "an error of a worker, or of the start of the workers",
    "driver": "the driver was stopped, or lost",
    "unknown": "why is not recorded",
}
"""Why a group of workers ended before the run did."""
_MEANING = {
    "productive": "optimizer steps whose result was kept",
    "data": "the loop waited for batches",
    "checkpoint": "the loop waited for checkpoints",
    "grid": "the loop drew sample grids or was evaluated",
    "restart": "no worker was in its loop: start-up, failures, restarts, shutdown",
    "recomputed": "optimizer steps whose result was lost",
    "idle": "no driver was running",
    "unaccounted": "of no kind; large only where something is not measured",
}


@dataclass(frozen=True)
class Attempt:
    """The last report of rank 0 from one life of the workers.

    Attributes:
        began: when the attempt began, in seconds since the epoch.
        ended: when rank 0 reported last, in seconds since the epoch.
        resumed_at: images seen where the attempt began.
        images_seen: images seen at the last report.
        seconds: wall time by kind, as in `Progress`.
        uploaded_bytes: size of the checkpoints stored.
        upload_s: seconds of their uploads, while training went on.
        length: images after which the run ends, as far as was known; None where an earlier release did not record it.
        lost_to: what ended the workers, of `CAUSES`; None where they came to the end, or nobody could say.
        slow_downs: answers of S3 to rank 0 that it reads too fast.
        throttled_s: seconds in which its reads were limited for that, see `RequestRate`.
        throttled_wait_s: of them, seconds in which the loop waited for batches.
    """

    began: float
    ended: float
    resumed_at: int
    images_seen: int
    seconds: Mapping[str, float]
    uploaded_bytes: int = 0
    upload_s: float = 0.0
    length: int | None = None
    lost_to: str | None = None
    slow_downs: int = 0
    throttled_s: float = 0.0
    throttled_wait_s: float = 0.0


@dataclass(frozen=True)
class Session:
    """The life of a driver.

    Attributes:
        began: seconds since the epoch.
        ended: seconds since the epoch.
        attempts: of its workers, oldest first.
    """

    began: float
    ended: float
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True)
class Loss:
    """What the ends of workers from one cause have cost.

    Attributes:
        times: how often it happened.
        seconds: from the last report of the workers until the next ones began with their steps, with the steps that
            were computed again.
    """

    times: int
    seconds: float


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by purpose; those of `parts` add up to `wall_s`.

    Attributes:
        wall_s: from the start of the first driver to the end of the last.
        productive_s: optimizer steps whose result was kept.
        data_s: the loop waited for batches.
        checkpoint_s: the loop waited for checkpoints.
        grid_s: the loop drew sample grids or was evaluated.
        restart_s: a driver was running and no worker was in its loop: start-up, failures, restarts, shutdown.
        recomputed_s: optimizer steps whose result was lost, so that they were computed again.
        idle_s: no driver was running.
        unaccounted_s: within attempts, but of no kind; large only where something is not measured.
        recomputed_images: images of the steps that were lost.
        images_seen: by the newest attempt of the newest driver; 0 where that had none. Earlier ones may have seen more,
            which was lost.
        attempts: lives of the workers.
        sessions: lives of drivers.
        uploaded_bytes: size of the checkpoints stored.
        upload_s: seconds of their uploads, while training went on.
        length: images after which the run ends, as far as the newest attempt of the newest driver knew.
        losses: what restarts have cost, by cause, see `CAUSES`.
        slow_downs: answers of S3 to rank 0 that it reads too fast.
        throttled_s: seconds in which its reads were limited for that, see `RequestRate`.
        throttled_wait_s: of them, seconds in which the loop waited for batches.
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
    length: int | None = None
    losses: Mapping[str, Loss] = field(default_factory=dict)
    slow_downs: int = 0
    throttled_s: float = 0.0
    throttled_wait_s: float = 0.0

    @property
    def fraction(self) -> float:
        """The productive share of the time in which a driver was running, 0..1."""
        return self.productive_s / max(self.wall_s - self.idle_s, 1e-9)

    def parts(self) -> dict[str, float]:
        """Return the seconds by purpose, in the order in which they are shown."""
        names = ["productive", "data", "checkpoint", "grid", "restart", "recomputed", "idle", "unaccounted"]
        return {name: getattr(self, f"{name}_s") for name in names}

    def metrics(self) -> dict[str, float]:
        """Return the value that is logged as a curve, by metric key; `table` has all values."""
        return {"train/goodput": self.fraction}

    def table(self) -> list[tuple[str, str, str]]:
        """Return all values as rows of text: (name, amount, meaning)."""
        wall = max(self.wall_s, 1e-9)
        rows = [
            (name, f"{seconds:,.1f} s ({seconds / wall:.1%})", _MEANING[name]) for name, seconds in self.parts().items()
        ]
        stored = f"{self.uploaded_bytes / 2**20:,.1f} MiB in {self.upload_s:,.1f} s"
        return [
            *rows,
            ("in all", f"{self.wall_s:,.1f} s", "from the start of the first driver to the end of the last"),
            ("goodput", f"{self.fraction:.1%}", "the productive share of the time in which a driver was running"),
            ("computed twice", f"{self.recomputed_images:,} images", "of steps whose result was lost"),
            ("starts", f"{self.attempts} of the workers, {self.sessions} of the driver", "restarts included"),
            ("uploads", stored, "checkpoints, stored while training went on"),
            *(
                (f"lost to: {cause}", f"{loss.seconds:,.1f} s in {loss.times}", CAUSES[cause])
                for cause, loss in self.losses.items()
            ),
            *([("throttled", self._throttled(), "the store answered SlowDown to rank 0")] if self.slow_downs else []),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return all values, for --json."""
        return {"fraction": self.fraction, **asdict(self)}

    def lines(self) -> list[str]:
        """Return two lines of text: the time by purpose, and the number of starts."""
        shown = [f"{name} {value:,.1f} s" for name, value in self.parts().items() if value >= 0.05]
        lives = f"{self.attempts} start{'s' * (self.attempts != 1)} of the workers, {self.sessions} of the driver"
        again = f", {self.recomputed_images:,} images computed twice" if self.recomputed_images else ""
        lost = [f"{loss.seconds:,.1f} s to {loss.times} x {cause}" for cause, loss in self.losses.items()]
        said = [f"{self.fraction:.1%} of {self.wall_s:,.1f} s: {', '.join(shown)}", f"{lives}{again}"]
        said += [f"reads throttled by the store: {self._throttled()}"] if self.slow_downs else []
        return [*said, f"lost {', '.join(lost)}"] if lost else said

    def _throttled(self) -> str:
        waited = f"{self.throttled_wait_s:,.1f} s of them waiting for data"
        return f"{self.throttled_s:,.1f} s, {waited}, after {self.slow_downs:,} answers"


def measure(sessions: Sequence[Session]) -> Goodput:
    """Return the goodput of a run from all its sessions, oldest first.

    All steps of an attempt are taken to be equally long, so the time lost is its step time times the lost share of its
    images.
    """
    attempts = [a for session in sessions for a in session.attempts]
    lost = list(_lost_images(attempts))
    again = [_recomputed_s(attempt, images) for attempt, images in zip(attempts, lost, strict=True)]
    total: dict[str, float] = {}
    for attempt in attempts:
        for kind, seconds in attempt.seconds.items():
            total[kind] = total.get(kind, 0.0) + seconds
    wall = sessions[-1].ended - sessions[0].began if sessions else 0.0
    present = sum(s.ended - s.began for s in sessions)
    in_attempts = sum(a.ended - a.began for a in attempts)
    kinds = ("startup", "step", "data", "checkpoint", "grid")
    return Goodput(
        wall_s=wall,
        productive_s=total.get("step", 0.0) - sum(again),
        data_s=total.get("data", 0.0),
        checkpoint_s=total.get("checkpoint", 0.0),
        grid_s=total.get("grid", 0.0),
        restart_s=present - in_attempts + total.get("startup", 0.0),
        recomputed_s=sum(again),
        idle_s=wall - present,
        unaccounted_s=in_attempts - sum(total.get(kind, 0.0) for kind in kinds),
        recomputed_images=sum(lost),
        images_seen=next((a.images_seen for a in reversed(sessions[-1].attempts)), 0) if sessions else 0,
        attempts=len(attempts),
        sessions=len(sessions),
        uploaded_bytes=sum(a.uploaded_bytes for a in attempts),
        upload_s=sum(a.upload_s for a in attempts),
        length=next((a.length for a in reversed(sessions[-1].attempts)), None) if sessions else None,
        losses=_losses(sessions, again),
        slow_downs=sum(a.slow_downs for a in attempts),
        throttled_s=sum(a.throttled_s for a in attempts),
        throttled_wait_s=sum(a.throttled_wait_s for a in attempts),
    )


def _losses(sessions: Sequence[Session], again: Sequence[float]) -> dict[str, Loss]:
    """Return what restarts have cost, by cause, in the order of `CAUSES`.

    Args:
        again: seconds of the steps of each attempt that were computed again.
    """
    lives = [(number, attempt) for number, session in enumerate(sessions) for attempt in session.attempts]
    found: dict[str, Loss] = {}
    for ((driver, before), (next_driver, after)), seconds in zip(pairwise(lives), again, strict=False):
        cause = (before.lost_to or "unknown") if driver == next_driver else "driver"
        known = found.get(cause, Loss(0, 0.0))
        away_s = after.began - before.ended + after.seconds.get("startup", 0.0)
        found[cause] = Loss(known.times + 1, known.seconds + away_s + seconds)
    return {cause: found[cause] for cause in CAUSES if cause in found}


def _recomputed_s(attempt: Attempt, images: int) -> float:
    return attempt.seconds.get("step", 0.0) * images / (attempt.images_seen - attempt.resumed_at) if images else 0.0


def _lost_images(attempts: Sequence[Attempt]) -> Iterator[int]:
    """Yield, for each attempt, how many of its images a later attempt had to compute again."""
    for i, attempt in enumerate(attempts):
        back_to = min((later.resumed_at for later in attempts[i + 1 :]), default=attempt.images_seen)
        yield max(0, attempt.images_seen - max(attempt.resumed_at, back_to))
