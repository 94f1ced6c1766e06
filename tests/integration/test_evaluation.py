"""Scores of a model on the real services: the same from any number of actors, and nothing is made twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation.images import unpack_samples
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Entry, Storage
from tests.chaos.fault_proxy import FaultProxy
from tests.integration.conftest import Shell, one_stopped

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

MODEL = str(Path("tests/fixtures/earlier/version/model").resolve())
DATA = "s3://ddpm/datasets/scored"
SETTINGS = ["evaluation.n=180", "evaluation.seeds=1", "evaluation.batch_size=30", "evaluation.likelihood_images=2"]


def stored(s3: Storage, root: str, ending: str) -> list[Entry]:
    return [entry for entry in s3.list(f"{root}/evaluations") if entry.uri.endswith(ending)]


def recorded(s3: Storage, root: str) -> list[Entry]:
    """The rows of samples that the signed record of their evaluation names."""
    records = [json.loads(json.loads(s3.read(entry.uri))["record"]) for entry in stored(s3, root, "record.json")]
    files = [name for record in records for unit in record["units"].values() for name in unit]
    return [row for row in stored(s3, root, ".safetensors") if row.uri.rpartition("/")[2] in files]


def evaluate(root: str, actors: int) -> list[str]:
    return ["evaluate", MODEL, f"data.uri={DATA}", f"storage.root={root}", f"evaluation.actors={actors}", *SETTINGS]


def test_an_evaluation_goes_on_where_it_was_killed_and_gives_the_same_from_any_number_of_actors(
    shell: Shell, s3: Storage, local_stack
):
    shell.ok("ingest", "digits", "--to", DATA)
    killed = shell.start(*evaluate("s3://ddpm/one", 1))
    deadline = time.monotonic() + 200
    while len(before := recorded(s3, "s3://ddpm/one")) < 2:
        assert killed.poll() is None, killed.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    killed.kill()
    killed.communicate()

    one = shell.ok(*evaluate("s3://ddpm/one", 1), "--json").answer
    after = {entry.uri: entry for entry in stored(s3, "s3://ddpm/one", ".safetensors")}
    assert len(after) == 6
    assert all(after[entry.uri] == entry for entry in before)

    with FaultProxy(str(local_stack.s3_endpoint)) as proxy:
        environment = shell.environment | {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_SHARED_CREDENTIALS_FILE": str(local_stack.credentials_file),
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        three = [*evaluate("s3://ddpm/three", 3), "cluster.patience_s=5"]
        with one_stopped("ray::_SamplingActor.call", local_stack.home):  # which is no end that Ray notices
            done = replace(shell, environment=environment).ok(*three, "--json")
        other = done.answer
        assert "an actor of this work has not answered for" in done.err
        # A second evaluation needs no real image: what the first has computed of them is stored beside the dataset.
        read = [path for path in proxy.asked if "/datasets/scored/" in path]
        assert any("/features/" in path for path in read)
        assert not [path for path in read if ".tar" in path]
    assert other["estimates"] == one["estimates"]
    ours, theirs = stored(s3, "s3://ddpm/one", ".tar"), stored(s3, "s3://ddpm/three", ".tar")
    assert len(ours) == len(theirs) == 6
    for mine, its in zip(ours, theirs, strict=True):
        assert s3.read(mine.uri) == s3.read(its.uri)
    images = np.concatenate([unpack_samples(s3.read(entry.uri), 1)[0] for entry in ours])
    assert images.shape == (180, 8, 8, 1)
    assert images.std() > 30
    scores = one["estimates"]
    assert scores["frechet_distance"]["floor"] < scores["frechet_distance"]["value"]
    assert scores["frechet_distance"]["value"] < scores["frechet_distance"]["ceiling"]
    assert 0 < scores["bits_per_dim"]["value"] < 12
    assert scores["bits_per_dim_ode"]["value"] > 0


def test_pictures_without_labels_end_as_a_scored_and_registered_version(shell: Shell):
    folder = shell.folder / "unlabelled"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        pixels = np.full((16, 16, 3), rng.integers(0, 256, 3), np.uint8)
        pixels[rng.integers(0, 12) :, rng.integers(0, 12) :] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    names = [json.dumps({"file_name": f"{number:03d}.png"}) for number in range(60)]
    (folder / "metadata.jsonl").write_text("\n".join(names))
    done = shell.ok(
        *("flow", "data=folder", f"data.source={folder}", "data.uri=s3://ddpm/datasets/unlabelled", "name=unlabelled"),
        *("data.image_size=16", "data.num_classes=0", "data.test_fraction=0.4", "guidance=none", "images=640"),
        *("model.channels=[32]", "model.attention=[false]", "model.layers_per_block=1"),
        *("model.class_conditional=false", "batch_size=64", "cluster.num_workers=1", "checkpoint.every=640"),
        *("sampler.steps=4", "evaluation.seeds=1", "evaluation.likelihood_images=2", "--json"),
    )
    scores = done.answer["scores"]
    assert scores["evaluator"] == "contrastive"
    assert 10 < scores["n"] < 40
    assert "class_accuracy" not in scores["estimates"]
    assert scores["estimates"]["frechet_distance"]["value"] > 0
    assert scores["memorisation"] is not None
    assert done.answer["model"] == "models:/unlabelled/1"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_memory_of_an_evaluation_does_not_grow_with_the_number_of_samples(tmp_path: Path):
    dataset = ingest("digits", f"file://{tmp_path}/data", Storage(), image_size=8, channels=1).dataset
    command = [sys.executable, "-m", "tests.integration.evaluation_memory", dataset.uri, str(tmp_path)]
    few, many = (json.loads(subprocess.check_output([*command, str(n)]).splitlines()[-1]) for n in (10_000, 100_000))
    print(few, many)
    for peak in ("driver_kib", "actor_kib"):
        assert many[peak] < 1.1 * few[peak]
