"""Somebody asks for a picture back: two trainings, a student and three versions on a real stack."""

from __future__ import annotations

import io
import json
import subprocess

import pytest
from mlflow import MlflowClient
from PIL import Image

from pipelines.provenance.prints import read_images
from pipelines.shards.audit.recorded import read_sidecar
from pipelines.shards.index import read_dataset
from pipelines.shards.quarantine import Problem, make_quarantine, store_quarantine
from pipelines.storage import Storage
from tests.integration.conftest import DIGITS, Shell

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

DATA, NAME = "s3://ddpm/datasets/asked", "asked"
JUDGED = ["registry.n=359", "evaluation.n=200", "evaluation.seeds=1", "evaluation.likelihood_images=0"]
SHORT = [*DIGITS, f"registry.model={NAME}", f"data.uri={DATA}", "sampler.steps=10", *JUDGED]


@pytest.fixture(scope="module")
def client(local_stack) -> MlflowClient:
    return MlflowClient(tracking_uri=local_stack.tracking_uri)


@pytest.fixture(scope="module")
def picture(shell: Shell, s3: Storage) -> str:
    """A file with a picture of the dataset, which was out of the dataset while the run "clean" was trained on it."""
    shell.ok("ingest", "digits", "--to", DATA)
    dataset = read_dataset(DATA, s3)
    shard = dataset.shards("train")[0]
    index = read_sidecar(shard, DATA, s3)
    i, _, data = next(each for each in read_images(index, shard.address(DATA), s3) if each[0] == 3)
    problem = Problem(shard.name, i, index.keys[i], "decode", "for a test")
    store_quarantine(make_quarantine(dataset, [problem]), DATA, s3)
    shell.ok("flow", *SHORT, "name=clean", "guidance.scale=0.75", "--json")
    s3.delete(f"{DATA}/quarantine.json")
    path = shell.folder / "mine.png"
    Image.open(io.BytesIO(data)).save(path, optimize=True)  # the same pixels in another file
    return str(path)


@pytest.fixture(scope="module")
def versions(shell: Shell, picture: str, client: MlflowClient) -> dict[str, set[str]]:
    """Run -> its versions; "given" took the alias of "clean", and "student" was tuned from it by that alias."""
    shell.ok("flow", *SHORT, "name=given", "--json")
    at = f"models:/{NAME}@champion"
    trained = shell.ok(
        "train", *SHORT, "name=student", f"init_from={at}", "images=2000", "optim.decay=constant", "--json"
    )
    shell.ok("register", f"runs:/{trained.answer['run_id']}", *SHORT, "--json")
    found: dict[str, set[str]] = {}
    for each in client.search_model_versions(f"name = '{NAME}'"):
        found.setdefault(each.tags["run"], set()).add(str(each.version))
    return found


def aliases(client: MlflowClient) -> dict[str, str]:
    return {alias: str(number) for alias, number in client.get_registered_model(NAME).aliases.items()}


def test_all_that_has_seen_it_is_found_and_a_statement_says_so(shell, picture, versions, client):
    assert {aliases(client)["champion"]} == versions["given"]
    done = shell.ok("seen", picture, *SHORT, "--statement", "said.json", "--json")
    print(done.err)
    assert {match["uri"] for match in done.answer["matches"]} == {DATA}
    assert done.answer["matches"][0]["how"] in ("ingested", "pixels")
    trainings = {each["run"]: each for each in done.answer["trainings"]}
    assert trainings.keys() == {"given", "student"}
    assert trainings["given"]["times"] == len(trainings["given"]["occurrences"]) > 0
    assert trainings["student"]["through"]
    concerned = {each["version"].rpartition("/")[2] for each in done.answer["versions"]}
    assert concerned == versions["given"] | versions["student"]
    key = next(shell.folder.parent.rglob("signing.pub"), None) or next(shell.folder.parent.parent.rglob("*.pub"))
    said = ["openssl", "dgst", "-sha256", "-verify", str(key), "-signature", "said.json.sig", "said.json"]
    assert subprocess.run(said, cwd=shell.folder, capture_output=True, text=True, check=False).stdout == "Verified OK\n"
    assert json.loads((shell.folder / "said.json").read_text())["matches"] == done.answer["matches"]


def test_it_is_taken_out_and_its_models_lose_the_alias(shell, picture, versions, client, s3):
    found_before = shell.ok("seen", picture, *SHORT, "--exact", "--json").answer
    told = shell.ok("forget", picture, *SHORT, "--dry-run", "--json")
    (given,) = versions["given"]
    assert aliases(client)["champion"] == given
    match = found_before["matches"][0]
    shard = next(shard for shard in read_dataset(DATA, s3).shards("train") if shard.name == match["shard"])
    stored = {i: bytes(data) for i, _, data in read_images(read_sidecar(shard, DATA, s3), shard.address(DATA), s3)}
    assert any(stored[match["index"]] in s3.read(entry.uri) for entry in s3.list("s3://ddpm"))
    done = shell.ok("forget", picture, *SHORT, "--erase", "--reason", "asked for", "--json")
    print(done.err)
    assert done.answer["erased"] == {DATA: 1}
    assert not [entry.uri for entry in s3.list("s3://ddpm") if stored[match["index"]] in s3.read(entry.uri)]
    assert told.answer["aliases"] == done.answer["aliases"] == {f"champion of {NAME}": aliases(client)["champion"]}
    assert aliases(client)["champion"] in versions["clean"]
    assert client.get_model_version(NAME, given).tags["forget_request"] == done.answer["request"]
    assert {start["run"] for start in done.answer["clean_starts"]} == {"given", "student"}
    refused = shell("promote", f"models:/{NAME}/{given}", "--alias", "champion", *SHORT, "--json")
    assert refused.code == 1
    assert "pictures that are to be forgotten" in refused.err
    assert aliases(client)["champion"] in versions["clean"]

    again = shell.ok("forget", picture, *SHORT, "--erase", "--json")
    assert again.answer["request"] == done.answer["request"]
    assert again.answer["erased"] == {DATA: 0}
    assert set(again.answer["quarantined"].values()) == {0}
    assert again.answer["aliases"] == {}

    stopped = shell("train", *SHORT, "name=given", "images=100000", "--json")
    assert stopped.code != 0
    assert "must stay out" in stopped.err
    shell.ok("train", *SHORT, "name=anew", "images=1000", "--json")
    seen = shell.ok("seen", picture, *SHORT, "--exact", "--json")
    trainings = {each["run"]: each for each in seen.answer["trainings"]}
    assert trainings.keys() == {"given", "student"}
    assert {run: each["occurrences"] for run, each in trainings.items()} == {
        each["run"]: each["occurrences"] for each in found_before["trainings"]
    }
    assert trainings["student"]["through"]  # though the alias that it began from is another version's now
    assert shell.ok("check", DATA, "--json").answer["clean"]
    verified = shell.ok("verify", f"models:/{NAME}@champion", *SHORT, "--json")
    assert verified.answer["passed"]  # though it was scored before the erasure
