"""The lists of runs and versions, as MLflow answers on a database of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.tracking import run_list
from pipelines.tracking.client import client as client_of


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("mlflow")
    yield f"sqlite:///{folder}/mlflow.db"
    client_of.cache_clear()


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    """With two experiments, three runs of ours of which one is deleted, one of another's, and two versions."""
    client = MlflowClient(uri, uri)
    for experiment, names in (("one", ("a", "b")), ("two", ("a",))):
        experiment_id = client.create_experiment(experiment, artifact_location="file:///nowhere")
        client.create_run(experiment_id)  # of somebody else
        for name in names:
            run_id = client.create_run(experiment_id, run_name=name, tags={"ddpm.run": name}).info.run_id
            client.log_metric(run_id, "train/loss", 0.5, step=128)
            client.log_metric(run_id, "train/loss", 0.25, step=256)
            if name == "b":
                client.set_terminated(run_id, "KILLED")
                client.delete_run(run_id)
    client.create_registered_model("digits")
    for _ in range(2):
        client.create_model_version("digits", "file:///nowhere", run_id=run_id, tags={"k": "v"})
    client.set_registered_model_alias("digits", "champion", "2")
    return client


def test_runs_of_all_experiments_are_listed_deleted_ones_included_over_all_pages(uri, client, monkeypatch):
    monkeypatch.setattr(run_list, "_PAGE", 1)
    found = {(r.experiment, r.name): r for r in tracking.list_runs(uri)}
    assert found.keys() == {("one", "a"), ("one", "b"), ("two", "a")}
    assert (found["one", "b"].deleted, found["one", "b"].status) == (True, "KILLED")
    assert (found["one", "a"].deleted, found["one", "a"].status, found["one", "a"].ended) == (False, "RUNNING", None)
    assert found["one", "a"].metrics == {"train/loss": (0.25, 256)}
    assert found["one", "a"].of("one")
    assert not found["one", "a"].of("two")
    assert not found["one", "b"].of("one")
    assert {r.experiment for r in tracking.list_runs(uri, "a")} == {"one", "two"}


def test_versions_are_listed_with_their_aliases(uri, client):
    found = {v.version: v for v in tracking.all_versions(uri)}
    assert {number: v.aliases for number, v in found.items()} == {"1": (), "2": ("champion",)}
    assert found["1"].tags == {"k": "v"}
    assert found["1"].run_id == next(r.run_id for r in tracking.list_runs(uri) if r.experiment == "two")


def test_a_run_is_deleted_or_loses_its_name_and_a_repeat_changes_nothing(uri, client):
    run = next(r for r in tracking.list_runs(uri) if r.experiment == "two")
    for _ in range(2):
        tracking.retire_run(uri, run.run_id)
    assert client.get_run(run.run_id).info.lifecycle_stage == "active"
    assert client.get_run(run.run_id).data.tags[run_list.RETIRED_TAG] == "a"
    assert run.run_id not in {r.run_id for r in tracking.list_runs(uri)}
    other = next(r for r in tracking.list_runs(uri, "a") if r.experiment == "one")
    for _ in range(2):
        tracking.delete_run(uri, other.run_id)
    assert [r.deleted for r in tracking.list_runs(uri, "a")] == [True]
