"""Starting, stopping and state of the local stack."""

from __future__ import annotations

import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipelines.environment.loopback import bypass_proxies
from pipelines.presentation.progress import StageNotice, no_stage_notice
from pipelines.stack.home import StackError, default_home, ensure_credentials, locked
from pipelines.stack.private import choose_private, credentials_file, read_private
from pipelines.stack.processes import StartedService, alive_services, end, read_services, taken_ports, write_services
from pipelines.stack.services import (
    BUCKET,
    SERVICES,
    SLOW_PROBE_S,
    STARTERS,
    TOGETHER,
    answers,
    answers_within,
    await_healthy,
)

START_ATTEMPTS = 4
"""How often a service is started that ends because another program has taken one of its ports in the meantime."""
PATIENCE_S = 30.0
"""Seconds for which a running service is tried before it is restarted; a restart of Ray would end a training."""


@dataclass(frozen=True)
class StackState:
    """Addresses of the running services; None for one that is not running."""

    home: Path
    bucket: str
    s3_endpoint: str | None = None
    credentials_file: Path | None = None
    tracking_uri: str | None = None
    ray_address: str | None = None
    dashboard_url: str | None = None
    mlflow_credentials_file: Path | None = None


@dataclass(frozen=True)
class ServiceStatus:
    """The current state of one service.

    Attributes:
        running: whether its process exists.
        healthy: whether it answers.
        log: path of its log.
    """

    name: str
    running: bool
    healthy: bool
    url: str | None
    pid: int | None
    log: Path


def up(
    home: Path | None = None,
    services: Collection[str] = SERVICES,
    *,
    private: bool | None = None,
    notice: StageNotice = no_stage_notice,
    timeout_s: float = 90,
) -> StackState:
    """Start the services that are not running, wait until they answer, and return the addresses.

    A second call changes nothing. A service that runs but does not answer for `PATIENCE_S` seconds is restarted.

    Args:
        services: of "s3", "mlflow" (which brings "s3"), "ray", and those of `ORCHESTRATOR`.
        private: whether other users of this machine are kept out; None for the last choice, at first False.
        notice: called with the service and its phase: "starting", "port taken, starting again", "healthy",
            "slow to answer" or "already running".

    Raises:
        StackError: a service does not start, in which case those started by this call are stopped; or the stack runs
            with another choice of `private`.
    """
    bypass_proxies("http://127.0.0.1")  # the services inherit it: they call each other
    home = home or default_home()
    wanted = [s for s in STARTERS if s in services or (s == "s3" and "mlflow" in services)]
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    (home / "logs").mkdir(exist_ok=True)
    with locked(home):
        ensure_credentials(home)
        running = alive_services(home)
        private = read_private(home) if private is None else private
        if any(service.private != private for service in running.values()):
            option, now = ("--private", "open to") if private else ("--shared", "closed to")
            raise StackError(
                f"the running local stack is {now} other users of this machine: `ddpm down`, then `ddpm up {option}`"
            )
        choose_private(home, private)
        for name, service in read_services(home).items():
            if name not in running:
                end(service)  # its leader has ended; processes left in its session would hold ports and files
        starter = _Starter(home, running, notice, timeout_s)
        try:
            for group in TOGETHER:
                with ThreadPoolExecutor(2) as pool:
                    for future in [pool.submit(starter.start, name) for name in group if name in wanted]:
                        future.result()
        except BaseException:
            starter.end_started()
            raise
        starter.record()
    return _state(home, running)


class _Starter:
    """Starts services of a stack, several at a time, and records them.

    Args:
        running: services that run, to which the started ones are added.
    """

    def __init__(self, home: Path, running: dict[str, StartedService], notice: StageNotice, timeout_s: float) -> None:
        self.home, self.running, self.notice, self.timeout_s = home, running, notice, timeout_s
        self.started: dict[str, StartedService] = {}
        self._recording = threading.Lock()

    def start(self, name: str) -> None:
        """Start a service unless it answers, and wait until it does."""
        if self._answers(name):
            self.notice(name, "already running")
            return
        if name in self.running:
            end(self.running.pop(name))
        self.notice(name, "starting")
        for attempts_left in reversed(range(START_ATTEMPTS)):
            self.started[name] = service = STARTERS[name](self.home, self.running)
            self.record()  # if this process is killed, `down` and the next `up` know about it
            try:
                await_healthy(name, service, self.home, self.timeout_s)
                break
            except StackError:
                end(service)
                if not attempts_left or not taken_ports(self.home, name):
                    raise
                self.notice(name, "port taken, starting again")
        self.running[name] = service
        self.notice(name, "healthy")

    def _answers(self, name: str) -> bool:
        """Return whether a service runs and answers, if need be within `PATIENCE_S` seconds."""
        if name not in self.running:
            return False
        if answers(self.running[name], self.home):
            return True
        self.notice(name, "slow to answer")
        return answers_within(self.running[name], self.home, PATIENCE_S, SLOW_PROBE_S)

    def record(self) -> None:
        """Write which services run."""
        with self._recording:
            write_services(self.home, {**self.running, **self.started})

    def end_started(self) -> None:
        """End what was started here."""
        for name, service in self.started.items():
            end(service)
            self.running.pop(name, None)
        self.started.clear()
        self.record()


def down(home: Path | None = None, *, notice: StageNotice = no_stage_notice) -> list[str]:
    """Stop the services that `up` started, with all descendants, and return their names.

    Data and credentials are kept.
    """
    home = home or default_home()
    if not home.is_dir():
        return []
    with locked(home):
        running = read_services(home)
        stopped = [name for name in reversed(STARTERS) if name in running]
        for name in stopped:
            notice(name, "stopping")
            # Ray has nothing to save, and its processes wait for each other; the others write to disk.
            end(running[name], grace_s=2 if name == "ray" else 15)
        (home / "stack.json").unlink(missing_ok=True)
    return stopped


def status(home: Path | None = None) -> list[ServiceStatus]:
    """Return the state of every service, and of running ones of the orchestrator, after checking whether they
    answer."""
    home = home or default_home()
    running = alive_services(home)

    def one(name: str) -> ServiceStatus:
        service, log = running.get(name), home / "logs" / f"{name}.log"
        if service is None:
            return ServiceStatus(name, False, False, None, None, log)
        return ServiceStatus(name, True, answers(service, home, SLOW_PROBE_S), service.url, service.pid, log)

    names = [name for name in STARTERS if name in SERVICES or name in running]
    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(one, names))


def read_state(home: Path | None = None) -> StackState | None:
    """Return the addresses of the services whose process exists, or None if there are none."""
    home = home or default_home()
    running = alive_services(home)
    return _state(home, running) if running else None


def _state(home: Path, running: dict[str, StartedService]) -> StackState:
    s3, mlflow, ray = (running.get(name) for name in SERVICES)
    return StackState(
        home,
        BUCKET,
        s3_endpoint=s3.url if s3 else None,
        credentials_file=home / "credentials" if s3 else None,
        tracking_uri=mlflow.url if mlflow else None,
        ray_address=ray.address if ray else None,
        dashboard_url=ray.url if ray else None,
        mlflow_credentials_file=credentials_file(home) if mlflow and mlflow.private else None,
    )
