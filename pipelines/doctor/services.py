"""Checks of the local stack, MLflow and Ray: whether they can be reached and allow everything that a training does, and
the difference between the clocks of servers and this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from pipelines import tracking
from pipelines.config import Config
from pipelines.doctor.check import Check, failed, ok, warning
from pipelines.environment.credentials import redact
from pipelines.environment.loopback import bypass_proxies
from pipelines.stack import ServiceStatus
from pipelines.tracking.probe import ServerAnswers, ask_server

SKEW_WARNING_S, SKEW_FAILED_S = 60.0, 300.0
CONNECT_S = 4.0
RAY_S = 12.0
_ASK_RAY = """
import json, signal, sys
signal.alarm(14)  # even if the calling process is gone
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR", namespace="ddpm")
print(json.dumps([ray.__version__, [node["Resources"] for node in ray.nodes() if node["Alive"]]]))
"""


def stack_check(services: Sequence[ServiceStatus], needed: Sequence[str], installed: bool) -> Check:
    """Check that the required services of the local stack run; it is not a failure if they do not.

    Args:
        installed: whether the local S3 server is installed.
    """
    if not needed:
        return ok("local stack", "not needed: every service is named by the configuration or the environment")
    states = {service.name: service for service in services}
    stuck = [name for name in needed if states[name].running and not states[name].healthy]
    if stuck:
        logs = ", ".join(str(states[name].log) for name in stuck)
        return failed("local stack", f"{' and '.join(stuck)} run and do not answer", f"ddpm down; ddpm up; see {logs}")
    if "s3" in needed and not installed:
        return failed("local stack", "the S3 server is not installed", "python -m pip install 'ddpm-pipelines[local]'")
    stopped = [name for name in needed if not states[name].running]
    if stopped:
        return warning("local stack", f"{', '.join(stopped)} not running", "ddpm up (ddpm train starts it as well)")
    return ok("local stack", f"{', '.join(needed)} running")


def http_date(url: str, timeout_s: float = CONNECT_S) -> str | None:
    """Return the `Date` header of any answer of a server; None if there is none."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s) as answer:
            return answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        return error.headers.get("Date")
    except (OSError, ValueError):
        return None


def skew_check(server: str, date: str | None, now: float) -> list[Check]:
    """Check the difference between the clocks of this machine and a server; empty if the server sends no time.

    Args:
        server: name of the server.
        date: `Date` header of an answer.
        now: this machine's time of the answer, in seconds since the epoch.
    """
    try:
        skew = now - parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return []
    name, fix = f"clock ({server})", "set this machine's clock: sudo timedatectl set-ntp true"
    found = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} {server}'s"
    if abs(skew) > SKEW_FAILED_S:
        return [failed(name, f"{found}; S3 refuses signatures from 15 minutes on", fix)]
    if abs(skew) > SKEW_WARNING_S:
        return [warning(name, f"{found}; S3 refuses signatures from 15 minutes on", fix)]
    return [ok(name, "within a few seconds" if abs(skew) < 5 else found)]


def check_mlflow(uri: str) -> list[Check]:
    """Check the MLflow server at an address, and its clock."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return [ok("mlflow", f"{redact(uri)}: no server, so nothing to reach")]
    bypass_proxies(uri)
    try:
        answers = ask_server(uri, CONNECT_S)
    except tracking.UnreachableError as error:
        fix = "tracking.uri=http://HOST:PORT (or MLFLOW_TRACKING_URI) of a running server; or ddpm up for a local one"
        return [failed("mlflow", redact(str(error)).split(": HTTP")[0], fix)]
    return [check_mlflow_answers(redact(uri), answers), *skew_check("MLflow", answers.date, time.time())]


def check_mlflow_answers(uri: str, answers: ServerAnswers) -> Check:
    """Return the check for the answers of an MLflow server."""
    credentials = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials"
    for action, status in (("read", answers.read), ("write", answers.write)):
        if status == 401:
            return failed("mlflow", f"{uri}: it does not know these credentials, or none were given (401)", credentials)
        if status == 403:
            found = f"{uri}: this user may not {action} experiments (403)"
            return failed("mlflow", found, f"{credentials} of a user with the permission EDIT")
        if status == 404 and action == "read":
            found = f"{uri}: a server answers, but not as MLflow does (404)"
            return failed("mlflow", found, "tracking.uri=http://HOST:PORT[/PATH] of an MLflow server")
        if status != 200:
            return failed("mlflow", f"{uri}: {action} an experiment: HTTP {status}", "see the log of the MLflow server")
    return ok("mlflow", f"{uri}: version {answers.version or 'unknown'}; an experiment can be read and written")


def check_ray(config: Config, environment: Mapping[str, str]) -> list[Check]:
    """Check that the Ray cluster answers and has room for the workers.

    Args:
        environment: variables that a driver needs in addition to those of this process.
    """
    address = str(config.cluster.address)
    shown = redact(address)
    unreachable = None if address == "auto" else closed_port(address)
    if unreachable:
        fix = "cluster.address=HOST:PORT (or RAY_ADDRESS) of a running head; or ddpm up for a local one"
        return [failed("ray", f"no Ray cluster at {shown}: {unreachable}", fix)]
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK_RAY, address],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=RAY_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [
            failed("ray", f"{shown} does not answer within {RAY_S:.0f} s", f"ray status --address={shown} says why")
        ]
    if asked.returncode != 0:
        said = redact((asked.stderr.strip().splitlines() or ["no message"])[-1])
        fix = f"RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH where it asks for a token; ray status --address={shown}"
        return [failed("ray", f"{shown}: {said}", fix)]
    version, nodes = json.loads(asked.stdout.splitlines()[-1])
    return [check_ray_nodes(config, shown, version, nodes)]


def check_ray_nodes(config: Config, address: str, version: str, nodes: Sequence[Mapping[str, float]]) -> Check:
    """Check that nodes with these resources have room for the workers of a training."""
    from pipelines.training.resources import per_worker, possible_workers, shortage

    total = ", ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in ("CPU", "GPU"))
    found = f"{address}: version {version}, {len(nodes)} node{'s' * (len(nodes) != 1)} with {total}"
    short = shortage(config.cluster, nodes)
    if short is None:
        return ok("ray", found)
    fits = possible_workers(nodes, per_worker(config.cluster))
    return failed(
        "ray",
        short.split(". ")[0],
        f"cluster.num_workers={fits}" if fits else "fewer cluster.gpus_per_worker, or more nodes",
    )


def closed_port(address: str, timeout_s: float = CONNECT_S) -> str | None:
    """Return why a URL or HOST:PORT cannot be reached; None if something listens there, or a proxy is used."""
    bypass_proxies(address)
    parts = urlsplit(address if "://" in address else f"//{address}")
    port = parts.port or {"http": 80, "https": 443, "ray": 10001}.get(parts.scheme)
    if not parts.hostname or port is None:
        return None
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return None
    try:
        socket.create_connection((parts.hostname, port), timeout_s).close()
    except OSError as error:
        return str(error.strerror or error)
    return None
