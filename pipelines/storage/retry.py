"""Repetition of calls while a service is unavailable, the same for storage and tracking."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential,
    wait_random,
)

from pipelines.presentation.errors import PipelineError

logger = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE_S = 300.0
"""Seconds for which a service may be unavailable before a call fails."""
BACKOFF = wait_exponential(multiplier=0.2, max=10) + wait_random(0, 1)
"""Seconds between two tries."""


class TransientError(PipelineError):
    """A service did not answer, or answered that it is busy: worth another try."""


def retry(call: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Return the result of a call, repeated with exponential backoff and jitter while the service is unavailable.

    The first failure is logged as a warning, because a person may be waiting.

    Args:
        patience_s: seconds after which the call is given up; 0 for a single try.

    Raises:
        TransientError: the error of the last try, after `patience_s` seconds.
    """

    def announce(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            logger.warning("%s; trying again for up to %.0f s", state.outcome.exception(), patience_s)

    return Retrying(
        before_sleep=announce,
        retry=retry_if_exception_type(TransientError),
        wait=BACKOFF,
        stop=stop_after_delay(patience_s),
        reraise=True,
    )(call)
