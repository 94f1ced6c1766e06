import socket
import subprocess
import sys

import psutil
import pytest

from pipelines import stack
from pipelines.stack import control, services
from pipelines.stack.processes import StartedService, choose_ports, launch, read_services

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_nothing_recorded_is_nothing_running(tmp_path):
    home = tmp_path / "none"
    assert stack.read_state(home) is None
    assert stack.down(home) == []
    assert [service.running for service in stack.status(home)] == [False] * 3
    assert not home.exists()


@pytest.fixture
def sleeping(monkeypatch) -> dict[str, subprocess.Popen]:
    """Services that only sleep, by the name under which they were started."""
    made = {}

    def starter(name):
        def start(home, running):
            made[name] = subprocess.Popen(SLEEP, start_new_session=True)
            process = psutil.Process(made[name].pid)
            url = f"http://{name}"
            return StartedService(process.pid, process.create_time(), url, url, (f"{url}/health",))

        return start

    monkeypatch.setattr(control, "STARTERS", {name: starter(name) for name in ("s3", "mlflow", "ray")})
    monkeypatch.setattr(services, "_url_answers", lambda *_: True)
    return made


def test_a_service_is_recorded_before_it_answers_so_that_a_killed_start_leaves_none_that_nobody_knows(
    tmp_path, sleeping, monkeypatch
):
    seen = []
    monkeypatch.setattr(control, "await_healthy", lambda name, *_: seen.append(name in read_services(tmp_path)))
    stack.up(tmp_path)
    assert seen == [True] * 3
    assert read_services(tmp_path).keys() == set(sleeping)
    assert stack.down(tmp_path) == ["ray", "mlflow", "s3"]
    assert all(process.poll() is not None for process in sleeping.values())


def test_where_one_does_not_start_those_of_the_call_are_ended_and_those_of_earlier_ones_stay(
    tmp_path, sleeping, monkeypatch
):
    monkeypatch.setattr(control, "await_healthy", lambda name, *_: None)
    stack.up(tmp_path, ["s3"])

    def fails(name, *_):
        if name == "ray":
            raise stack.StackError("ray does not start")

    monkeypatch.setattr(control, "await_healthy", fails)
    with pytest.raises(stack.StackError, match="ray does not start"):
        stack.up(tmp_path)
    assert read_services(tmp_path).keys() == {"s3"}
    assert sleeping["s3"].poll() is None
    assert all(sleeping[name].poll() is not None for name in ("mlflow", "ray"))
    assert stack.down(tmp_path) == ["s3"]


def test_a_service_that_is_slow_goes_on_because_others_may_be_using_it(tmp_path, sleeping, monkeypatch):
    monkeypatch.setattr(control, "await_healthy", lambda *_: None)
    stack.up(tmp_path, ["s3"])
    before, said = sleeping["s3"], []
    probes = iter([False, False, True])
    monkeypatch.setattr(services, "_url_answers", lambda *_: next(probes))
    stack.up(tmp_path, ["s3"], notice=lambda name, phase: said.append(phase))
    assert said == ["slow to answer", "already running"]
    assert sleeping["s3"] is before
    assert before.poll() is None
    assert stack.down(tmp_path) == ["s3"]


def test_a_service_that_stays_silent_is_started_anew(tmp_path, sleeping, monkeypatch):
    monkeypatch.setattr(control, "await_healthy", lambda *_: None)
    monkeypatch.setattr(control, "PATIENCE_S", 0.2)
    stack.up(tmp_path, ["s3"])
    before, said = sleeping["s3"], []
    monkeypatch.setattr(services, "_url_answers", lambda *_: False)
    stack.up(tmp_path, ["s3"], notice=lambda name, phase: said.append(phase))
    assert said == ["slow to answer", "starting", "healthy"]
    assert before.poll() is not None
    assert sleeping["s3"].poll() is None
    assert stack.down(tmp_path) == ["s3"]


def test_a_service_whose_process_has_ended_is_started_anew_at_once(tmp_path, sleeping, monkeypatch):
    monkeypatch.setattr(control, "await_healthy", lambda *_: None)
    stack.up(tmp_path, ["s3"])
    sleeping["s3"].kill()
    sleeping["s3"].wait()
    said = []
    monkeypatch.setattr(services, "_url_answers", lambda *_: False)
    stack.up(tmp_path, ["s3"], notice=lambda name, phase: said.append(phase))
    assert said == ["starting", "healthy"]
    assert stack.down(tmp_path) == ["s3"]


def test_the_status_of_a_service_gives_it_time_to_answer(tmp_path, sleeping, monkeypatch):
    monkeypatch.setattr(control, "await_healthy", lambda *_: None)
    stack.up(tmp_path, ["s3"])
    # A training may keep the machine busy.
    monkeypatch.setattr(services, "_url_answers", lambda url, home, timeout_s: timeout_s > 3)
    assert [service.healthy for service in stack.status(tmp_path)] == [True, False, False]
    assert stack.down(tmp_path) == ["s3"]


def test_a_service_whose_port_another_program_took_before_it_listened_is_started_again_on_another_one(
    tmp_path, monkeypatch
):
    taken, told = [], []

    def start(home, running):
        port = choose_ports(home, "s3", ["port"])["port"]
        if len(taken) < 2:
            taken.append(socket.create_server(("127.0.0.1", port)))
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
        return StartedService.of(launch("s3", command, home, {}), url, (url,))

    monkeypatch.setattr(control, "STARTERS", {"s3": start})
    try:
        state = stack.up(tmp_path, ["s3"], notice=lambda _, phase: told.append(phase))
        assert told == ["starting", *["port taken, starting again"] * 2, "healthy"]
        assert state.s3_endpoint not in [f"http://127.0.0.1:{other.getsockname()[1]}" for other in taken]
    finally:
        stack.down(tmp_path)
        for other in taken:
            other.close()
