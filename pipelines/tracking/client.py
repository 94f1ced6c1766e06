"""The MLflow client of a process, and its errors in words. MLflow is imported where it is first used: a worker that
restarts is at its next step before a thread of its own needs it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipelines.credentials import MLFLOW_FILE, read_mlflow_file
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

    authenticate()
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def authenticate() -> None:
    """Give MLflow's clients in this process what is in the credentials file that DDPM_MLFLOW_CREDENTIALS_FILE names.

    Where it names none, or one of another node, they use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or
    `~/.mlflow/credentials`.
    """
    path = os.environ.get(MLFLOW_FILE)
    if path:
        os.environ.update(read_mlflow_file(Path(path)))


def environment() -> dict[str, str]:
    """Return the variables that another process needs for the same credentials: a path, no secret."""
    return {MLFLOW_FILE: os.environ[MLFLOW_FILE]} if os.environ.get(MLFLOW_FILE) else {}


def refusal(status: int) -> str:
    """Return what to do about an answer of this HTTP status, as the end of a message; nothing for most."""
    if status == 401:
        return (
            f". Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; on the nodes of a cluster {MLFLOW_FILE} "
            "or ~/.mlflow/credentials"
        )
    return ". Its user may not do this: ask for the permission EDIT" if status == 403 else ""


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
        message = error.message.splitlines()[0] + refusal(error.get_http_status_code())
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
        refused = refusal(error.get_http_status_code())
        if refused:
            raise TrackingError(f"MLflow at {uri}: {error.message.splitlines()[0]}{refused}") from error
        raise TrackingError(
            f"no answer from MLflow at {uri}: {error.message.splitlines()[0]}. "
            "Check tracking.uri and MLFLOW_TRACKING_URI, or start the local stack with `ddpm up`"
        ) from error
