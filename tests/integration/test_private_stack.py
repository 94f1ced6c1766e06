"""A private stack asked by somebody without credentials, at every port that its processes listen on."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
import requests

from pipelines import stack
from pipelines.environment.credentials import read_mlflow_file
from pipelines.stack import StackState
from pipelines.stack.private import client_context
from pipelines.storage import Storage
from tests.integration import command
from tests.networks import TINY_UNET

pytestmark = pytest.mark.integration

PATHS = ["/", "/health", "/metrics", "/status", "/dir/status", "/dir/assign", "/vol/grow?count=1", "/buckets/ddpm/"]
PATHS += ["/ddpm", "/ddpm/secret", "/ui/index.html", "/cluster/status", "/stats/disk", "/api/jobs/", "/api/v0/actors"]
PATHS += ["/api/2.0/mlflow/experiments/search?max_results=1", "/signup", "/version", "/nodes", "/logs"]
METHODS = ["GET", "POST", "PUT", "DELETE"]
GRPC = {
    "port": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "node-manager-port": "/ray.rpc.NodeManagerService/GetNodeStats",
    "object-manager-port": "/ray.rpc.ObjectManagerService/Pull",
    "dashboard-agent-grpc-port": "/ray.rpc.LogService/ListLogs",
    "ray-client-server-port": "/ray.rpc.RayletDriver/KVList",
}


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackState]:
    home = tmp_path_factory.mktemp("private") / "home"
    try:
        state = stack.up(home, private=True)
        Storage(state.s3_endpoint, str(state.credentials_file), "us-east-1").write("s3://ddpm/secret", b"hush")
        yield state
    finally:
        stack.down(home)


def listening(home: Path) -> dict[int, str]:
    """The ports of the stack's processes, with the service."""
    leaders = {service.pid: service.name for service in stack.status(home)}
    found: dict[int, str] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            name = leaders.get(os.getsid(process.pid))
            if name:
                found |= {c.laddr.port: name for c in process.net_connections() if c.status == "LISTEN"}
    return found


def ask(port: int, method: str, path: str) -> tuple[int, bytes] | None:
    """The answer to a request without credentials; None where there is none that is HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path, b"{}" if method != "GET" else None, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def test_nobody_without_credentials_reads_or_changes_anything_at_any_port(private: StackState) -> None:
    ports = listening(private.home)
    assert set(ports.values()) == set(stack.SERVICES)
    asked = [(port, method, path) for port in ports for method in METHODS for path in PATHS]
    answers = [(ports[port], port, method, path, ask(port, method, path)) for port, method, path in asked]
    heard = [(*about, *answer) for *about, answer in answers if answer is not None and answer[0] < 400]
    assert [found for found in heard if not public(*found)] == []
    assert {service for service, *_ in heard} == {"s3", "mlflow", "ray"}  # the docs say what this is


def public(service: str, port: int, method: str, path: str, status: int, body: bytes) -> bool:
    """Whether an answer is one of those that anybody gets: that a server is there, its page without data, counters."""
    is_page = method == "GET" and (service, path) in (("s3", "/status"), ("mlflow", "/health"), ("ray", "/"))
    # Prometheus' servers give the same at any path.
    return (is_page and len(body) < 4000) or (service == "ray" and body.startswith(b"# HELP"))


def test_seaweedfs_hears_nobody_without_a_certificate(private: StackState) -> None:
    ports = json.loads((private.home / "ports-s3.json").read_text())
    nobody = ssl.create_default_context(cafile=str(private.home / "tls" / "ca.crt"))
    for name, port in ports.items():
        if name == "s3.port":
            continue  # asks for S3's signature, as the test above shows
        with pytest.raises(ssl.SSLError, match="CERTIFICATE"):
            greet(port, nobody)
        greet(port, client_context(private.home))


def greet(port: int, context: ssl.SSLContext) -> None:
    """Speak TLS with a port; version 1.3 tells a client with its first read that it is refused."""
    with (
        socket.create_connection(("127.0.0.1", port), 5) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        connection.recv(1)


def test_rays_own_protocol_asks_for_the_token(private: StackState) -> None:
    ports = json.loads((private.home / "ports-ray.json").read_text())
    for name, method in GRPC.items():
        with grpc.insecure_channel(f"127.0.0.1:{ports[name]}") as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(method)(b"", timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, name


def test_the_owner_is_let_in_and_the_next_start_stays_private(private: StackState) -> None:
    found = read_mlflow_file(Path(str(private.mlflow_credentials_file)))
    owner = (found["MLFLOW_TRACKING_USERNAME"], found["MLFLOW_TRACKING_PASSWORD"])
    url = f"{private.tracking_uri}/api/2.0/mlflow/experiments/search"
    assert requests.post(url, json={"max_results": 1}, auth=owner, timeout=10).ok
    assert requests.post(url, json={"max_results": 1}, auth=(owner[0], "wrong"), timeout=10).status_code == 401
    assert stack.up(private.home) == private
    assert stack.read_private(private.home)
    command_lines = [" ".join(psutil.Process(s.pid).cmdline()) for s in stack.status(private.home) if s.pid]
    assert not [line for line in command_lines if owner[1] in line]


@pytest.mark.slow  # a minute of a core, for the imports of each process
@pytest.mark.timeout(600)
def test_workers_that_ray_starts_itself_train_on_it(private: StackState, tmp_path: Path) -> None:
    """Other tests fork theirs from a process that has imported all there is: these import what they need."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "RAY_"))}
    environment |= {"DDPM_HOME": str(private.home), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for arguments in (
        ["ingest", "digits", "--to", "s3://ddpm/datasets/digits"],
        ["train", "+experiment=digits", *TINY_UNET, "images=384", "cluster.num_workers=1", "sampler.steps=2", "--json"],
    ):
        done = command.FORKS.run(arguments, tmp_path, environment, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["status"], answer["images_seen"]) == ("finished", 384)
    (head,) = [psutil.Process(s.pid) for s in stack.status(private.home) if s.name == "ray"]
    assert "tests.integration" not in " ".join(" ".join(p.cmdline()) for p in [head, *head.children(recursive=True)])
