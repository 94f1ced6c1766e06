"""`ddpm plan` and the arguments of `ddpm flow`."""

from __future__ import annotations

import json

import pytest
import typer

from pipelines.cli import main
from pipelines.cli.common import read_arguments
from pipelines.cli.flow import _training_ends
from pipelines.config import read_config
from pipelines.plan.clock import training_ends_s
from pipelines.plan.make import compose_plan
from tests.pipelines.plan.brief import measure_briefly
from tests.pipelines.plan.cases import DIGITS, LAPTOP
from tests.pipelines.shards.ingest.sources import pictures, write_files


def test_arguments_are_a_source_a_budget_and_overrides_in_any_order():
    assert read_arguments(["photos", "budget=1h", "optim.lr=1e-3"]) == ("photos", "1h", ["optim.lr=1e-3"])
    assert read_arguments(["+experiment=digits", "~optim.decay"]) == (
        None,
        None,
        ["+experiment=digits", "~optim.decay"],
    )
    assert read_arguments(["a=b", "s3://bucket/photos"]) == ("s3://bucket/photos", None, ["a=b"])
    assert read_arguments(None) == (None, None, [])
    with pytest.raises(typer.BadParameter, match="budget=1h and budget=2h: give only one"):
        read_arguments(["budget=1h", "budget=2h"])


@pytest.mark.parametrize("verb", [["flow", "digits"], ["plan", "digits"], ["ingest", "digits", "--to", "s3://b/d"]])
def test_a_folder_that_is_called_digits_is_not_taken_for_the_dataset_of_that_name(monkeypatch, capsys, tmp_path, verb):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    monkeypatch.setattr("sys.argv", ["ddpm", *verb])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "Write ./digits for the folder" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert read_arguments(["./digits"])[0] == "./digits"


def test_a_plan_is_shown_saved_and_answered(monkeypatch, capsys, tmp_path):
    measure_briefly(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "pets", pictures(30))
    small = ["model.channels=[32]", "model.attention=[false]", "model.layers_per_block=1", "storage=file"]
    arguments = [
        "plan",
        "pets",
        "budget=1h",
        *small,
        f"storage.root=file://{tmp_path}/root",
        "tracking.uri=http://127.0.0.1:9",
    ]
    monkeypatch.setattr("sys.argv", ["ddpm", *arguments, "--save", "pets.yaml", "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert not stopped.value.code
    answer = json.loads(captured.out.splitlines()[-1])
    said = " ".join(captured.err.split())
    assert "plan conditions: 3 classes (the folders or labels of the images)" in said
    assert "plan network: model.channels=[32], " in said
    assert "memorises them" in said
    assert answer["saved"] == "pets.yaml"
    assert answer["total_s"] <= answer["budget_s"] == 3600
    config = read_config(tmp_path / "pets.yaml")
    assert (config.name, config.data.num_classes, config.images) == ("pets-1h", 3, answer["images"])
    assert not (tmp_path / "root").exists()  # nothing was started or stored


def test_a_planned_training_ends_with_its_budget_unless_its_length_is_set_by_hand():
    made = compose_plan(DIGITS, LAPTOP, 600.0, [])
    assert _training_ends(made, 100.0) == 100.0 + training_ends_s(made.plan)
    assert _training_ends(compose_plan(DIGITS, LAPTOP, 600.0, ["images=960"]), 100.0) is None
    assert _training_ends(compose_plan(DIGITS, LAPTOP, 600.0, ["training_s=60"]), 100.0) is None
    assert _training_ends(None, 100.0) is None
