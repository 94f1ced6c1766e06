"""Calls to the actors between driver and workers, with a time limit."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from pipelines.training.errors import TrainingError

ANSWER_S = 120.0
"""How long an actor may take that has nothing to compute: it may have to start, beside others on a busy machine."""


def answer(reference: Any, what: str, timeout_s: float = ANSWER_S) -> Any:
    """Wait for the answer of an actor and return it.

    Args:
        reference: what the call returned.
        what: was asked for, in words.

    Raises:
        TrainingError: there is no answer in time.
        RayError: the actor has ended.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as error:
        raise TrainingError(
            f"no answer within {timeout_s:.0f} s on {what}: the node of the driver is overloaded or cannot be reached. "
            "The same command resumes the run when it answers again"
        ) from error
