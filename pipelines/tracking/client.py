"""The MLflow client of a process, and its errors in words. MLflow is imported where it is first used: a worker that
restarts is at its next step before a thread of its own needs it."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.environment.credentials import MLFLOW_FILE, read_mlflow_file
from pipelines.environment.loopback import bypass_proxies
from pipelines.presentation.errors import PipelineError
from pipelines.storage.retry import PATIENCE_S, TransientError, retry
from pipelines.storage.s3_errors import sort_error

os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
logging.getLogger("mlflow.store.model_registry").setLevel(logging.WARNING)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

T = TypeVar("T")
logger = logging.getLogger(__name__)


class TrackingError(PipelineError):
    """MLflow cannot be reached, or refuses a request; the message says how to fix it.

    Attributes:
        status: HTTP status of the answer; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class UnreachableError(TrackingError, TransientError):
    """The server did not answer, or cannot serve the request now: worth another try."""


_BUSY = {408, 425, 429, 499}
_HINTS = {
    401: "it does not accept the credentials: renew MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD; "
    f"on the nodes of a cluster the file that {MLFLOW_FILE} names, or ~/.mlflow/credentials",
    403: "the credentials may not do this: ask for the permission, or use others",
    413: "it is larger than the server, or the proxy in front of it, takes: raise that limit (nginx: "
    "client_max_body_size)",
}
# How MLflow reports an answer that is not its own, such as a proxy's page; what follows is the page.
_FOREIGN = re.compile(r"API request to endpoint \S+ failed with error code (\d{3}) ")
_PROGRAMMING = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError, ValueError)

FIRST_ANSWER_S = 30.0
"""Seconds for which a command waits for its first answer."""
_IMPORTING = threading.Lock()


def import_mlflow() -> ModuleType:
    """Import MLflow under a lock: two threads that import it at the same time would see it half initialized."""
    with _IMPORTING:
        import mlflow
        import mlflow.entities
        import mlflow.tracking

        return mlflow


@lru_cache(maxsize=4)
def client(uri: str) -> MlflowClient:
    """Return the client of a server: one per process."""
    # An unavailable server must not block a command for MLflow's default of minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    bypass_proxies(uri)
    mlflow = import_mlflow()
    authenticate()
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def authenticate() -> None:
    """Give MLflow's clients in this process the credentials from the file DDPM_MLFLOW_CREDENTIALS_FILE.

    Without the variable, or if the file is on another node, they use MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD, or `~/.mlflow/credentials`.
    """
    path = os.environ.get(MLFLOW_FILE)
    if path:
        os.environ.update(read_mlflow_file(Path(path)))


def environment() -> dict[str, str]:
    """Return the environment variables that another process needs for the same credentials: a path, no secret."""
    return {MLFLOW_FILE: os.environ[MLFLOW_FILE]} if os.environ.get(MLFLOW_FILE) else {}


@contextmanager
def as_tracking_errors(uri: str) -> Iterator[None]:
    """Turn errors of MLflow and of the libraries of its artifact stores into a `TrackingError`."""
    import requests

    mlflow_exception = import_mlflow().MlflowException
    try:
        yield
    except (PipelineError, *_PROGRAMMING) as error:
        # Some errors of requests are ValueErrors too.
        if isinstance(error, requests.RequestException):
            raise _unanswered(uri, error) from error
        raise
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", None)
        raise (_unanswered(uri, error) if status is None else _answered(uri, status, str(error))) from error
    except mlflow_exception as error:
        inner = error.__cause__ or error.__context__
        if isinstance(inner, requests.RequestException) and inner.response is None:
            raise _unanswered(uri, inner) from error
        status = http_status(error)
        if status == 401:
            authenticate()  # the file may have new credentials
        raise _answered(uri, status, error.message) from error
    except Exception as error:
        raise _artifacts_failed(uri, error) from error


def http_status(error: MlflowException) -> int:
    """Return the HTTP status of an answer; 500 if there was none.

    MLflow's error codes correspond to statuses; the status of a proxy in front of it is in the text or its JSON.
    """
    foreign = _FOREIGN.match(error.message)
    if foreign:
        return int(foreign[1])
    plain = getattr(error, "json", None)
    if isinstance(plain, dict):
        for name in ("error_code", "status", "statusCode", "code"):
            if str(plain.get(name)).isdecimal() and 400 <= int(plain[name]) < 600:
                return int(plain[name])
    return int(error.get_http_status_code())


def _answered(uri: str, status: int, message: str) -> TrackingError:
    kind = UnreachableError if status >= 500 or status in _BUSY else TrackingError
    first = message.strip().splitlines()[0][:500] if message.strip() else f"HTTP {status}"
    return kind(f"MLflow at {uri}: {first}{f'; {_HINTS[status]}' if status in _HINTS else ''}", status)


def _unanswered(uri: str, error: Exception) -> UnreachableError:
    return UnreachableError(f"no answer from MLflow at {uri}: {error}")


def _artifacts_failed(uri: str, error: Exception) -> TrackingError:
    """Return the error for an exception of the library of an artifact store: boto3, google.cloud, azure, open."""
    where = f"the artifacts of MLflow at {uri}"
    if "boto3" in sys.modules:
        found = sort_error(where, error)
        if found is not None:
            return (UnreachableError if isinstance(found, TransientError) else TrackingError)(str(found))
    return UnreachableError(f"{where} cannot be reached: {type(error).__name__}: {error}")


def ask(uri: str, call: Callable[[MlflowClient], T], patience_s: float = PATIENCE_S) -> T:
    """Return the result of a call of the client, which is repeated while the server is unavailable.

    Raises:
        UnreachableError: it has been unavailable for `patience_s` seconds (0: a single try).
        TrackingError: the server refuses the request.
    """

    def once() -> T:
        with as_tracking_errors(uri):
            return call(client(uri))

    return retry(once, patience_s)


@contextmanager
def warn_on_error(what: str) -> Iterator[None]:
    """Log an error of MLflow as a warning instead of raising it, for records of work that is already done.

    Args:
        what: was asked of MLflow, as a noun, such as "the status of the run".
    """
    try:
        yield
    except TrackingError as error:
        logger.warning("MLflow failed at %s; the same command tries again: %s", what, error)


def first_answer(uri: str, call: Callable[[MlflowClient], T], patience_s: float = FIRST_ANSWER_S) -> T:
    """Return the result of a command's first call.

    A server that never answers is probably a wrong address, which is reported sooner than an outage of a known server:
    after the time that a server needs to restart.

    Args:
        patience_s: seconds to wait; more for an address that has been used before.

    Raises:
        TrackingError: no MLflow server answers at `uri`.
    """
    try:
        return ask(uri, call, patience_s)
    except TrackingError as error:
        raise TrackingError(
            f"{error}. Check tracking.uri and MLFLOW_TRACKING_URI, or start the local stack with `ddpm up`",
            error.status,
        ) from error


def pages(page: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield the items of all pages of an answer.

    Args:
        page: page token -> page; None for the first.
    """
    token = None
    while True:
        answer = page(token)
        yield from answer
        token = answer.token
        if not token:
            return
