from pathlib import Path

import pytest

from pipelines.config import ConfigError, compose
from pipelines.stack import SERVICES, StackError, StackState
from pipelines.stack.connect import connect, connect_running, fill, find_running, missing_services, without_secrets

STACK = StackState(
    Path("/h"), "ddpm", "http://127.0.0.1:1", Path("/h/credentials"), "http://127.0.0.1:2", "127.0.0.1:3", "http://d"
)


def test_the_local_stack_is_the_last_resort():
    assert missing_services(compose(), {}, SERVICES) == ["s3", "mlflow", "ray"]
    filled = fill(compose(), {}, STACK)
    assert filled.storage.endpoint_url == "http://127.0.0.1:1"
    assert filled.storage.credentials_file == "/h/credentials"
    assert (filled.tracking.uri, filled.cluster.address) == ("http://127.0.0.1:2", "127.0.0.1:3")


def test_the_environment_beats_the_local_stack():
    environ = {"AWS_ENDPOINT_URL": "http://s3", "MLFLOW_TRACKING_URI": "http://ml", "RAY_ADDRESS": "ray:6379"}
    assert missing_services(compose(), environ, SERVICES) == []
    filled = fill(compose(), environ, STACK)
    assert filled.storage.endpoint_url is None  # left to the environment, which `Storage.of` reads
    assert (filled.tracking.uri, filled.cluster.address) == ("http://ml", "ray:6379")


def test_explicit_configuration_beats_the_environment():
    explicit = compose(["tracking.uri=http://mine", "cluster.address=mine:1", "storage.endpoint_url=http://mine"])
    environ = {"AWS_ENDPOINT_URL": "http://s3", "MLFLOW_TRACKING_URI": "http://ml", "RAY_ADDRESS": "ray:6379"}
    assert missing_services(explicit, environ, SERVICES) == []
    filled = fill(explicit, environ, STACK)
    assert (filled.tracking.uri, filled.cluster.address) == ("http://mine", "mine:1")
    assert filled.storage.endpoint_url == "http://mine"


def test_s3_and_folders_elsewhere_do_not_start_the_local_s3():
    assert missing_services(compose(["storage=s3", "storage.root=s3://b"]), {}, ["s3"]) == []
    assert missing_services(compose(["storage=file", "storage.root=file:///x"]), {}, ["s3"]) == []


def test_the_local_stack_has_one_bucket():
    with pytest.raises(ConfigError, match="the local stack has the bucket ddpm"):
        fill(compose(["storage.root=s3://ddpm2"]), {}, STACK)
    assert fill(compose(["storage.root=s3://ddpm/team"]), {}, STACK).storage.endpoint_url == "http://127.0.0.1:1"


def test_the_local_stack_gives_only_addresses_of_services_that_were_asked_for():
    filled = fill(compose(), {}, STACK, ["s3"])
    assert filled.storage.endpoint_url == "http://127.0.0.1:1"
    assert (filled.tracking.uri, filled.cluster.address) == (None, None)
    assert fill(compose(["cluster.address=mine:1"]), {}, STACK, []).cluster.address == "mine:1"


@pytest.mark.parametrize("connecting", [connect, connect_running, find_running])
@pytest.mark.parametrize("setting", ["storage.root", "data.uri"])
def test_a_place_that_cannot_be_is_a_configuration_error_before_a_service_is_looked_for(connecting, setting, tmp_path):
    config = compose(["storage=file", "storage.root=file:///x", f"{setting}=gopher://x"])
    message = rf"{setting} = gopher://x: addresses are s3://BUCKET/KEY or file:///PATH"
    with pytest.raises(ConfigError, match=message):
        connecting(config, {}, ["s3", "mlflow", "ray"], home=tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_the_address_of_a_source_that_cannot_be_is_named_with_the_source(tmp_path):
    sources = "data.sources=[{name:a,uri:file:///a},{name:b,uri:gopher://x}]"
    config = compose(["storage=file", "storage.root=file:///x", sources])
    with pytest.raises(ConfigError, match=r"data\.sources: uri of 'b' = gopher://x: addresses are s3://BUCKET/KEY"):
        connect(config, {}, ["s3"], home=tmp_path / "home")
    secret = compose([sources.replace("gopher://x", "sftp://me:hush@host/x")])
    with pytest.raises(ConfigError, match=r"data\.sources: uri of 'b' = .* has a password in it") as refused:
        without_secrets(secret)
    assert "hush" not in str(refused.value)


def test_a_model_folder_is_named_by_its_path_because_workers_run_in_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guided = ["guidance.kind=auto", "guidance.weak=models/weak"]
    filled = fill(compose(["init_from=teacher", *guided]), {}, None)
    assert (filled.init_from, filled.guidance.weak) == (f"{tmp_path}/teacher", f"{tmp_path}/models/weak")
    for reference in ("runs:/abc/best", "models:/digits@champion", "file:///models/a", "/models/a"):
        assert fill(compose([f"init_from={reference}"]), {}, None).init_from == reference
    assert fill(compose(), {}, None).init_from is None


def test_a_verb_that_only_looks_starts_nothing_and_says_what_is_not_running(tmp_path):
    home = tmp_path / "home"
    with pytest.raises(StackError, match=r"S3 and MLflow of the local stack are not running.*`ddpm up`.*tracking"):
        find_running(compose(), {}, ["s3", "mlflow"], home=home)
    with pytest.raises(StackError, match="S3 of the local stack is not running"):
        find_running(compose(), {"MLFLOW_TRACKING_URI": "http://ml"}, ["s3", "mlflow"], home=home)
    assert not home.exists()


def test_a_verb_that_only_looks_does_without_services_that_are_optional(tmp_path):
    elsewhere = compose(["storage=file", "storage.root=file:///x"])
    found = find_running(elsewhere, {}, ["s3"], optional=["mlflow", "ray"], home=tmp_path)
    assert (found.tracking.uri, found.cluster.address) == (None, None)
