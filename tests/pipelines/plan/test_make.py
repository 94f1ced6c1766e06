"""From a folder to a plan, its dataset and a training by it, without a cluster; and the same command again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipelines import tracking
from pipelines.config import from_dict
from pipelines.flow import Site
from pipelines.flow.ingest import Ingest, write_dataset
from pipelines.flow.walk import walk
from pipelines.plan import make
from pipelines.plan.facts import Mirror
from pipelines.plan.look import look
from pipelines.plan.make import find_or_make, find_plan
from pipelines.plan.services import services_config
from pipelines.presentation.progress import Silent
from pipelines.shards.index import read_dataset
from pipelines.storage import Storage
from tests.pipelines.plan.brief import measure_briefly
from tests.pipelines.plan.cases import LAPTOP
from tests.pipelines.shards.ingest.sources import picture, pictures, write_files
from tests.pipelines.training.loop.ranks import train_here

STORAGE = Storage()
SMALL = ["model.channels=[32]", "model.attention=[false]", "model.layers_per_block=1", "data.image_size=8"]
SHORT = ["images=64", "batch_size=16", "sampler.steps=2", "tracking.grid_images=4"]


@pytest.fixture
def command(tmp_path):
    """The arguments of a planned flow whose services are a folder."""
    source = str(write_files(tmp_path / "pets", pictures(30)))
    return source, ["storage=file", f"storage.root=file://{tmp_path}/root", *SMALL, *SHORT]


@pytest.fixture
def measured(monkeypatch):
    """A machine that needs no measuring, and images that nobody compares with their mirror images."""
    monkeypatch.setattr("pipelines.plan.look.tell_mirrored", lambda images, labels: Mirror(0.5, len(images)))
    monkeypatch.setattr(make, "measure", lambda *arguments, **options: LAPTOP)
    monkeypatch.setattr(make, "measure_longer", lambda *arguments, **options: LAPTOP)


def planned(source, overrides, said):
    services = services_config(overrides)
    return find_or_make(
        source, overrides, 1_800.0, services, STORAGE, lambda name, text: said.append(f"{name}: {text}")
    )


@pytest.mark.heavy
def test_a_plan_is_ingested_and_trained_by_and_the_same_command_has_it_again(command, tmp_path, monkeypatch):
    measure_briefly(monkeypatch)
    said = []
    made = planned(command[0], command[1], said)
    config = from_dict(made.config)
    assert (config.name, config.registry.model) == ("pets-30m", "pets")
    assert config.data.uri.startswith(f"file://{tmp_path}/root/datasets/pets-8px-")
    write_dataset(config, Silent())  # the stage itself would start Ray
    dataset = read_dataset(config.data.uri, STORAGE)
    assert dataset.classes == ("cat", "dog", "owl")
    _, tracker = train_here(tmp_path / "run", dataset, config.model_copy(update={"storage": config.storage}))
    assert max(tracker.points) == 64

    again = planned(command[0], command[1], said)
    assert again == made
    assert said[-1] == "plan: resuming run pets-30m with its saved plan"
    assert walk([Ingest(from_dict(again.config))], Site(STORAGE, {}, Silent())).ran == ()


def test_the_time_in_which_the_source_is_looked_at_is_part_of_the_budget(command, measured, monkeypatch):
    def slowly(*arguments, **options):
        time.sleep(0.5)
        return look(*arguments, **options)

    monkeypatch.setattr(make, "look", slowly)
    made = planned(command[0], command[1], [])
    assert made.machine.looking_s >= LAPTOP.looking_s + 0.5
    assert made.plan.seconds["look and measure"] == made.machine.looking_s


def test_time_for_the_gates_samples_is_kept_where_a_version_has_the_alias(command, measured, monkeypatch):
    source, overrides = command
    overrides = [text for text in overrides if not text.startswith("images=")]
    free = planned(source, overrides, [])
    asked = []

    def version(uri, name, *, alias):
        asked.append((uri, name, alias))
        return "1" if alias == "champion" else None

    monkeypatch.setattr(tracking, "version", version)
    served = [*overrides, "tracking.uri=http://mlflow"]
    beside = planned(source, served, [])
    alone = planned(source, [*served, "registry.alias=staging"], [])
    assert asked == [("http://mlflow", "pets", "champion"), ("http://mlflow", "pets", "staging")]
    assert free.plan.seconds["scores"] == alone.plan.seconds["scores"]
    assert beside.plan.seconds["scores"] > free.plan.seconds["scores"]
    assert beside.config["evaluation"]["n"] == free.config["evaluation"]["n"]


def test_another_source_or_setting_of_the_same_name_has_a_run_of_its_own(command, measured):
    source, overrides = command
    said = []
    first = planned(source, overrides, said)
    changed = planned(source, [*overrides, "optim.lr=0.5"], said)
    assert (first.config["name"], changed.config["name"]) == ("pets-30m", "pets-30m-2")
    assert said[-1] == "plan: the run is named pets-30m-2, because another command has a run pets-30m"
    assert changed.plan.settings["name"] == "pets-30m-2"
    write_files(Path(source), {"cat/99.png": picture(99)})
    grown = planned(source, overrides, said)
    assert grown.config["name"] == "pets-30m-3"
    named = planned(source, [*overrides, "name=mine"], said)
    assert named.config["name"] == "mine"


def test_a_relative_source_is_the_folder_that_it_names_and_not_the_text(command, measured, tmp_path, monkeypatch):
    source, overrides = command
    write_files(tmp_path / "elsewhere" / "pets", pictures(30))
    said = []
    monkeypatch.chdir(tmp_path)
    here = planned("pets", overrides, said)
    assert said[0].startswith("look: pets: ")
    assert from_dict(here.config).data.source == source
    assert planned(f"{source}/", overrides, said) == here
    monkeypatch.chdir(source)
    assert planned(".", overrides, said) == here
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_plan("pets", overrides, 1_800.0, services_config(overrides), STORAGE) is None
    there = planned("pets", overrides, said)
    assert there.config["data"]["uri"] != here.config["data"]["uri"]
    assert find_plan("./pets", overrides, 1_800.0, services_config(overrides), STORAGE) == there


def test_folders_of_the_same_name_have_models_of_their_own_and_runs_of_one_folder_share_theirs(
    command, measured, tmp_path
):
    source, overrides = command
    other = str(write_files(tmp_path / "shelter" / "pets", pictures(30)))
    said = []
    assert planned(source, overrides, said).config["registry"]["model"] == "pets"
    made = planned(other, overrides, said)
    assert (made.config["name"], made.config["registry"]["model"]) == ("pets-30m-2", "pets-2")
    assert made.plan.lines[-1].value == "run pets-30m-2, model pets-2"
    assert "the model is named pets-2, because pets is of another source: registry.model=pets " in said[-1]
    again = [planned(folder, [*overrides, "optim.lr=0.5"], said) for folder in (source, other)]
    assert [plan.config["registry"]["model"] for plan in again] == ["pets", "pets-2"]
    by_hand = planned(other, [*overrides, "registry.model=pets"], said)
    assert by_hand.config["registry"]["model"] == "pets"
    assert find_plan(other, overrides, 1_800.0, services_config(overrides), STORAGE) == made
