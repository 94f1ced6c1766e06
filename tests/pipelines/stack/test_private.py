"""What a private stack is made of, without starting it."""

import stat
import tomllib

import pytest

from pipelines import stack
from pipelines.environment.credentials import read_mlflow_file
from pipelines.stack.home import StackError
from pipelines.stack.private import choose_private, client_context, credentials_file, read_private
from pipelines.stack.processes import StartedService


def test_everything_secret_is_the_users_alone_and_is_made_once(tmp_path):
    tmp_path.chmod(0o755)
    choose_private(tmp_path, True)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path, tmp_path / "tls")} == {0o700}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    first = {path: path.read_text() for path in files}
    choose_private(tmp_path, True)
    assert {path: path.read_text() for path in files} == first
    assert len(read_mlflow_file(credentials_file(tmp_path))["MLFLOW_TRACKING_PASSWORD"]) >= 32
    client_context(tmp_path)  # its certificate is its key's


def test_every_server_and_client_of_seaweedfs_has_a_certificate_and_an_authority(tmp_path):
    choose_private(tmp_path, True)
    settings = tomllib.loads((tmp_path / "security.toml").read_text())
    grpc, https = settings["grpc"], settings["https"]
    assert {"master", "volume", "filer", "s3", "admin", "client"} <= {name for name in grpc if name != "ca"}
    assert set(https) == {"master", "volume", "filer", "admin", "client"}
    assert https["client"]["enabled"] is True
    assert {part["ca"] for part in https.values()} == {grpc["ca"]} == {str(tmp_path / "tls" / "ca.crt")}


def test_the_choice_is_remembered_until_another_is_made(tmp_path):
    assert not read_private(tmp_path)
    choose_private(tmp_path, True)
    assert read_private(tmp_path)
    choose_private(tmp_path, False)
    assert not read_private(tmp_path)
    assert not (tmp_path / "security.toml").exists()


def test_a_running_stack_does_not_change_its_mind(tmp_path, monkeypatch):
    running = {"s3": StartedService(1, 0.0, "", "", (), private=False)}
    monkeypatch.setattr("pipelines.stack.control.alive_services", lambda home: running)
    with pytest.raises(StackError, match="open to other users of this machine: `ddpm down`, then `ddpm up --private`"):
        stack.up(tmp_path, private=True)
    assert not read_private(tmp_path)


def test_a_missing_package_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StackError, match=r"pip install 'ddpm-pipelines\[local\]'"):
        choose_private(tmp_path, True)
    assert not read_private(tmp_path)
