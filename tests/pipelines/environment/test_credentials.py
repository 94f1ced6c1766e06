"""Secrets leave addresses and command lines before anything shows them, and reach other processes by file."""

import os
import stat
import sys
from pathlib import Path

import pytest

from pipelines.cli import app
from pipelines.config import ConfigError, compose
from pipelines.environment.credentials import (
    AWS_FILE,
    MLFLOW_FILE,
    clean_arguments,
    clean_environment,
    hand_over,
    read_mlflow_file,
    redact,
    split_address,
)
from pipelines.stack.connect import connect, without_secrets
from pipelines.tracking import client


@pytest.mark.parametrize(
    ("address", "service", "bare", "variables"),
    [
        (
            "https://me:p%40ss@ml.example/x",
            "mlflow",
            "https://ml.example/x",
            {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "p@ss"},
        ),
        (
            "http://key:secret@s3:9000",
            "s3",
            "http://s3:9000",
            {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"},
        ),
        ("ray://:tok@head:10001", "ray", "ray://head:10001", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "tok"}),
        ("tok@head:6379", "ray", "head:6379", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "tok"}),
        ("head:6379", "ray", "head:6379", {}),
        ("auto", "ray", "auto", {}),
        ("https://ml.example/a@b", "mlflow", "https://ml.example/a@b", {}),
        ("", "mlflow", "", {}),
    ],
)
def test_user_info_becomes_variables(address, service, bare, variables):
    assert split_address(address, service) == (bare, variables)


@pytest.mark.parametrize("address", ["http://me:hush@[::1:5000", "https://ml:99999", "hush@head:port"])
def test_malformed_addresses_are_refused_without_their_user_info(address):
    with pytest.raises(ConfigError, match=r"is not an address of MLflow: .*Write HOST:PORT") as refused:
        split_address(address, "mlflow")
    assert "hush" not in str(refused.value)


def test_user_info_is_masked_in_any_text():
    text = "no answer from 'https://me:hush@ml.example/x' or sftp://me:hush@b, see https://ok.example/a@b"
    assert redact(text) == "no answer from 'https://***@ml.example/x' or sftp://***@b, see https://ok.example/a@b"


def test_arguments_lose_user_info_whatever_form_the_override_has():
    arguments = ["train", "tracking.uri=https://me:hush@ml", "++cluster.address='tok@head:1'", "name=a@b"]
    cleaned, variables = clean_arguments(arguments)
    assert cleaned == ["train", "tracking.uri=https://ml", "++cluster.address='head:1'", "name=a@b"]
    assert variables["MLFLOW_TRACKING_PASSWORD"] == "hush"
    assert variables["RAY_AUTH_TOKEN"] == "tok"
    assert clean_arguments(["train", "tracking.uri=https://ml"]) == (["train", "tracking.uri=https://ml"], {})


def test_a_command_with_a_secret_starts_anew_without_it(monkeypatch):
    started = []
    monkeypatch.setattr("os.execve", lambda *call: started.append(call))
    monkeypatch.setattr(sys, "argv", ["/bin/ddpm", "train", "tracking.uri=https://me:hush@ml"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "/bin/ddpm", *sys.argv[1:]])
    app.hide_secrets()
    [(program, arguments, environment)] = started
    assert program == sys.executable
    assert arguments == ["python", "-u", "/bin/ddpm", "train", "tracking.uri=https://ml"]
    assert environment["MLFLOW_TRACKING_PASSWORD"] == "hush"
    monkeypatch.setattr(sys, "argv", ["/bin/ddpm", "train", "tracking.uri=https://ml"])
    app.hide_secrets()
    assert len(started) == 1


def test_the_configuration_and_its_identity_hold_no_secret():
    secret = compose(["tracking.uri='https://me:hush@ml'", "storage.endpoint_url='http://k:hush@s3'"])
    config, variables = without_secrets(secret)
    assert "hush" not in config.model_dump_json()
    assert variables["MLFLOW_TRACKING_PASSWORD"] == variables["AWS_SECRET_ACCESS_KEY"] == "hush"


def test_a_password_that_no_variable_can_hold_is_refused_and_not_shown():
    config = compose(["storage=file", "storage.root=sftp://me:hush@host/x"])
    with pytest.raises(ConfigError, match=r"storage\.root = sftp://\*\*\*@host/x has a password"):
        without_secrets(config)


def test_workers_get_the_path_of_a_file_that_the_user_alone_can_read(tmp_path):
    environ = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "hu%sh"}
    environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hush"}
    named = hand_over(environ, tmp_path / "home", ["mlflow", "s3"])
    assert set(named) == {MLFLOW_FILE, AWS_FILE}
    paths = [tmp_path / "home" / name for name in named.values()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    assert "hush" not in "".join(named.values())
    assert read_mlflow_file(paths[0]) == {k: v for k, v in environ.items() if k.startswith("MLFLOW")}
    assert "aws_secret_access_key = hush" in paths[1].read_text()
    assert hand_over({**environ, **named}, tmp_path, ["mlflow", "s3"]) == {}  # what is named already stays
    assert hand_over({}, tmp_path, ["mlflow", "s3"]) == hand_over(environ, tmp_path, []) == {}


def test_where_the_folder_cannot_be_written_the_file_is_below_tmpdir(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    named = hand_over({"MLFLOW_TRACKING_TOKEN": "hush"}, Path("/proc/none"), ["mlflow"])
    path = Path(named[MLFLOW_FILE])
    assert path.is_relative_to(tmp_path)
    assert [stat.S_IMODE(place.stat().st_mode) for place in (path, path.parent)] == [0o600, 0o700]
    assert read_mlflow_file(path) == {"MLFLOW_TRACKING_TOKEN": "hush"}


def test_a_process_authenticates_by_the_file_that_it_is_given(tmp_path, monkeypatch):
    file = tmp_path / "credentials"
    file.write_text("[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = hush\n")
    monkeypatch.setenv(MLFLOW_FILE, str(file))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "other")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    client.authenticate()
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == (
        "me",
        "hush",
    )
    assert client.environment() == {MLFLOW_FILE: str(file)}
    monkeypatch.setenv(MLFLOW_FILE, str(tmp_path / "of another node"))
    client.authenticate()
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"


def test_connecting_cleans_this_process_and_names_the_files(tmp_path, monkeypatch):
    for name in (MLFLOW_FILE, AWS_FILE, "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    for name, value in (("MLFLOW_TRACKING_URI", "http://me:hush@ml"), ("RAY_ADDRESS", "head:6379")):
        monkeypatch.setenv(name, value)
    config = compose(["storage=file", "storage.root=file:///x"])
    connected = connect(config, os.environ, ["s3", "mlflow", "ray"], home=tmp_path)
    assert connected.tracking.uri == os.environ["MLFLOW_TRACKING_URI"] == "http://ml"
    assert "hush" not in connected.model_dump_json()
    assert read_mlflow_file(tmp_path / os.environ[MLFLOW_FILE])["MLFLOW_TRACKING_PASSWORD"] == "hush"


def test_the_environment_is_cleaned_of_every_address():
    environ = {"MLFLOW_TRACKING_URI": "http://me:hush@ml", "AWS_ENDPOINT_URL": "http://k:hush@s3"}
    assert "hush" not in " ".join(v for k, v in clean_environment(environ).items() if k in environ)
    assert clean_environment({"MLFLOW_TRACKING_URI": "http://ml"}) == {}
