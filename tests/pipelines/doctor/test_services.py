"""What the doctor says about the local stack, MLflow and Ray, and that it ends whatever hangs."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines import doctor
from pipelines.config import compose
from pipelines.doctor import services
from pipelines.doctor.check import ok, run_probes
from pipelines.doctor.services import check_mlflow, check_ray, check_ray_nodes, closed_port, stack_check
from pipelines.presentation.errors import PipelineError
from pipelines.stack import ServiceStatus
from tests.pipelines.doctor import servers


def service(name: str, running: bool, healthy: bool) -> ServiceStatus:
    return ServiceStatus(name, running, healthy, None, None, Path(f"/h/{name}.log"))


def test_a_stack_that_does_not_run_is_no_failure_and_one_that_hangs_is():
    stopped = [service(name, False, False) for name in ("s3", "mlflow", "ray")]
    assert stack_check(stopped, ["s3", "ray"], True).status == "warning"
    assert "ddpm up" in stack_check(stopped, ["s3", "ray"], True).fix
    assert stack_check(stopped, [], True).status == "ok"
    assert stack_check(stopped, ["s3"], False).fix == "python -m pip install 'ddpm-pipelines[local]'"
    hangs = [service("s3", True, True), service("mlflow", True, False), service("ray", True, True)]
    found = stack_check(hangs, ["s3", "mlflow", "ray"], True)
    assert (found.status, found.found) == ("failed", "mlflow run and do not answer")
    assert "/h/mlflow.log" in found.fix
    assert stack_check(hangs, ["s3"], True).status == "ok"


@pytest.mark.parametrize(
    ("status", "says", "fix"),
    [
        (401, "does not know these credentials", "MLFLOW_TRACKING_PASSWORD"),
        (403, "this user may not read experiments", "permission EDIT"),
        (404, "a server answers, but not as MLflow does", "tracking.uri"),
        (500, "HTTP 500", "log of the MLflow server"),
    ],
)
def test_refusals_of_mlflow_are_explained(status, says, fix):
    with servers.serving(servers.fixed(status)) as url:
        found, clock = check_mlflow(url)
    assert (found.status, clock.status) == ("failed", "ok")
    assert says in found.found
    assert fix in found.fix


def test_an_mlflow_that_can_be_read_but_not_written_is_reported():
    class ReadOnly(servers.Quiet):
        def do_GET(self):
            self.answer(200 if self.path == "/version" else 404, b"3.17.2")

        def do_POST(self):
            self.body()
            self.answer(200 if self.path.endswith("search") else 403, b"{}")

    with servers.serving(ReadOnly) as url:
        assert "may not write experiments" in check_mlflow(url)[0].found


def test_mlflow_gets_the_credentials_of_the_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush")
    seen = []

    class Asks(servers.Quiet):
        def do_GET(self):
            seen.append(self.headers.get("Authorization"))
            self.body()
            self.answer(401)

        do_POST = do_GET  # noqa: N815

    with servers.serving(Asks) as url:
        check_mlflow(url)
    assert seen == ["Basic bWU6aHVzaA=="] * 2


def test_closed_ports_fail_at_once_with_the_setting():
    began = time.monotonic()
    [found] = check_mlflow(f"http://127.0.0.1:{servers.closed_port()}")
    assert (found.status, "tracking.uri" in found.fix) == ("failed", True)
    [found] = check_ray(compose([f"cluster.address=127.0.0.1:{servers.closed_port()}"]), {})
    assert (found.status, "cluster.address" in found.fix) == ("failed", True)
    assert "Connection refused" in found.found
    assert time.monotonic() - began < 3


def test_a_port_behind_a_proxy_is_left_to_the_proxy_and_loopback_is_not(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{servers.closed_port()}")
    assert closed_port("http://mlflow.invalid:5000") is None  # only the proxy knows this name
    assert closed_port("ray://ray.invalid:10001") is not None
    with servers.serving(servers.fixed(401)) as url:
        assert "does not know these credentials" in check_mlflow(url)[0].found


def test_a_cluster_that_is_too_small_names_the_number_that_fits():
    config = compose(["cluster.num_workers=4"])
    assert check_ray_nodes(config, "head:1", "2.60", [{"CPU": 4.0}]).status == "ok"
    found = check_ray_nodes(config, "head:1", "2.60", [{"CPU": 2.0}, {"CPU": 1.0}])
    assert (found.status, found.fix) == ("failed", "cluster.num_workers=3")


def test_probes_run_together_and_one_that_hangs_hides_no_other():
    def broken():
        raise KeyError("x")

    def refused():
        raise PipelineError("no such thing")

    ending = threading.Event()
    began = time.monotonic()
    found = run_probes(
        {"hangs": lambda: ending.wait() or [], "fine": lambda: [ok("fine", "")], "broken": broken, "refused": refused},
        0.2,
    )
    ending.set()
    assert time.monotonic() - began < 1
    assert [(check.name, check.status) for check in found] == [
        ("hangs", "failed"),
        ("fine", "ok"),
        ("broken", "failed"),
        ("refused", "failed"),
    ]
    assert "KeyError" in found[2].found
    assert found[3].found == "no such thing"


@pytest.fixture
def hanging():
    """Overrides that name servers which never answer."""
    with servers.silent() as s3, servers.silent() as mlflow, servers.silent() as ray:
        yield [
            *("storage=s3", "storage.root=s3://b", f"storage.endpoint_url=http://k:hush@127.0.0.1:{s3}"),
            *(f"tracking.uri=http://me:hush@127.0.0.1:{mlflow}", f"cluster.address=127.0.0.1:{ray}"),
        ]


def test_every_server_that_hangs_is_reported(hanging, tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "WHOLE_S", 1.0)
    monkeypatch.setattr(doctor, "LEAST_S", 1.0)
    monkeypatch.setattr(services, "RAY_S", 0.5)
    monkeypatch.setattr(services, "CONNECT_S", 0.3)
    monkeypatch.setattr(services.http_date, "__defaults__", (0.3,))
    monkeypatch.setattr("pipelines.storage.s3.MAX_ATTEMPTS", 0)  # its thread ends with the server
    found = doctor.examine(hanging, os.environ)
    checks = {check.name: check for check in found}
    assert all(checks[name].status == "failed" for name in ("storage", "mlflow", "ray"))
    assert "hush" not in str(found)


@pytest.mark.heavy
def test_the_command_ends_in_time_where_every_server_hangs(hanging, tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", "from pipelines.cli import main; main()", "doctor", "--json", *hanging],
        env={**os.environ, "DDPM_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    took = time.monotonic() - began
    assert done.returncode == 1
    assert took < 25  # 18 s, and the start of Python on a busy machine
    checks = {check["name"]: check for check in json.loads(done.stdout.splitlines()[-1])["checks"]}
    assert all(checks[name]["status"] == "failed" for name in ("storage", "mlflow", "ray"))
    assert "hush" not in done.stdout + done.stderr
