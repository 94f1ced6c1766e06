"""The MLflow client of a process, and its errors in words. MLflow is imported where it is first used: a worker that
restarts is at its next step before a thread of its own needs it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.errors import PipelineError
from pipelines.retry import TransientError

os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
logging.getLogger("mlflow.store.model_registry").setLevel(logging.WARNING)

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")


class TrackingError(PipelineError):
    """MLflow cannot be reached, or does not have what was asked for; says how to fix it."""


class UnreachableError(TrackingError, TransientError):
    """The server did not answer, or could not do now what it was asked for: worth another try."""


@lru_cache(maxsize=4)
def client(uri: str) -> MlflowClient:
    """Return the client of a server: one per process."""
    # A server that is away must not hold a command for MLflow's default of minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def reporting(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into a `TrackingError`."""
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except requests.RequestException as error:
        raise UnreachableError(f"no answer from MLflow at {uri}: {error}") from error
    except MlflowException as error:
        message = error.message.splitlines()[0]
        kind = UnreachableError if error.get_http_status_code() >= 500 else TrackingError
        raise kind(f"MLflow at {uri}: {message}") from error


def first_answer(uri: str, call: Callable[[MlflowClient], T]) -> T:
    """Return what a command's first call returns, in one try: a server that is not there is a mistake in an address.

    Raises:
        TrackingError: no MLflow server answers at `uri`.
    """
    from mlflow.exceptions import MlflowException

    try:
        return call(client(uri))
    except MlflowException as error:
        raise TrackingError(
            f"no answer from MLflow at {uri}: {error.message.splitlines()[0]}. "
            "Check tracking.uri and MLFLOW_TRACKING_URI, or start the local stack with `ddpm up`"
        ) from error


def pages(page: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield what all pages of an answer hold.

    Args:
        page: returns the page of a token; None is the first.
    """
    token = None
    while True:
        answer = page(token)
        yield from answer
        token = answer.token
        if not token:
            return
