"""A probe of an MLflow server with plain requests: whether it answers, its version, and permissions.

MLflow's own client takes seconds to import and minutes to give up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.tracking.client import UnreachableError, authenticate

EXPERIMENT = "ddpm-doctor"
"""Name of the experiment that is created and deleted."""


@dataclass(frozen=True)
class ServerAnswers:
    """The answers of an MLflow server.

    Attributes:
        version: version of the server; None if unknown.
        date: the `Date` header of an answer.
        read: HTTP status of listing experiments.
        write: first HTTP status other than 200 of creating, changing and deleting an experiment, or 200; None if
            reading
        was refused already.
    """

    version: str | None
    date: str | None
    read: int
    write: int | None


def ask_server(uri: str, timeout_s: float = 5.0) -> ServerAnswers:
    """Return the answers of an MLflow server to requests with this process's credentials.

    Raises:
        UnreachableError: it does not answer.
    """
    import requests

    authenticate()
    session = requests.Session()
    user, token = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user:
        session.auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
    elif token:
        session.headers["Authorization"] = f"Bearer {token}"
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
        session.verify = False
    session.verify = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or session.verify

    def call(method: str, path: str, **values: Any) -> requests.Response:
        return session.request(method, uri.rstrip("/") + path, timeout=timeout_s, **values)

    def post(path: str, body: Mapping[str, Any]) -> requests.Response:
        return call("POST", f"/api/2.0/mlflow/experiments/{path}", json=body)

    try:
        version = call("GET", "/version")
        listed = post("search", {"max_results": 1})
        written = _write(call, post) if listed.ok else None
    except requests.RequestException as error:
        raise UnreachableError(f"no answer from MLflow at {uri}: {error}") from error
    said = version.text.strip() if version.ok and len(version.text) < 40 else None
    return ServerAnswers(said, listed.headers.get("Date"), listed.status_code, written)


def _write(call: Any, post: Any) -> int:
    """Make, change and delete an experiment, and return the first HTTP status that is not 200, or 200."""
    path = "/api/2.0/mlflow/experiments/get-by-name"
    found = call("GET", path, params={"experiment_name": EXPERIMENT})
    if not found.ok:
        first = post("create", {"name": EXPERIMENT})
        named = first.json() if first.ok else {}
    else:
        named = found.json()["experiment"]
        is_active = named["lifecycle_stage"] == "active"
        first = found if is_active else post("restore", {"experiment_id": named["experiment_id"]})
    answers = [first]
    if first.ok:
        about = {"experiment_id": named["experiment_id"]}
        answers.append(post("set-experiment-tag", {**about, "key": "ddpm.doctor", "value": "write probe"}))
        answers.append(post("delete", about))
    return int(next((answer.status_code for answer in answers if not answer.ok), 200))
