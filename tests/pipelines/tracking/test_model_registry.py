"""The registry while MLflow is away for a moment."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, TEMPORARILY_UNAVAILABLE
from tenacity import wait_none

from pipelines.tracking import Tracker, client, model_registry, set_alias, version


@dataclass
class Registry:
    """MLflow's client; every other call fails, and what it was to do is done all the same."""

    calls: int = 0
    versions: list[SimpleNamespace] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)

    def create_registered_model(self, name):
        pass

    def search_model_versions(self, query):
        return list(self.versions)

    def create_model_version(self, name, source, *, run_id, model_id, tags):
        made = SimpleNamespace(
            name=name, version=len(self.versions) + 1, source=source, run_id=run_id, tags=tags, aliases=()
        )
        self.versions.append(made)
        return self._answered(made)

    def set_registered_model_alias(self, name, alias, number):
        self.aliases[alias] = number
        self._answered(None)

    def get_model_version(self, name, number):
        found = [v for v in self.versions if str(v.version) == number]
        self._answered(None)
        if not found:
            raise MlflowException("none", error_code=RESOURCE_DOES_NOT_EXIST)
        return found[0]

    def _answered(self, answer):
        self.calls += 1
        if self.calls % 2:
            raise MlflowException("restarting", error_code=TEMPORARILY_UNAVAILABLE)
        return answer


@pytest.fixture
def registry(monkeypatch):
    made = Registry()
    monkeypatch.setattr(client, "client", lambda uri: made)
    monkeypatch.setattr("pipelines.storage.retry.BACKOFF", wait_none())
    return made


def test_a_version_whose_answer_was_lost_is_not_made_twice(registry):
    tracker = Tracker("http://mlflow", "run")
    made = model_registry.register(tracker, "digits", "m-1", {})
    assert (made.version, len(registry.versions)) == ("1", 1)
    assert model_registry.register(tracker, "digits", "m-2", {}).version == "2"  # another model is another version


def test_a_version_that_a_slow_server_has_made_twice_is_there_once_and_others_stay(registry, monkeypatch):
    by_hand = [SimpleNamespace(version=n, source="models:/m-1", run_id="run", tags={}, aliases=()) for n in (1, 2)]
    create, deleted = registry.create_model_version, []

    def twice(name, source, **given):
        with suppress(MlflowException):
            create(name, source, **given)
        return create(name, source, **given)

    monkeypatch.setattr(registry, "create_model_version", twice)
    registry.delete_model_version = lambda name, number: deleted.append(number)
    tracker = Tracker("http://mlflow", "run")
    assert model_registry.register(tracker, "digits", "m-1", {}).version == "1"
    assert deleted == [2]

    registry.versions[:], deleted[:] = by_hand, []  # somebody has registered it again, on purpose
    assert model_registry.register(tracker, "digits", "m-1", {}).version == "1"
    assert deleted == []


def test_reading_a_version_and_moving_an_alias_wait_for_a_server_that_restarts(registry):
    registry.versions.append(
        SimpleNamespace(name="digits", version=1, source="models:/m", run_id="run", tags={}, aliases=())
    )
    found = version("http://mlflow", "digits", number="1")
    assert found is not None
    assert found.uri == "models:/digits/1"
    assert version("http://mlflow", "digits", number="7") is None
    set_alias("http://mlflow", "digits", "champion", "1")
    assert registry.aliases == {"champion": "1"}
