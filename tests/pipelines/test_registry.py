from dataclasses import replace

from pipelines.evaluation.scores import Estimate, Scores
from pipelines.registry import gate


def scores(distance: float = 10.0, accuracy: float = 0.97, **fields) -> Scores:
    plain = {
        "estimates": {
            "frechet_distance": Estimate(distance, floor=5.0, ceiling=50.0),
            "class_accuracy": Estimate(accuracy),
        },
        "n": 359,
        "seeds": (1,),
        "evaluator": "classifier",
        "evaluator_digest": "e",
        "features": 64,
        "real_accuracy": 1.0,
        "dataset_digest": "d",
        "stream_digest": "s",
        "real": {"train": 719, "test": 359},
        "sampling": {"steps": 50},
    }
    return Scores(**{**plain, **fields})


SCORES = scores()


def test_the_first_version_passes():
    assert gate(SCORES, None).passed


def test_a_nearer_model_passes_and_an_equal_or_farther_one_does_not():
    assert gate(scores(9.9), SCORES).passed
    assert not gate(SCORES, SCORES).passed
    refused = gate(scores(10.1), SCORES)
    assert not refused.passed
    assert "10.100 against 10.000" in refused.reason


def test_a_distance_that_is_no_number_is_not_better():
    assert not gate(scores(float("nan")), SCORES).passed


def test_distance_is_not_bought_with_class_accuracy():
    assert gate(scores(8.0, 0.965), SCORES).passed
    refused = gate(scores(8.0, 0.90), SCORES)
    assert "falls from 0.9700 to 0.9000" in refused.reason


def test_unlike_scores_are_not_compared():
    for change in ({"evaluator_digest": "x"}, {"dataset_digest": "x"}, {"n": 10}, {"seeds": (2,)}):
        verdict = gate(replace(scores(1.0), **change), SCORES)
        assert not verdict.passed
        assert next(iter(change)) in verdict.reason


def test_a_verdict_reads_as_its_outcome_and_reason():
    assert str(gate(SCORES, None)) == "passed: the alias has no version yet"
    assert gate(SCORES, SCORES).outcome == "refused"
