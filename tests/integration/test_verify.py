"""A version on the real registry: verified as it was made, and refused once its stored files, tags or data change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.checkpoints.references import Resolved
from pipelines.registry import Signer, register
from pipelines.shards.index import make_dataset
from pipelines.stack import StackState
from pipelines.storage import Storage
from tests.integration.conftest import Shell
from tests.pipelines.checkpoints.tiny import DATASET
from tests.pipelines.registry.version import CONFIG, a_model, scores
from tests.pipelines.signing.authority import issue

pytestmark = pytest.mark.integration

NAME = "verified"
CHECKS = ["signature", "evidence", "tags", "weights", "settings", "code", "data", "stream", "pictures"]


@pytest.fixture(scope="module")
def model(local_stack: StackState, s3: Storage) -> str:
    """A version of a tiny model in a run of its own; what it was scored on is there."""
    content = {name: getattr(DATASET, name) for name in ("splits", "classes", "channels", "image_size", "mean", "std")}
    data = make_dataset("s3://ddpm/datasets/verified", **content)
    s3.write(f"{data.uri}/dataset.json", data.to_json().encode())
    tracker, _ = tracking.open_run(local_stack.tracking_uri, "ddpm", NAME, {})
    found = scores(dataset_digest=data.digest, stream_digest=data.digest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_HOME", str(local_stack.home))
        signer = Signer.of(CONFIG)
        return register(Resolved("tiny", a_model(), tracker), NAME, found, data.uri, signer).uri


@pytest.fixture(scope="module")
def stored(model: str, local_stack, s3: Storage) -> dict[str, str]:
    """Address of each file of the version, by its name in it."""
    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    source = client.get_model_version(NAME, model.rsplit("/", 1)[-1]).source.removeprefix("models:/")
    found = [entry.uri for entry in s3.list("s3://ddpm/mlflow") if f"/{source}/artifacts/" in entry.uri]
    return {uri.split(f"/{source}/artifacts/", 1)[1]: uri for uri in found}


@contextmanager
def changed(s3: Storage, uri: str, content: bytes | None) -> Iterator[None]:
    """With other bytes at an address, or none."""
    before = s3.read(uri)
    try:
        if content is None:
            s3.delete(uri)
        else:
            s3.write(uri, content)
        yield
    finally:
        s3.write(uri, before)


def refused(shell: Shell, model: str, *overrides: str) -> dict[str, str]:
    done = shell("verify", model, "--json", *overrides)
    assert done.code == 1, done.err
    return {row["name"]: row["figure"] for row in done.answer["rows"] if not row["passed"]}


def test_a_registered_version_passes_every_check(shell, model):
    done = shell.ok("verify", model, "--json")
    assert [row["name"] for row in done.answer["rows"]] == CHECKS
    assert all(row["passed"] for row in done.answer["rows"])
    assert done.answer["rows"][-1]["figure"] == "all 1,024 pixels are equal"


def test_a_bit_in_the_stored_weights_and_a_line_in_the_stored_code_are_found(shell, model, stored, s3):
    weights = stored["artifacts/model/model.safetensors"]
    flipped = bytearray(s3.read(weights))
    flipped[-1] ^= 1
    code = stored["code/ddpm/generate.py"]
    with changed(s3, weights, bytes(flipped)), changed(s3, code, s3.read(code) + b"\n"):
        told = refused(shell, model)
    assert told["signature"] == "it was changed after it was signed: model.safetensors is another"
    assert told["weights"] == "model.safetensors is another"
    assert told["code"] == "code/ddpm/generate.py is another"
    assert set(told) == {"signature", "weights", "code", "data", "pictures"}


def test_a_changed_tag_and_a_lost_dataset_are_named(shell, model, s3, local_stack):
    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    number = model.rsplit("/", 1)[-1]
    before = client.get_model_version(NAME, number).tags["frechet_distance"]
    client.set_model_version_tag(NAME, number, "frechet_distance", "0.0001")
    with changed(s3, "s3://ddpm/datasets/verified/dataset.json", None):
        told = refused(shell, model)
    client.set_model_version_tag(NAME, number, "frechet_distance", before)
    assert set(told) == {"tags", "data"}
    assert told["tags"] == f"frechet_distance is 0.0001, not {before}"
    assert "no dataset at s3://ddpm/datasets/verified" in told["data"]


def test_a_version_without_its_signature_and_one_by_a_stranger_say_so(shell, model, s3, stored, tmp_path):
    with changed(s3, stored["artifacts/model.sig"], None):
        assert refused(shell, model)["signature"] == "it is not signed: model.sig is missing"
    stranger = issue(tmp_path, "stranger", authority=True)
    told = refused(shell, model, f"registry.trusted_certificates=[{stranger.path}]")
    assert set(told) == {"signature", "data", "pictures"}
    assert "is by none of registry.trusted_keys and registry.trusted_certificates" in told["signature"]
