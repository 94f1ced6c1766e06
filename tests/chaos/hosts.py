"""Hosts on one machine: network namespaces with addresses of their own on a bridge, whose links can be cut.

A host has its own interfaces, ports and loopback; disk, memory and processes are those of the machine. A cut link
swallows packets without an answer, as a broken cable does: nobody is told that a connection has ended.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.stack import BUCKET, find_weed
from pipelines.stack.home import ensure_credentials
from pipelines.storage import Storage
from tests.processes import family

NETWORK = "10.231.7"
"""The first three bytes of every address; of a private range that nothing else here uses."""
BRIDGE = "ddpmbr0"
S3_PORT, MLFLOW_PORT, RAY_PORT = 8333, 5000, 6379
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]


def reason_for_none() -> str | None:
    """Return why there can be no hosts here, in words; None where there can."""
    if shutil.which("ip") is None:
        return "needs iproute2: apt-get install iproute2"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    made = subprocess.run(["ip", "netns", "add", "ddpm-probe"], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"this machine allows no network namespaces: {made.stderr.strip()}"
    run("ip netns delete ddpm-probe")
    return None


def run(command: str) -> None:
    """Run a command of iproute2."""
    subprocess.run(command.split(), check=True, capture_output=True, text=True)


@dataclass
class Host:
    """A network namespace with one interface.

    Attributes:
        number: last byte of its address.
        processes: that run on it.
    """

    name: str
    number: int
    processes: list[subprocess.Popen[bytes]]

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    @property
    def namespace(self) -> str:
        return f"ddpm-{self.name}"

    @property
    def prefix(self) -> list[str]:
        """What runs a command on the host, in the place of whoever calls it."""
        return ["ip", "netns", "exec", self.namespace]

    def plug_in(self) -> None:
        """Make the namespace, and connect it to the bridge."""
        inside = f"ip -netns {self.namespace}"
        run(f"ip netns add {self.namespace}")
        run(f"ip link add dv{self.number} type veth peer name eth0 netns {self.namespace}")
        run(f"ip link set dv{self.number} master {BRIDGE} up")
        run(f"{inside} addr add {self.address}/24 dev eth0")
        run(f"{inside} link set eth0 up")
        run(f"{inside} link set lo up")

    def start(self, command: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process on the host."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*self.prefix, *command], env=dict(environment), stdout=file, stderr=file, start_new_session=True
            )
        self.processes.append(process)
        return process

    def cut(self) -> None:
        run(f"ip link set dv{self.number} down")

    def mend(self) -> None:
        run(f"ip link set dv{self.number} up")

    def tree(self) -> list[psutil.Process]:
        return [found for process in self.processes for found in family(process.pid)]

    def stop(self) -> None:
        """End all that runs on the host."""
        for process in self.tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for started in self.processes:
            started.wait()
        self.processes.clear()


class Network:
    """S3, MLflow, a Ray head without cores and two Ray workers with one core each, every one on a host of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = ("head", "worker-1", "worker-2", "s3", "mlflow")
        self.head, self.one, self.two, self.s3_host, self.mlflow_host = (
            Host(name, number, []) for number, name in enumerate(names, start=1)
        )
        self.hosts = (self.head, self.one, self.two, self.s3_host, self.mlflow_host)
        self.s3_url = f"http://{self.s3_host.address}:{S3_PORT}"
        self.mlflow_url = f"http://{self.mlflow_host.address}:{MLFLOW_PORT}"
        self.ray_address = f"{self.head.address}:{RAY_PORT}"
        self.s3 = Storage(self.s3_url, str(folder / "credentials"), "us-east-1")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "RAY_", "DDPM_"))}
        self.environment = inherited | {
            "AWS_ENDPOINT_URL": self.s3_url,
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "RAY_ADDRESS": self.ray_address,
            "RAY_AUTH_MODE": "disabled",  # nobody else is on this network
            "RAY_TRAIN_V2_ENABLED": "1",
            "RAY_worker_niceness": "0",
            "GLOO_SOCKET_IFNAME": "eth0",  # the machine's name leads to an address that no host has
            "DDPM_HOME": str(folder / ".ddpm"),
            "NO_PROXY": "*",
        }

    def __enter__(self) -> Network:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        ensure_credentials(self.folder)
        run(f"ip link add {BRIDGE} type bridge")
        run(f"ip addr add {NETWORK}.254/24 dev {BRIDGE}")
        run(f"ip link set {BRIDGE} up")
        for host in self.hosts:
            host.plug_in()
        at = self.s3_host.address
        weed = [str(find_weed()), "-logtostderr", "mini", f"-dir={self.folder / 's3'}", f"-ip={at}", f"-ip.bind={at}"]
        weed += [f"-bucket={BUCKET}", f"-s3.config={self.folder / 's3.json'}", "-webdav=false", "-admin.ui=false"]
        weed += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", f"-s3.port={S3_PORT}"]
        (self.folder / "s3").mkdir()
        self.s3_host.start(weed, self.environment, self.folder / "s3.log")
        self.start_ray(self.head)
        for url in (self.s3_url, f"http://{at}:8888/buckets/{BUCKET}/", f"http://{at}:9333/dir/assign"):
            await_url(url)
        mlflow = [sys.executable, "-m", "mlflow", "server", "--host", self.mlflow_host.address, "--workers", "1"]
        mlflow += ["--port", str(MLFLOW_PORT), "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        mlflow += ["--serve-artifacts", "--artifacts-destination", f"s3://{BUCKET}/mlflow"]
        mlflow += ["--allowed-hosts", f"{self.mlflow_host.address}:{MLFLOW_PORT}"]
        self.mlflow_host.start(mlflow, self.environment, self.folder / "mlflow.log")
        await_url(f"{self.mlflow_url}/health")
        for host in (self.one, self.two):
            self.join(host)

    def start_ray(self, host: Host) -> subprocess.Popen[bytes]:
        """Start a Ray node on a host: the head, or a worker that joins it."""
        if host is self.head:
            role = ["--head", f"--port={RAY_PORT}", "--num-cpus=0", "--include-dashboard=false"]
            role += [f"--temp-dir={self.folder / 'ray'}"]
        else:
            role = [f"--address={self.ray_address}", "--num-cpus=1"]
        command = [*RAY, *role, f"--node-ip-address={host.address}", f"--object-store-memory={100 * 2**20}"]
        cache = {"XDG_CACHE_HOME": str(self.folder / host.name / "cache")}
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        return host.start(command, environment | cache, self.folder / f"{host.name}.log")

    def join(self, host: Host, attempts: int = 5) -> None:
        """Start the Ray node of a worker as whoever supervises it does: again where Ray's own 30 s were not enough."""
        log = self.folder / f"{host.name}.log"
        for _ in range(attempts):
            began = log.stat().st_size if log.exists() else 0
            node = self.start_ray(host)
            while node.poll() is None:
                if "Ray runtime started" in log.read_text()[began:]:
                    return
                time.sleep(0.3)
        raise AssertionError(f"no Ray node on {host.name}: {log.read_text()[-2000:]}")

    def __exit__(self, *error: object) -> None:
        for host in reversed(self.hosts):
            host.stop()
        made = [["link", "delete", f"dv{host.number}"] for host in self.hosts]
        made += [["netns", "delete", host.namespace] for host in self.hosts]
        for words in [*made, ["link", "delete", BRIDGE]]:
            subprocess.run(["ip", *words], capture_output=True, check=False)  # what was not made yet is no error


def await_url(url: str, timeout_s: float = 180) -> None:
    """Wait until something answers there, whatever it says of who asks."""
    deadline = time.monotonic() + timeout_s
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(url, timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, f"nothing answers at {url}"
        time.sleep(0.3)
