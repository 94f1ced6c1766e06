"""What tests of the pipelines share."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import botocore.loaders
import pytest
from tenacity import wait_fixed

from pipelines.storage import retry


@pytest.fixture(scope="session", autouse=True)
def _services_are_described_once() -> Iterator[None]:
    """botocore parses what it knows of S3 again for every client, which takes longer than most of the tests of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.loaders, "create_loader", functools.cache(botocore.loaders.create_loader))
        yield


@pytest.fixture(autouse=True)
def _brief_back_off(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test whose service is away for a while waits for its next try no longer than it has to."""
    if not any(request.node.get_closest_marker(mark) for mark in ("integration", "chaos")):
        monkeypatch.setattr(retry, "BACKOFF", wait_fixed(0.02))


@pytest.fixture
def no_pauses_of_boto(monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 tries again as often as ever, and waits for nothing in between."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.0)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
