"""A proxy in the environment does not stand between this machine and its own services."""

from __future__ import annotations

import os

import pytest
import ray
import requests

from pipelines.config import compose
from pipelines.environment.loopback import bypass_proxies, is_loopback
from pipelines.stack import services
from pipelines.tracking import Tracker, UnreachableError
from pipelines.tracking.client import client
from pipelines.training import resources
from tests.http_server import Answer, Server, serving

NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")


@pytest.fixture(autouse=True)
def _behind_a_proxy(monkeypatch):
    """Every proxy is a closed port; what the code adds to the environment is taken back."""
    for name in NAMES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client.cache_clear()


@pytest.fixture
def server():
    body = b'{"run": {"info": {"run_id": "r", "run_uuid": "r", "status": "RUNNING"}, "data": {}}}'
    with serving(lambda request: Answer(200, body, {"Content-Type": "application/json"})) as found:
        yield found


def test_mlflow_on_this_machine_is_reached_past_the_proxy(server: Server):
    with pytest.raises(requests.exceptions.ProxyError):
        requests.get(server.url, timeout=5)
    assert Tracker(server.url, "r", patience_s=0).last_steps() == {}
    with pytest.raises(UnreachableError, match=r"(?i)proxy"):  # others go through it
        Tracker("http://192.0.2.1", "r", patience_s=0).last_steps()


def test_the_probes_of_the_local_stack_go_past_the_proxy(server: Server, tmp_path):
    assert services._url_answers(server.url, tmp_path, 5)


def test_ray_is_reached_past_the_proxy(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: None)
    resources.connect_ray(compose(["cluster.address=127.0.0.1:6379"]))
    assert "127.0.0.1" in os.environ["NO_PROXY"].split(",")


def test_what_the_environment_names_already_stays(monkeypatch):
    monkeypatch.setenv("no_proxy", "internal.example, 10.0.0.0/8")
    bypass_proxies("http://elsewhere.example")
    assert os.environ["no_proxy"] == "internal.example, 10.0.0.0/8"
    for _ in range(2):
        bypass_proxies("http://127.0.0.2:8333")
    assert os.environ["no_proxy"] == "internal.example,10.0.0.0/8,localhost,127.0.0.1,::1,127.0.0.2"
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"]
    monkeypatch.setenv("no_proxy", "*")
    bypass_proxies("http://localhost")
    assert os.environ["no_proxy"] == "*"


@pytest.mark.parametrize("url", ["http://localhost:1", "https://127.0.0.53", "http://[::1]:5000", "127.0.0.1:6379"])
def test_loopback_is_known_by_name_and_number(url):
    assert is_loopback(url)


@pytest.mark.parametrize("url", ["http://10.0.0.1", "http://localhost.example", "ray://head:10001", "auto"])
def test_other_hosts_are_not_loopback(url):
    assert not is_loopback(url)
