"""A folder of pictures and a budget are enough: the plan, its run, and the same command again."""

from __future__ import annotations

import json

import pytest
from mlflow import MlflowClient

from tests.integration.conftest import Shell
from tests.pipelines.plan.test_look import drawn
from tests.pipelines.shards.ingest.sources import write_files

pytestmark = pytest.mark.integration

# The time of the training is set by hand, because the plan would give it more than this test may take.
SHORT = ["budget=4m", "training_s=10", "batch_size=64", "evaluation.n=48", "evaluation.seeds=1", "sampler.steps=4"]


def test_a_folder_and_a_budget_give_a_registered_model_and_the_same_command_goes_on(
    shell: Shell, local_stack, tmp_path
):
    shapes = ("circle", "square")
    files = {
        f"{shape}/{i:03d}.png": drawn(shape, 1_000 * s + i, (32, 32))
        for s, shape in enumerate(shapes)
        for i in range(60)
    }
    source = str(write_files(tmp_path / "figures", files))
    small = ["data.image_size=8", "model.channels=[32]", "model.attention=[false]", "model.layers_per_block=1"]
    done = shell.ok("flow", source, *SHORT, *small, "--json")
    answer = done.answer
    assert "plan  conditions: 2 classes (the folders or labels of the images)" in done.err
    assert "plan  network: " in done.err
    assert "memorises them" in done.err
    assert answer["skipped"] == []
    assert answer["model"] == "models:/figures/1"
    assert answer["plan"]["images"] >= 64
    assert set(answer["plan"]["seconds"]) >= {"ingest", "train", "evaluator", "scores", "register"}
    assert answer["more"]

    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    path = client.download_artifacts(answer["run_id"], "config.json", str(tmp_path))
    with open(path) as file:
        config = json.load(file)
    last = client.get_metric_history(answer["run_id"], "train/length")[-1]
    assert last.value == last.step  # it ended where it said that it would
    assert f"this training saw {last.step:,} images" in answer["more"]
    assert config["training_s"] == 10
    assert (config["name"], config["registry"]["model"]) == ("figures-4m", "figures")
    assert (config["objective"]["prediction"], config["data"]["num_classes"], config["data"]["channels"]) == ("v", 2, 3)
    assert config["evaluation"]["evaluator_passes"] >= 1

    again = shell.ok("flow", source, *SHORT, *small, "--json")
    gate = ["gate"] if answer["gate"]["passed"] else []
    assert again.answer["skipped"] == ["ingest", "train", "evaluator", "evaluate", "register", *gate]
    assert again.answer["model"] == answer["model"]
    assert "resuming run figures-4m with its saved plan" in again.err
