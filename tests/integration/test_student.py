"""A consistency student is tuned from the champion, scored, registered under its name and judged by the same gate."""

from __future__ import annotations

import json

import pytest
from mlflow import MlflowClient

from pipelines.checkpoints import references
from pipelines.config import compose
from pipelines.storage import Storage
from tests.integration.conftest import Shell

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

SHORT = [
    "images=5120", "cluster.num_workers=1", "tracking.grid_every=null", "optim.warmup_images=0", "registry.model=few",
    "evaluation.n=90", "evaluation.seeds=1", "evaluation.likelihood_images=0", "registry.n=90",
]  # fmt: skip


def test_a_student_is_a_version_whose_lineage_names_its_teacher(shell: Shell, local_stack, s3: Storage):
    teacher = shell.ok("flow", "+experiment=digits", "name=teacher", *SHORT, "--json")
    assert teacher.answer["gate"]["passed"], teacher.answer["gate"]["reason"]
    tuned = shell.ok(
        "flow", "+experiment=digits_consistency", "init_from=models:/few@champion", "name=student", *SHORT, "--json"
    )

    # The gate drew both on the same noise, each as it is registered.
    assert tuned.answer["gate"]["champion"] == "1"
    assert "90 samples of models:/few/2 and of models:/few/1, on the same noise" in tuned.err
    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    version = client.get_model_version("few", "2")
    settings = json.loads(version.tags["sampling"])
    assert (settings["kind"], settings["steps"]) == ("consistency", 2)
    assert version.tags["init_from"] == "models:/few@champion"
    named = compose(["+experiment=digits_consistency", "init_from=models:/few/1"])
    weights = references.initial_model(named, local_stack.tracking_uri)
    assert version.tags["init_from_digest"] == weights.digest
    assert "after 5,120 images from the weights of `models:/few@champion`." in (version.description or "")

    # What users draw with is what was judged.
    shell.ok("sample", "models:/few/2", "--labels", "3", "--count", "2", "--out", "few", "--json")
    manifest = json.loads((shell.folder / "few" / "manifest.json").read_text())
    assert manifest["request"]["sampling"] == settings
    assert len(list((shell.folder / "few").glob("*.png"))) == 3
