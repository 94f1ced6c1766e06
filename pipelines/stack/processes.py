"""The processes of the local stack: started, recognised by ID and start time, and ended with all their descendants."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.errors import PipelineError
from pipelines.stack.home import write_private


class StackError(PipelineError):
    """A service of the local stack does not come up; says where its log is and what it ends with."""


@dataclass(frozen=True)
class Service:
    """What `stack.json` records of a started service."""

    pid: int
    started: float
    url: str
    address: str
    probes: tuple[str, ...]


def launch(
    name: str,
    command: list[str],
    home: Path,
    environment: dict[str, str],
    url: str,
    address: str,
    probes: tuple[str, ...],
) -> Service:
    """Start a process in a session of its own, so that Ctrl-C in the terminal does not reach it."""
    # The user's own addresses and keys are not the stack's.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "RAY_"))}
    with (home / "logs" / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd=home,
            env={**inherited, **environment},
        )
    return Service(process.pid, psutil.Process(process.pid).create_time(), url, address, probes)


def find_process(service: Service) -> psutil.Process | None:
    """The recorded process, unless it has ended or its ID belongs to another one now."""
    try:
        process = psutil.Process(service.pid)
        same = abs(process.create_time() - service.started) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def end(service: Service, grace_s: float = 8) -> None:
    """Terminate a service and its family, and kill what is left after a grace period.

    The family is what descends from it or is in its session; a session outlives its leader, and its number is not
    given to another process before the last member is gone.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        if abs(psutil.Process(service.pid).create_time() - service.started) >= 1:
            return  # the number is another process's now, so nothing of the old session is left
    root = find_process(service)
    family = set() if root is None else {root, *root.children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == service.pid and process.create_time() >= service.started - 1:
                family |= {process, *process.children(recursive=True)}
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(family, timeout=grace_s)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=5)


def read_services(home: Path) -> dict[str, Service]:
    try:
        recorded = json.loads((home / "stack.json").read_text())
        return {name: Service(**{**plain, "probes": tuple(plain["probes"])}) for name, plain in recorded.items()}
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise StackError(
            f"{home / 'stack.json'} is damaged or of another release: end the processes that it names, then delete it"
        ) from error


def alive_services(home: Path) -> dict[str, Service]:
    return {name: service for name, service in read_services(home).items() if find_process(service) is not None}


def choose_ports(home: Path, service: str, names: list[str]) -> dict[str, int]:
    """A port for each name: those of last time, so that addresses stay the same, or free ones where one is taken.

    They lie below the range that outgoing connections take theirs from.
    """
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
        before = json.loads((home / f"ports-{service}.json").read_text())
        if all(_is_free(before[name]) for name in names):
            return {name: before[name] for name in names}
    found: set[int] = set()
    while len(found) < len(names):
        port = 20000 + secrets.randbelow(10000)
        if _is_free(port):
            found.add(port)
    ports = dict(zip(names, found, strict=True))
    write_private(home / f"ports-{service}.json", json.dumps(ports))
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False
