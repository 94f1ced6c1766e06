"""Where the wall time of a training trial went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pipelines.config import Config
from pipelines.search.study import TrialRecord
from pipelines.storage import Storage, join
from pipelines.training.goodput import Session, read_sessions


def trial_seconds(record: TrialRecord, sessions: Sequence[Session]) -> dict[str, float] | None:
    """Where the wall time of a trial went, in the order in which it went; None where it did not run in one go.

    Args:
        record: of a finished trial.
        sessions: of its run's ledger.
    """
    attempts = [attempt for session in sessions for attempt in session.attempts]
    if record.state != "finished" or len(attempts) != 1:
        return None
    (attempt,) = attempts
    spent = attempt.seconds
    return {
        "placement": attempt.began - record.began,
        "start-up": spent["startup"],
        "training": spent["step"] + spent["data"],
        "judging": spent["grid"],
        "checkpoints": spent["checkpoint"],
        "teardown": record.began + record.seconds - attempt.ended,
    }


def trial_sessions(record: TrialRecord, config: Config, name: str, storage: Storage) -> Sequence[Session]:
    """The ledger of a trial's run in the study of this name."""
    return read_sessions(storage, join(config.storage.root, "runs", f"{name}-{record.trial}"))


def median_seconds(records: Sequence[TrialRecord], config: Config, name: str, storage: Storage) -> dict[str, float]:
    """The medians of `trial_seconds` over a study's trials; empty where there are none."""
    found = [trial_seconds(record, trial_sessions(record, config, name, storage)) for record in records]
    spent = [seconds for seconds in found if seconds is not None]
    return {part: statistics.median(s[part] for s in spent) for part in spent[0]} if spent else {}
