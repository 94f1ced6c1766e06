"""The checks of `ddpm doctor`, and running of probes under one deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipelines.presentation.errors import PipelineError

Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: subject of the check, in a word or two.
        found: finding.
        fix: command or setting that fixes the problem; None if there is none.
        numbers: bytes by what takes them, where the check is of an estimate.
    """

    name: str
    status: Status
    found: str
    fix: str | None = None
    numbers: Mapping[str, int] | None = None


THREAD = "doctor-probe"
"""Name of the threads of probes."""
Probe = Callable[[], list[Check]]


def ok(name: str, found: str) -> Check:
    """Return the check of something that works."""
    return Check(name, "ok", found)


def warning(name: str, found: str, fix: str) -> Check:
    """Return the check of something that works less well than it could, or that a training does not need."""
    return Check(name, "warning", found, fix)


def failed(name: str, found: str, fix: str) -> Check:
    """Return the check of a missing or broken requirement of a training."""
    return Check(name, "failed", found, fix)


def skipped(name: str, why: str) -> Check:
    """Return the check of something that could not be looked at here, with the reason."""
    return Check(name, "skipped", why)


def run_probes(probes: Mapping[str, Probe], deadline_s: float) -> list[Check]:
    """Run the probes in parallel, and return their checks in the order of the mapping.

    A probe that has not ended after `deadline_s` seconds is a failed check; its thread keeps running.
    """
    results: dict[str, list[Check]] = {}

    def run(name: str, probe: Probe) -> None:
        try:
            results[name] = probe()
        except PipelineError as error:
            results[name] = [failed(name, str(error), "fix what the message names")]
        except Exception as error:  # noqa: BLE001 - a probe that is wrong must not hide what the others found
            found = f"could not be checked: {type(error).__name__}: {error}"
            results[name] = [failed(name, found, "see the message")]

    threads = [threading.Thread(target=run, args=item, daemon=True, name=THREAD) for item in probes.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    late = [
        failed(name, f"no result within {deadline_s:.0f} s", "try again when less is running here") for name in probes
    ]
    return [check for name, given_up in zip(probes, late, strict=True) for check in results.get(name, [given_up])]


def left_running() -> bool:
    """Return whether the thread of a probe is still running."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def answer(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the result of checks as JSON: whether none has failed, and each of them."""
    return {"ok": all(check.status != "failed" for check in checks), "checks": [asdict(check) for check in checks]}
