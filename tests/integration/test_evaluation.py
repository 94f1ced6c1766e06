"""Scores of a model on the real services: the same from any number of actors, and nothing is made twice."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluation.images import unpack_samples
from pipelines.storage import Entry, Storage
from tests.chaos.fault_proxy import FaultProxy
from tests.integration.conftest import Shell

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

MODEL = str(Path("tests/fixtures/earlier/version/model").resolve())
DATA = "s3://ddpm/datasets/scored"
SETTINGS = ["evaluation.n=270", "evaluation.seeds=1", "evaluation.batch_size=30", "evaluation.likelihood_images=4"]


def stored(s3: Storage, root: str, ending: str) -> list[Entry]:
    return [entry for entry in s3.list(f"{root}/evaluations") if entry.uri.endswith(ending)]


def evaluate(root: str, actors: int) -> list[str]:
    return ["evaluate", MODEL, f"data.uri={DATA}", f"storage.root={root}", f"evaluation.actors={actors}", *SETTINGS]


def test_an_evaluation_goes_on_where_it_was_killed_and_gives_the_same_from_any_number_of_actors(
    shell: Shell, s3: Storage, local_stack
):
    shell.ok("ingest", "digits", "--to", DATA)
    killed = shell.start(*evaluate("s3://ddpm/one", 1))
    deadline = time.monotonic() + 200
    while len(before := stored(s3, "s3://ddpm/one", ".safetensors")) < 2:
        assert killed.poll() is None, killed.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    killed.kill()
    killed.communicate()

    one = shell.ok(*evaluate("s3://ddpm/one", 1), "--json").answer
    after = {entry.uri: entry for entry in stored(s3, "s3://ddpm/one", ".safetensors")}
    assert len(after) == 9
    assert all(after[entry.uri] == entry for entry in before)

    with FaultProxy(str(local_stack.s3_endpoint)) as proxy:
        environment = shell.environment | {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_SHARED_CREDENTIALS_FILE": str(local_stack.credentials_file),
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        other = replace(shell, environment=environment).ok(*evaluate("s3://ddpm/three", 3), "--json").answer
        # A second evaluation needs no real image: what the first has computed of them is stored beside the dataset.
        read = [path for path in proxy.asked if "/datasets/scored/" in path]
        assert any("/features/" in path for path in read)
        assert not [path for path in read if ".tar" in path]
    assert other["estimates"] == one["estimates"]
    ours, theirs = stored(s3, "s3://ddpm/one", ".tar"), stored(s3, "s3://ddpm/three", ".tar")
    assert len(ours) == len(theirs) == 9
    for mine, its in zip(ours, theirs, strict=True):
        assert s3.read(mine.uri) == s3.read(its.uri)
    images = np.concatenate([unpack_samples(s3.read(entry.uri), 1) for entry in ours])
    assert images.shape == (270, 8, 8, 1)
    assert images.std() > 30
    scores = one["estimates"]
    assert scores["frechet_distance"]["floor"] < scores["frechet_distance"]["value"]
    assert scores["frechet_distance"]["value"] < scores["frechet_distance"]["ceiling"]
    assert 0 < scores["bits_per_dim"]["value"] < 8
    assert 0 < scores["bits_per_dim_ode"]["value"] < 8
