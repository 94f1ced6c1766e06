"""A run is known by its id: in whatever root it lies now, and whoever else has its name."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import tracking
from pipelines.checkpoints import Listed, checkpoint_name, enter_checkpoint, run_folder, save_checkpoint
from pipelines.config import Config, compose
from pipelines.storage import Storage, join, layout
from pipelines.tracking import ID_TAG, Tracker, client
from pipelines.training.errors import TrainingError
from pipelines.training.run_id import find_training_run, open_training_run, read_run_id
from tests.pipelines.checkpoints.tiny import a_checkpoint

STORAGE = Storage()


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    client.client(uri).create_experiment("ddpm", artifact_location=f"file://{folder}/artifacts")
    return uri


@pytest.fixture
def config(tmp_path: Path, mlflow: str) -> Config:
    return compose(
        ["+experiment=digits", f"name={tmp_path.name}", f"tracking.uri={mlflow}", "storage=file", at(tmp_path)]
    )


def at(folder: Path) -> str:
    return f"storage.root=file://{folder}/root"


def elsewhere(config: Config, root: str) -> Config:
    return config.model_copy(update={"storage": config.storage.model_copy(update={"root": root})})


def own_id(config: Config) -> str | None:
    return read_run_id(STORAGE, run_folder(config))


def store(config: Config, tracker: Tracker) -> None:
    """Store a checkpoint, which names its MLflow run, as those of earlier releases do."""
    checkpoint = a_checkpoint(64)
    lineage = {**checkpoint.spec.lineage, "run_id": tracker.run_id}
    path = Path(run_folder(config).removeprefix("file://")) / checkpoint_name(64, 1)
    path.mkdir(parents=True)
    save_checkpoint(path, replace(checkpoint, spec=replace(checkpoint.spec, lineage=lineage)))
    enter_checkpoint(STORAGE, run_folder(config), Listed(1, 64, path.name), 5)


def earlier(config: Config) -> Tracker:
    """An MLflow run as earlier releases have made them, without an id."""
    return tracking.open_run(str(config.tracking.uri), config.tracking.experiment, config.name, {})[0]


def test_a_new_run_has_an_id_in_its_folder_and_the_same_on_its_mlflow_run(config):
    assert find_training_run(config) is None
    tracker = open_training_run(config, {"ddpm.study": "s"})
    assert tracker.tag(ID_TAG) == own_id(config)
    assert tracker.tag("ddpm.study") == "s"
    assert open_training_run(config) == find_training_run(config) == tracker
    assert tracker.tag(ID_TAG) == own_id(config)


def test_every_run_has_an_id_of_its_own(config):
    other = config.model_copy(update={"name": f"{config.name}-other"})
    open_training_run(config)
    open_training_run(other)
    assert own_id(config) != own_id(other)


def test_a_run_goes_on_where_its_root_is_spelt_otherwise_or_moved(config, tmp_path):
    tracker = open_training_run(config)
    (tmp_path / "link").symlink_to(tmp_path / "root")
    for root in (f"file://{tmp_path}//root", f"file://{tmp_path}/link"):
        assert open_training_run(elsewhere(config, root)) == tracker
    shutil.move(tmp_path / "root", tmp_path / "moved")
    assert open_training_run(elsewhere(config, f"file://{tmp_path}/moved")) == tracker


def test_a_training_of_the_same_name_in_another_root_is_refused_with_what_to_set(config, tmp_path):
    tracker = open_training_run(config)
    other = elsewhere(config, f"file://{tmp_path}/other")
    for ask in (open_training_run, find_training_run):
        with pytest.raises(
            TrainingError, match=r"Set another name= or tracking.experiment=, or storage.root="
        ) as refused:
            ask(other)
        assert str(own_id(config)) in str(refused.value)
    assert own_id(other) is None  # nothing is written where it is refused
    open_training_run(other.model_copy(update={"name": f"{config.name}-2"}))
    store(other, tracker)  # its own id decides, whatever a checkpoint says
    with pytest.raises(TrainingError, match="is another one"):
        open_training_run(other)
    assert find_training_run(config) == tracker


def test_two_roots_that_began_at_the_same_moment_each_find_their_own(config, tmp_path):
    other = elsewhere(config, f"file://{tmp_path}/other")
    own = open_training_run(config)
    STORAGE.write(join(run_folder(other), layout.RUN), json.dumps({"id": "theirs"}).encode())
    mlflow = client.client(str(config.tracking.uri))
    experiment = mlflow.get_experiment_by_name("ddpm").experiment_id
    made = mlflow.create_run(experiment, tags={"ddpm.run": config.name, ID_TAG: "theirs"}).info.run_id
    assert find_training_run(config) == own
    assert find_training_run(other).run_id == made


def test_drivers_that_start_at_once_agree_on_one_id(config):
    with ThreadPoolExecutor(4) as pool:
        trackers = list(pool.map(lambda _: open_training_run(config), range(4)))
    assert {tracker.tag(ID_TAG) for tracker in trackers} == {own_id(config)}


def test_a_run_of_an_earlier_release_gets_its_id_at_the_next_start(config):
    tracker = earlier(config)
    store(config, tracker)
    assert find_training_run(config) == tracker
    assert own_id(config) is None  # looking writes nothing
    assert open_training_run(config) == tracker
    assert tracker.tag(ID_TAG) == own_id(config) is not None


def test_a_run_of_an_earlier_release_that_was_lost_before_its_first_checkpoint_gets_its_id_too(config):
    tracker = earlier(config)
    STORAGE.write(join(run_folder(config), "goodput/000001.json"), b"{}")
    assert open_training_run(config) == tracker
    assert tracker.tag(ID_TAG) == own_id(config) is not None


def test_an_id_that_was_given_and_not_tagged_any_more_is_tagged_at_the_next_start(config):
    tracker = earlier(config)
    store(config, tracker)
    STORAGE.write(join(run_folder(config), layout.RUN), json.dumps({"id": "given"}).encode())
    assert open_training_run(config) == tracker
    assert tracker.tag(ID_TAG) == "given"


def test_the_earlier_run_of_another_folder_is_refused(config):
    tracker = earlier(config)
    with pytest.raises(TrainingError, match="not recorded"):  # an empty folder: that run is stored elsewhere
        open_training_run(config)
    store(config, Tracker(tracker.uri, "another"))
    with pytest.raises(TrainingError, match="not recorded"):
        open_training_run(config)
    assert tracker.tag(ID_TAG) is None


def test_one_of_two_folders_that_shared_an_earlier_run_keeps_it(config, tmp_path):
    tracker, other = earlier(config), elsewhere(config, f"file://{tmp_path}/other")
    store(config, tracker)
    store(other, tracker)
    assert open_training_run(config) == tracker
    with pytest.raises(TrainingError, match="is another one"):
        open_training_run(other)


def test_a_run_in_the_trash_of_mlflow_is_followed_by_one_with_the_same_id(config):
    first = open_training_run(config)
    tracking.delete_run(first.uri, first.run_id)
    second = open_training_run(config)
    assert second != first
    assert second.tag(ID_TAG) == first.tag(ID_TAG) == own_id(config)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"id": '])
def test_a_damaged_id_is_named_with_what_it_should_be(config, text):
    open_training_run(config)
    STORAGE.write(join(run_folder(config), layout.RUN), text)
    with pytest.raises(TrainingError, match=r"run\.json is damaged: .*ddpm\.id"):
        open_training_run(config)
