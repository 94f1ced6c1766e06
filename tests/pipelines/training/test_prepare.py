"""Everything that is checked, and recorded, before a training starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ddpm.model import load_model
from ddpm.tensor_files import tensors_digest
from pipelines import tracking
from pipelines.checkpoints import ModelError, run_folder
from pipelines.config import ConfigError
from pipelines.environment.limits import NodeLimits
from pipelines.shards.index import DatasetError
from pipelines.storage import Storage
from pipelines.tracking import TrackingError, client
from pipelines.training import prepare, resources
from pipelines.training.errors import TrainingError
from pipelines.training.prepare import initial_lineage, prepare_run
from pipelines.training.run_id import open_training_run, read_run_id
from tests.pipelines.training.loop.ranks import last_checkpoint, tiny_config, train_here


def test_the_lineage_names_the_weights_that_a_run_started_from_and_keeps_them_when_it_goes_on(digits, tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    assert initial_lineage(tiny_config(base, 50, 25), new=True) == {"first_weights": 1}
    train_here(base, digits, tiny_config(base, 50, 25), lineage={"run_id": "0abc"})
    model = last_checkpoint(base)
    config = tiny_config(tuned, 50, 25, f"init_from={model}")
    expected = {"init_from": str(model), "init_from_digest": tensors_digest(load_model(model).network.state_dict())}
    expected["init_from_origins"] = "runs:/0abc/50"
    found = initial_lineage(config, new=True)
    assert found == expected
    train_here(tuned, digits, config, lineage={**found, "run_id": "0def"})
    student = tiny_config(tmp_path / "student", 50, 25, f"init_from={last_checkpoint(tuned)}")
    assert initial_lineage(student, new=True)["init_from_origins"] == "runs:/0def/50 runs:/0abc/50"
    shutil.rmtree(base)
    assert initial_lineage(config, new=False) == expected
    with pytest.raises(ModelError, match="names no model"):
        initial_lineage(config, new=True)


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    client.client(uri).create_experiment("ddpm", artifact_location=f"file://{folder}/artifacts")
    return uri


@pytest.fixture
def run(tmp_path, digits, mlflow, monkeypatch):
    """The configuration of a new run on a Ray cluster of one node with two CPUs, which nobody has to connect to."""
    monkeypatch.setattr(prepare, "connect_ray", lambda config: None)
    monkeypatch.setattr(resources, "alive_nodes", lambda: [{"CPU": 2.0}])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def configure(*overrides):
        (tmp_path / "root").mkdir(exist_ok=True)
        plain = [f"name={tmp_path.name}", f"tracking.uri={mlflow}", f"data.uri={digits.uri}", "cluster.patience_s=0.1"]
        return tiny_config(tmp_path / "root", 50, 25, *plain, *overrides)

    return configure


def left_of(config):
    """Return what is there of a run: its MLflow run, and the id in its folder."""
    tracker = tracking.find_run(config.tracking.uri, config.tracking.experiment, config.name)
    return tracker, read_run_id(Storage.of(config), run_folder(config))


def test_a_run_that_the_cluster_can_hold_is_opened(run):
    prepared = prepare_run(run(), {})
    tracker, own = left_of(prepared.job.config)
    assert tracker is not None
    assert (tracker.run_id, own) == (prepared.job.tracker.run_id, tracker.tag(tracking.ID_TAG))
    assert (prepared.resumes_at, prepared.length) == (0, 50)


def test_a_cluster_that_is_too_small_leaves_no_mlflow_run_behind(run):
    config = run("cluster.num_workers=3")
    with pytest.raises(TrainingError, match="too small for 3 workers"):
        prepare_run(config, {})
    assert left_of(config) == (None, None)


def test_a_training_that_memory_does_not_hold_leaves_no_mlflow_run_behind(run, monkeypatch):
    monkeypatch.setattr(resources, "limits_here", lambda: NodeLimits("here", node=2.0**20))
    config = run("cluster.num_workers=1")
    with pytest.raises(ConfigError, match="does not fit into the memory of a node of here"):
        prepare_run(config, {})
    assert left_of(config) == (None, None)


def test_a_run_that_goes_on_keeps_its_status_where_the_cluster_is_too_small(run):
    config = run("cluster.num_workers=3")
    tracker = open_training_run(config)
    tracker.status("KILLED")
    with pytest.raises(TrainingError, match="too small for 3 workers"):
        prepare_run(config, {})
    assert client.client(config.tracking.uri).get_run(tracker.run_id).info.status == "KILLED"


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        (["data.uri=file:///nowhere"], DatasetError, "no dataset at file:///nowhere"),
        (["init_from=/nowhere"], ModelError, "names no model"),
        (["tracking.uri=http://127.0.0.1:9"], TrackingError, "no answer from MLflow"),
    ],
)
def test_what_is_wrong_beside_the_cluster_is_told_before_it_is_waited_for(run, monkeypatch, overrides, error, message):
    monkeypatch.setattr(prepare, "FIRST_ANSWER_S", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = []
    with pytest.raises(error, match=message):
        prepare_run(run("cluster.num_workers=3", *overrides), {}, notice=said.append)
    assert said == []


def test_a_cluster_that_may_still_grow_is_waited_for_and_the_reason_is_told_before_the_run_is_opened(run, monkeypatch):
    config, said = run("cluster.num_workers=3", "cluster.patience_s=60"), []

    def told(text):
        said.append((text, left_of(config)[0]))
        monkeypatch.setattr(resources, "alive_nodes", lambda: [{"CPU": 4.0}])

    prepared = prepare_run(config, {}, notice=told)
    ((text, before),) = said
    assert (text.startswith("waiting up to 60 s"), before) == (True, None)
    assert left_of(config)[0].run_id == prepared.job.tracker.run_id


def test_a_run_that_has_seen_all_its_images_needs_no_cluster(run, digits):
    config = run("cluster.num_workers=3")
    train_here(Path(config.storage.root.removeprefix("file://")), digits, config)
    assert prepare_run(config, {}).complete
