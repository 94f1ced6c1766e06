import subprocess
import sys

import psutil
import pytest

from pipelines import stack
from pipelines.stack import control
from pipelines.stack.processes import Service, read_services

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
            return Service(process.pid, process.create_time(), f"http://{name}", f"http://{name}", ())

        return start

    monkeypatch.setattr(control, "STARTERS", {name: starter(name) for name in ("s3", "mlflow", "ray")})
    monkeypatch.setattr(control, "answers", lambda service, home: True)
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
