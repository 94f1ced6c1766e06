"""What Dagster is told of each result: where it is in MLflow, its digest, and what it is worth."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipelines.checkpoints import Published
from pipelines.evaluation.evaluators import Evaluator
from pipelines.flow import GRAPH, Results
from pipelines.flow.orchestrate.facts import facts
from pipelines.registry import Verdict
from pipelines.tracking import ModelVersion
from pipelines.training.driver import TrainingResult
from tests.pipelines.checkpoints.tiny import DATASET
from tests.pipelines.registry.version import scores

TRACKER = SimpleNamespace(url="http://mlflow/run", run_id="r")
RESULTS = Results(
    dataset=DATASET,
    run=TrainingResult(TRACKER, "complete", 640, Published("s3://b/published/640", 640, "d" * 64), None),
    evaluator=Evaluator(None, "classifier", "e" * 64, "trained on file:///data", "scaled", True, 0.99),
    evaluation=scores(),
    version=ModelVersion("m", "3", "r", {"served_digest": "served", "model_digest": "d" * 64}, ()),
    champion=Verdict(True, "why", "m", "champion", "3"),
)
EXPECTED = {
    "dataset": ({"uri": "file:///data", "samples/train": 5, "samples/test": 5, "classes": 10}, DATASET.digest),
    "run": ({"run_id": "r", "images_seen": 640, "checkpoint": "s3://b/published/640"}, "d" * 64),
    "evaluator": ({"kind": "classifier", "source": "trained on file:///data", "accuracy": 0.99}, "e" * 64),
    "evaluation": ({"scores/frechet_distance": 10.0, "scores/class_accuracy": 0.97, "n": 359}, None),
    "version": ({"model": "models:/m/3", "version": "3", "served_digest": "served"}, "served"),
    "champion": ({"model": "models:/m/3", "alias": "champion", "verdict": "passed: why"}, "served"),
}


@pytest.mark.parametrize("spec", GRAPH, ids=lambda spec: spec.gives)
def test_a_result_is_told_by_its_address_its_digest_and_its_figures(spec):
    metadata, digest = facts(spec.gives, RESULTS, "http://mlflow")
    expected, version = EXPECTED[spec.gives]
    assert expected.items() <= metadata.items()  # type: ignore[attr-defined]
    assert digest == (version or metadata["digest"])
    if spec.gives not in ("dataset", "evaluator"):
        assert metadata["mlflow"]["type"] == "url"
        assert metadata["mlflow"]["raw_value"].startswith("http://mlflow/")
    for value in metadata.values():
        assert isinstance(value, (str, int, float)) or value.keys() == {"type", "raw_value"}
