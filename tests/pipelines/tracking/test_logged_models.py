"""The logged models of checkpoints, as MLflow answers on a database of a test's own."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from pipelines import tracking
from pipelines.tracking import Pyfunc, Tracker, TrackingError, UnreachableError
from pipelines.tracking.client import client as client_of

SCORES = {"eval/frechet_distance": 12.5, "eval/class_accuracy": 0.9}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    folder: Path = tmp_path_factory.mktemp("mlflow")
    made = client_of(f"sqlite:///{folder}/mlflow.db")
    made.create_experiment("one", artifact_location="file:///nowhere")
    yield made
    client_of.cache_clear()


@pytest.fixture
def tracker(client: MlflowClient) -> Tracker:
    experiment = client.get_experiment_by_name("one").experiment_id
    return Tracker(client.tracking_uri, client.create_run(experiment).info.run_id, patience_s=0)


def test_a_checkpoint_is_one_logged_model_of_its_run_wherever_its_making_was_interrupted(client, tracker, monkeypatch):
    client = client_of(tracker.uri)

    def interrupted(*arguments, **named):
        raise MlflowException("gone")

    for step in ("finalize_logged_model", "log_outputs"):
        with monkeypatch.context() as patch:
            patch.setattr(client, step, interrupted)
            with pytest.raises(UnreachableError):
                tracking.enter_checkpoint_model(tracker, 640, {"ddpm.uri": "file:///a"})
    made = tracking.enter_checkpoint_model(tracker, 640, {"ddpm.uri": "file:///b"})
    again = tracking.enter_checkpoint_model(tracker, 640, {"ddpm.uri": "file:///b"})
    other = tracking.enter_checkpoint_model(tracker, 1280, {})
    assert made == again
    found = tracking.checkpoint_models(tracker)
    assert {images: model.model_id for images, model in found.items()} == {640: made.model_id, 1280: other.model_id}
    assert found[640].tags["ddpm.uri"] == "file:///b"
    outputs = client.get_run(tracker.run_id).outputs.model_outputs
    assert sorted((output.model_id, output.step) for output in outputs) == sorted(
        [(made.model_id, 640), (other.model_id, 1280)]
    )
    stored = client.get_logged_model(made.model_id)
    assert (str(stored.status), stored.source_run_id) == ("READY", tracker.run_id)


def test_scores_are_on_the_run_and_on_the_logged_model_once_however_often_they_are_sent(client, tracker):
    model = tracking.enter_checkpoint_model(tracker, 640, {})
    for _ in range(2):
        tracking.log_scores(tracker, model, SCORES, ("digits", "ab" * 32), at_ms=1_000)
    metrics = client.get_logged_model(model.model_id).metrics
    assert {m.key: (m.value, m.step, m.dataset_name, m.dataset_digest) for m in metrics} == {
        key: (value, 640, "digits", "ab" * 18) for key, value in SCORES.items()
    }
    assert tracker.metric("eval/frechet_distance") == [(640, 12.5)]


def test_tags_are_added_to_those_that_are_there(tracker):
    model = tracking.enter_checkpoint_model(tracker, 640, {"ddpm.uri": "file:///a"})
    tagged = tracking.tag_checkpoint_model(tracker, model, {"ddpm.evaluation": "scored"})
    stored = tracking.checkpoint_models(tracker)[640]
    assert {"ddpm.uri": "file:///a", "ddpm.evaluation": "scored"}.items() <= stored.tags.items()
    assert tagged.tags.items() <= stored.tags.items()


def test_the_runs_that_were_started_from_a_run_name_their_starting_points(client, tracker):
    experiment = client.get_experiment_by_name("one").experiment_id
    for reference in (f"runs:/{tracker.run_id}/640", "runs:/abc"):
        run = client.create_run(experiment, tags={"ddpm.run": "fine"}).info.run_id
        client.log_param(run, "init_from", reference)
    assert tracking.starting_points(tracker.uri, tracker.run_id) == [f"runs:/{tracker.run_id}/640"]


def test_what_was_stored_for_a_version_that_was_never_made_is_deleted_and_nothing_else(client, tracker, monkeypatch):
    client, experiment = client_of(tracker.uri), client.get_run(tracker.run_id).info.experiment_id
    other = client.create_run(experiment).info.run_id

    def log_model(*, name: str, step: int, source_run_id: str = tracker.run_id, **arguments: object) -> SimpleNamespace:
        return client.create_logged_model(experiment, name=name, source_run_id=source_run_id)

    monkeypatch.setattr(importlib.import_module("mlflow.pyfunc"), "log_model", log_model)
    monkeypatch.setattr(Pyfunc, "arguments", lambda self: {})
    pyfunc = Pyfunc({}, Path(), (), (), {}, None, {})
    kept = {tracking.enter_checkpoint_model(tracker, 640, {}).model_id}
    first = tracking.log_pyfunc(tracker, pyfunc, 640)
    assert tracking.register(tracker, "deleted", first, {}).version == "1"
    foreign = log_model(name="model", step=640, source_run_id=other).model_id
    killed = tracking.log_pyfunc(tracker, pyfunc, 640)
    last = tracking.log_pyfunc(tracker, pyfunc, 640)
    tracking.register(tracker, "deleted", last, {})
    assert len({first, killed, last, foreign}) == 4
    there = {model.model_id for model in client.search_logged_models([experiment])}
    assert there >= kept | {first, last, foreign}
    assert killed not in there


@pytest.mark.parametrize("status", ["RUNNING", "KILLED", "FINISHED"])
def test_a_run_has_the_status_afterwards_that_it_had_before_a_version_was_made_of_it(
    client, tracker, monkeypatch, status
):
    failing: list[BaseException] = []

    def log_model(**arguments: object) -> SimpleNamespace:
        for error in failing:
            raise error
        return SimpleNamespace(model_id="m")

    monkeypatch.setattr(importlib.import_module("mlflow.pyfunc"), "log_model", log_model)
    monkeypatch.setattr(Pyfunc, "arguments", lambda self: {})
    pyfunc = Pyfunc({}, Path(), (), (), {}, None, {})
    tracker.status(status)
    assert tracking.log_pyfunc(tracker, pyfunc, 640) == "m"
    assert client.get_run(tracker.run_id).info.status == status
    for error in (MlflowException("too large", error_code=INVALID_PARAMETER_VALUE), KeyboardInterrupt()):
        failing[:] = [error]
        with pytest.raises((TrackingError, KeyboardInterrupt)):
            tracking.log_pyfunc(tracker, pyfunc, 640)
        assert client.get_run(tracker.run_id).info.status == status
