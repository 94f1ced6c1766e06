"""Where the wall time of a training trial went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pipelines.config import Config
from pipelines.search.study import TrialRecord
from pipelines.storage import Storage, join
from pipelines.training.goodput import Session
from pipelines.training.ledger import read_sessions


def trial_seconds(record: TrialRecord, sessions: Sequence[Session]) -> dict[str, float] | None:
    """Return how the wall time of a finished trial divides, in the order of time.

    Args:
        record: the trial.
        sessions: the ledger of its run.

    Returns:
        Seconds by what they were spent on; None where the trial did not finish, or was interrupted.
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
    """Return the ledger of a trial's run in the study of this name."""
    return read_sessions(storage, join(config.storage.root, "runs", f"{name}-{record.trial}"))


def median_seconds(records: Sequence[TrialRecord], config: Config, name: str, storage: Storage) -> dict[str, float]:
    """Return the medians of `trial_seconds` over a study's trials; empty where no trial finished in one go."""
    found = [trial_seconds(record, trial_sessions(record, config, name, storage)) for record in records]
    spent = [seconds for seconds in found if seconds is not None]
    return {part: statistics.median(s[part] for s in spent) for part in spent[0]} if spent else {}
