from dataclasses import replace

from pipelines.evaluation.evaluate import Scores
from pipelines.registry import gate

SCORES = Scores(10.0, 5.0, 50.0, 0.97, 1.0, 359, 1, "e", "d", {"steps": 50})


def test_the_first_version_passes():
    assert gate(SCORES, None).passed


def test_a_nearer_model_passes_and_an_equal_or_farther_one_does_not():
    assert gate(replace(SCORES, frechet_distance=9.9), SCORES).passed
    assert not gate(SCORES, SCORES).passed
    refused = gate(replace(SCORES, frechet_distance=10.1), SCORES)
    assert not refused.passed
    assert "10.100 against 10.000" in refused.reason


def test_distance_is_not_bought_with_class_accuracy():
    nearer = replace(SCORES, frechet_distance=8.0)
    assert gate(replace(nearer, class_accuracy=0.965), SCORES).passed
    refused = gate(replace(nearer, class_accuracy=0.90), SCORES)
    assert "falls from 0.9700 to 0.9000" in refused.reason


def test_unlike_scores_are_not_compared():
    for change in ({"evaluator_digest": "x"}, {"dataset_digest": "x"}, {"n": 10}, {"seed": 2}):
        verdict = gate(replace(SCORES, frechet_distance=1.0, **change), SCORES)
        assert not verdict.passed
        assert next(iter(change)) in verdict.reason


def test_a_verdict_reads_as_its_outcome_and_reason():
    assert str(gate(SCORES, None)) == "passed: the alias has no version yet"
    assert gate(SCORES, SCORES).outcome == "refused"
