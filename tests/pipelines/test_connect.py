from pathlib import Path

import pytest

from pipelines.config import ConfigError, compose
from pipelines.connect import fill, missing_services
from pipelines.stack import SERVICES, StackState

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


def test_a_storage_that_nothing_answers_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"storage\.root = gopher://x: addresses are s3://BUCKET/KEY or file:///PATH"):
        fill(compose(["storage=file", "storage.root=gopher://x"]), {}, None)
