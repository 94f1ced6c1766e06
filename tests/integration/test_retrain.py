"""New pictures at an address become a version that is compared with the champion, which knew only the old ones."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient

from tests.digits import write_digits
from tests.integration.conftest import Shell

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

SHORT = [
    "+experiment=digits", "data=folder", "data.image_size=8", "data.channels=1", "data.num_classes=10",
    "data.flip=false", "tracking.grid_every=null", "sampler.steps=10", "evaluation.n=200", "evaluation.seeds=1",
    "evaluation.likelihood_images=0", "registry.n=400", "registry.model=retrained",
]  # fmt: skip


def test_a_flow_on_new_pictures_scores_the_champion_on_them_before_it_compares(shell: Shell, local_stack, tmp_path):
    source = tmp_path / "digits"
    write_digits(source, range(900))
    settings = [*SHORT, f"data.source={source}"]
    first = shell.ok("flow", *settings, "name=retrained", "images=10240", "--json")
    assert first.answer["gate"]["passed"], first.answer["gate"]["reason"]

    write_digits(source, range(900, 1797))
    said = shell.ok("flow", *settings, "name=retrained-again", "images=40960", "--dry-run").err
    assert "ingest  will run: " in said
    second = shell.ok("flow", *settings, "name=retrained-again", "images=40960", "--json")
    assert "models:/retrained/1 was scored on other data or otherwise: scoring it again" in second.err
    verdict = second.answer["gate"]
    assert verdict["passed"], verdict["reason"]
    assert verdict["reason"].startswith("better: Frechet distance ")

    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    old, trained, scored = (client.get_model_version("retrained", number) for number in ("1", "2", "3"))
    assert verdict["champion"] == scored.version
    assert scored.run_id == old.run_id != trained.run_id
    assert scored.tags["dataset_digest"] == trained.tags["dataset_digest"] != old.tags["dataset_digest"]
    aliases = {name: str(number) for name, number in client.get_registered_model("retrained").aliases.items()}
    assert aliases == {"champion": "2", "candidate": "2", "previous": "3"}

    again = shell.ok("flow", *settings, "name=retrained-again", "images=40960", "--json")
    assert again.answer["skipped"] == ["ingest", "train", "evaluator", "evaluate", "register", "gate"]
