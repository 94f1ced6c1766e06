"""The processes of the local stack: started, recognised by ID and start time, and ended with all their descendants."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from pipelines.environment.credentials import write_private
from pipelines.stack.home import StackError


@dataclass(frozen=True)
class StartedService:
    """The record of a started service in `stack.json`.

    Attributes:
        pid: process ID of the leader of its session.
        started: when that process began, in seconds since the epoch.
        url: address to open or to connect to.
        address: address that clients use; differs from `url` for Ray only.
        probes: URLs that all answer once the service is healthy.
        private: whether it was started so that other users of the machine cannot use it.
    """

    pid: int
    started: float
    url: str
    address: str
    probes: tuple[str, ...]
    private: bool = False

    @classmethod
    def of(
        cls, process: psutil.Process, url: str, probes: tuple[str, ...], *, address: str = "", private: bool = False
    ) -> StartedService:
        """Return the record of a process; clients use `url` where no other address is given."""
        return cls(process.pid, process.create_time(), url, address or url, probes, private)


def launch(
    name: str,
    command: list[str],
    home: Path,
    environment: dict[str, str],
    folder: Path | None = None,
) -> psutil.Process:
    """Start a service in its own session, which Ctrl-C in the terminal does not reach, and return its process.

    Args:
        folder: working directory; None for the folder of the stack.
    """
    # Addresses and keys in the user's environment belong to other servers.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "RAY_", "WEED_"))}
    with (home / "logs" / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd=folder or home,
            env={**inherited, **environment},
            umask=0o077 if name == "s3" else -1,  # Ray shares a folder with those of other users
        )
    return psutil.Process(process.pid)


def find_process(service: StartedService) -> psutil.Process | None:
    """Return the recorded process, or None if it has ended or its ID belongs to another process now."""
    try:
        process = psutil.Process(service.pid)
        same = abs(process.create_time() - service.started) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def end(service: StartedService, grace_s: float = 8) -> None:
    """Terminate a service with all its processes, and kill the remaining ones after a grace period.

    Its processes are its descendants and those in its session. A session outlives its leader, and the system does not
    reuse its ID before the last member has ended.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        if abs(psutil.Process(service.pid).create_time() - service.started) >= 1:
            return  # the ID was reused, so nothing of the old session is left
    root = find_process(service)
    members = set() if root is None else {root, *root.children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == service.pid and process.create_time() >= service.started - 1:
                members |= {process, *process.children(recursive=True)}
    for process in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, remaining = psutil.wait_procs(members, timeout=grace_s)
    for process in remaining:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(remaining, timeout=5)


def read_services(home: Path) -> dict[str, StartedService]:
    """Return every recorded service by name, whether it still runs or not.

    Raises:
        StackError: the record is damaged.
    """
    try:
        recorded = json.loads((home / "stack.json").read_text())
        return {name: StartedService(**{**plain, "probes": tuple(plain["probes"])}) for name, plain in recorded.items()}
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise StackError(
            f"{home / 'stack.json'} is damaged or of another release: end the processes that it names, then delete it"
        ) from error


def write_services(home: Path, services: Mapping[str, StartedService]) -> None:
    """Record services by name, in place of those that were recorded."""
    write_private(home / "stack.json", json.dumps({name: asdict(s) for name, s in services.items()}, indent=1))


def alive_services(home: Path) -> dict[str, StartedService]:
    """Return the recorded services whose process is still there, by name."""
    return {name: service for name, service in read_services(home).items() if find_process(service) is not None}


def choose_ports(home: Path, service: str, names: list[str]) -> dict[str, int]:
    """Return a port for each name: the recorded ones, so that addresses stay the same, or new ones where one is taken.

    New ports lie below the range from which the system takes ports of outgoing connections. Until the service listens,
    another program may take one: `taken_ports` tells.
    """
    recorded = _read_ports(home, service)
    if set(names) <= set(recorded) and not taken_ports(home, service):
        return {name: recorded[name] for name in names}
    found: set[int] = set()
    while len(found) < len(names):
        port = 20000 + secrets.randbelow(10000)
        if _is_free(port):
            found.add(port)
    ports = dict(zip(names, found, strict=True))
    write_private(home / f"ports-{service}.json", json.dumps(ports))
    return ports


def taken_ports(home: Path, service: str) -> list[int]:
    """Return the ports recorded for a service on which something listens."""
    return sorted(port for port in _read_ports(home, service).values() if not _is_free(port))


def _read_ports(home: Path, service: str) -> dict[str, int]:
    """Return the ports recorded for a service, by name; none where the record is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        ports: dict[str, int] = json.loads((home / f"ports-{service}.json").read_text())
        return ports
    return {}


def _is_free(port: int) -> bool:
    """Return whether nothing listens on a port of the loopback interface."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False
