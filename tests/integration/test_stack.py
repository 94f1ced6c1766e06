"""The local stack as its users see it: up, loopback only, private, recoverable, and gone after `down`."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import http.client
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from pipelines import stack
from pipelines.stack import StackState

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose stack is ended whatever happens in between."""
    path = tmp_path_factory.mktemp("stack") / "home"
    yield path
    stack.down(path)


@pytest.fixture
def up(home: Path) -> StackState:
    return stack.up(home)


def pids(home: Path) -> dict[str, int | None]:
    return {service.name: service.pid for service in stack.status(home)}


def session(pid: int) -> int | None:
    """The session of a process; None for one that has ended since it was listed."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def family(home: Path) -> list[psutil.Process]:
    """Every process of the stack: the services, their sessions and their descendants."""
    leaders = {pid for pid in pids(home).values() if pid}
    found = {p.pid: p for pid in leaders for p in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]}
    found |= {p.pid: p for p in psutil.process_iter() if session(p.pid) in leaders}
    return list(found.values())


def keys(home: Path) -> tuple[str, str]:
    lines = dict(line.split(" = ") for line in (home / "credentials").read_text().splitlines() if " = " in line)
    return lines["aws_access_key_id"], lines["aws_secret_access_key"]


def s3(state: StackState, method: str, path: str, body: bytes = b"", secret: str | None = None) -> tuple[int, bytes]:
    """One request signed with AWS Signature Version 4, with the stack's key and `secret` (default: the right one)."""
    key, right = keys(state.home)
    host = urlsplit(str(state.s3_endpoint)).netloc
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = [now[:8], "us-east-1", "s3", "aws4_request"]
    headers = {"host": host, "x-amz-content-sha256": hashlib.sha256(body).hexdigest(), "x-amz-date": now}
    names = ";".join(headers)
    lines = [method, path, "", *(f"{k}:{v}" for k, v in headers.items()), "", names, headers["x-amz-content-sha256"]]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    signing = f"AWS4{secret or right}".encode()
    for part in [*scope, "\n".join(["AWS4-HMAC-SHA256", now, "/".join(scope), digest])]:
        signature = hmac.new(signing, part.encode(), hashlib.sha256)
        signing = signature.digest()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={key}/{'/'.join(scope)}, SignedHeaders={names}, Signature={signature.hexdigest()}"
    )
    return call(str(state.s3_endpoint), method, path, body, headers)


def call(
    url: str, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_all_services_come_up_healthy_and_twice_is_a_no_op(home: Path) -> None:
    phases: list[tuple[str, str]] = []
    first = stack.up(home, notice=lambda *phase: phases.append(phase))
    assert [phase for phase in phases if phase[1] == "starting"] == [(name, "starting") for name in stack.SERVICES]
    assert {name for name, phase in phases if phase == "healthy"} == set(stack.SERVICES)
    before, phases = pids(home), []

    assert stack.up(home, notice=lambda *phase: phases.append(phase)) == first == stack.read_state(home)
    assert sorted(phases) == sorted((name, "already running") for name in stack.SERVICES)
    assert pids(home) == before

    begin = time.monotonic()
    assert all(service.running and service.healthy for service in stack.status(home)), stack.status(home)
    assert time.monotonic() - begin < 2


def test_every_listening_socket_is_on_loopback(up: StackState) -> None:
    script = """
import os, psutil, sys
from pathlib import Path
from pipelines import stack
os.environ.update(stack.ray_environment(Path(sys.argv[3])))
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
@ray.remote
class Worker:
    def environment(self):
        return os.getpid(), dict(os.environ)
worker = Worker.remote()  # Ray's workers and drivers listen as well
pid, environ = ray.get(worker.environment.remote())
def listening(p):
    return [c.laddr.ip for c in psutil.Process(p).net_connections() if c.status == "LISTEN"]
sessions = {os.getsid(int(leader)) for leader in sys.argv[2].split(",")}
found = {}
for p in psutil.process_iter():
    try:
        if os.getsid(p.pid) in sessions:
            found[p.pid] = listening(p.pid)
    except (ProcessLookupError, psutil.NoSuchProcess):
        pass  # ended since it was listed
print(environ["OMP_WAIT_POLICY"], environ["RAY_TRAIN_V2_ENABLED"], environ["AWS_ENDPOINT_URL"])
every = sum(found.values(), [])
print(bool(found[pid]), len(every), *{*every, *listening(os.getpid())})
"""
    leaders = ",".join(str(pid) for pid in pids(up.home).values())
    argv = [sys.executable, "-c", script, str(up.ray_address), leaders, str(up.home)]
    driver = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert driver.returncode == 0, driver.stderr[-2000:]
    environment, sockets = (line.split() for line in driver.stdout.splitlines()[-2:])
    assert environment == ["PASSIVE", "1", up.s3_endpoint]
    assert sockets[0] == "True"
    assert int(sockets[1]) > 12
    assert set(sockets[2:]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_credentials_are_private_and_appear_nowhere(up: StackState) -> None:
    private = [up.home / name for name in ("credentials", "s3.json", "ray-token", "stack.json")]
    assert [stat.S_IMODE(path.stat().st_mode) for path in private] == [0o600] * 4
    assert stat.S_IMODE(up.home.stat().st_mode) == 0o700
    assert call(str(up.tracking_uri), "GET", "/health")[0] == 200  # something to log
    for secret in (*keys(up.home), (up.home / "ray-token").read_text()):
        for log in (up.home / "logs").rglob("*.log*"):
            assert secret not in log.read_text(errors="replace"), log
        for process in family(up.home):
            with contextlib.suppress(psutil.NoSuchProcess):
                assert secret not in " ".join(process.cmdline())
                assert secret not in str(process.environ())


def test_a_wrong_key_and_no_key_are_refused(up: StackState) -> None:
    assert s3(up, "PUT", f"/{up.bucket}/right.txt", b"x")[0] == 200
    assert s3(up, "PUT", f"/{up.bucket}/wrong.txt", b"x", secret="wrong")[0] == 403
    assert call(str(up.s3_endpoint), "GET", f"/{up.bucket}/right.txt")[0] == 403


def test_mlflow_proxies_artifacts_into_the_bucket(up: StackState) -> None:
    path = "/api/2.0/mlflow-artifacts/artifacts/some/grid.txt"
    assert call(str(up.tracking_uri), "PUT", path, b"pixels")[0] == 200
    assert s3(up, "GET", f"/{up.bucket}/mlflow/some/grid.txt") == (200, b"pixels")


def test_a_killed_service_is_started_again_alone_with_its_data(up: StackState) -> None:
    assert s3(up, "PUT", f"/{up.bucket}/kept.txt", b"kept")[0] == 200
    before = pids(up.home)
    os.kill(before["s3"], signal.SIGKILL)
    while psutil.Process(before["s3"]).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    assert not next(service for service in stack.status(up.home) if service.name == "s3").running

    again = stack.up(up.home)
    after = pids(up.home)
    assert after["s3"] != before["s3"]
    assert (after["mlflow"], after["ray"]) == (before["mlflow"], before["ray"])
    assert again == up  # the same addresses: what MLflow and Ray were told still holds
    assert s3(again, "GET", f"/{up.bucket}/kept.txt") == (200, b"kept")


def test_a_recorded_pid_that_belongs_to_another_process_is_not_ours(tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        home = tmp_path / "home"
        home.mkdir(mode=0o700)
        started = psutil.Process(bystander.pid).create_time() - 3600
        nowhere = "http://127.0.0.1:1"
        record = {"pid": bystander.pid, "started": started, "url": nowhere, "address": nowhere, "probes": [nowhere]}
        (home / "stack.json").write_text(json.dumps({"ray": record}))
        assert stack.read_state(home) is None
        stack.down(home)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_down_ends_all_descendants_and_nothing_else_and_keeps_the_data(up: StackState) -> None:
    assert s3(up, "PUT", f"/{up.bucket}/survivor.txt", b"still here")[0] == 200
    ours = family(up.home)
    assert len(ours) > 6
    bystander = subprocess.Popen(["sleep", "120"])
    try:
        assert stack.down(up.home) == ["ray", "mlflow", "s3"]
        assert [p for p in ours if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert stack.down(up.home) == []
    assert stack.read_state(up.home) is None
    assert not (up.home / "stack.json").exists()

    again = stack.up(up.home, ["s3"])
    assert (again.s3_endpoint, again.tracking_uri, again.ray_address) == (up.s3_endpoint, None, None)
    assert s3(again, "GET", f"/{up.bucket}/survivor.txt") == (200, b"still here")


def test_two_homes_and_two_callers_at_once(up: StackState, tmp_path: Path) -> None:
    second = tmp_path / "second"
    try:
        with ThreadPoolExecutor(2) as pool:
            one, two = pool.map(lambda _: stack.up(second, ["s3"]), range(2))
        assert one == two
        assert one.s3_endpoint != up.s3_endpoint
        assert all(service.healthy for service in stack.status(up.home))
    finally:
        assert stack.down(second) == ["s3"]


def test_a_service_that_ends_at_its_start_says_why_and_nothing_that_was_started_with_it_stays(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as database, database:  # as a later MLflow leaves it
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('of_a_later_one')")
    with pytest.raises(stack.StackError, match=r"(?s)mlflow ended at once.*mlflow\.log.*of_a_later_one.*ddpm up"):
        stack.up(home, ["mlflow"])
    assert stack.read_state(home) is None
    assert stack.down(home) == []


def test_a_service_that_does_not_answer_in_time_says_so_and_leaves_those_before_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    before = stack.up(home, ["s3"])
    try:
        (home / "mlflow.db").mkdir()  # where MLflow wants a file, and tries again and again
        with pytest.raises(stack.StackError, match=r"(?s)mlflow did not answer within 4 s.*mlflow\.log.*ddpm up"):
            stack.up(home, ["mlflow"], timeout_s=4)
        assert stack.read_state(home) == before
    finally:
        assert stack.down(home) == ["s3"]
