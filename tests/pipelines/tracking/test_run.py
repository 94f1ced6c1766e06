"""Runs and experiments, as MLflow keeps them in a database of a test's own; addresses of its pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.tracking import links, open_run
from pipelines.tracking.client import client as client_of


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("mlflow")
    yield f"sqlite:///{folder}/mlflow.db"
    client_of.cache_clear()


def kind_of(uri, experiment):
    return MlflowClient(uri, uri).get_experiment_by_name(experiment).tags.get("mlflow.experimentKind")


@pytest.mark.parametrize("before", [None, "no_inferred_type", "genai_development_inferred"])
def test_an_experiment_that_has_no_kind_of_its_own_becomes_one_of_training_runs(uri, before):
    tags = {} if before is None else {"mlflow.experimentKind": before}
    MlflowClient(uri, uri).create_experiment(f"earlier {before}", artifact_location="file:///nowhere", tags=tags)
    open_run(uri, f"earlier {before}", "a", {})
    assert kind_of(uri, f"earlier {before}") == "custom_model_development"


def test_the_kind_that_somebody_has_chosen_for_an_experiment_stays(uri):
    tags = {"mlflow.experimentKind": "genai_development"}
    MlflowClient(uri, uri).create_experiment("chosen", artifact_location="file:///nowhere", tags=tags)
    open_run(uri, "chosen", "a", {})
    assert kind_of(uri, "chosen") == "genai_development"


def test_a_new_experiment_is_one_of_training_runs_and_the_address_of_a_run_opens_that_view(uri):
    tracker, existed = open_run(uri, "new", "a", {})
    assert (existed, kind_of(uri, "new")) == (False, "custom_model_development")
    page, _, query = tracker.url.removeprefix(f"{uri}/#").partition("?")
    experiment_id = MlflowClient(uri, uri).get_experiment_by_name("new").experiment_id
    assert page == f"/experiments/{experiment_id}/runs/{tracker.run_id}"
    assert query == "workflowType=machine_learning"


def test_names_in_addresses_are_quoted():
    assert links.version_page("a/b c", "3") == "#/models/a%2Fb%20c/versions/3?workflowType=machine_learning"
    assert links.run_page("1", "r", "artifacts/a b.html").startswith("#/experiments/1/runs/r/artifacts/a%20b.html?")
    assert links.artifact("r", "images/a+step+1.png") == "get-artifact?run_uuid=r&path=images/a%2Bstep%2B1.png"
