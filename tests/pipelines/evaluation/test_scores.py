import json
import math
from dataclasses import replace

import pytest

from pipelines.evaluation.scores import Estimate, Scores
from tests.pipelines.evaluation import made_up

SCORES = made_up.scores(
    estimates={
        "frechet_distance": Estimate(10.0, 9.0, 11.0, 0.2, floor=5.0, ceiling=50.0),
        "class_accuracy": Estimate(0.97, 0.96, 0.98, 0.01),
        "recall": Estimate(0.8, 0.7, 0.9),
    },
    n=2_000,
    seeds=(1, 2, 3),
    sampling={"steps": 50},
)


def test_an_estimate_is_the_mean_of_its_seeds_with_the_interval_of_that_mean():
    found = Estimate.of([1.0, 2.0, 3.0], [0.3, 0.3, 0.3])
    assert found.value == 2
    assert found.spread == 1
    assert found.high - found.value == pytest.approx(1.959964 * 0.3 / math.sqrt(3))
    assert found.value - found.low == pytest.approx(found.high - found.value)
    assert Estimate.of([1.0], [0.3]).spread is None


def test_scores_in_words_name_accuracy_only_for_models_with_classes():
    accuracy, distance, variety = SCORES.lines()
    assert accuracy == ("accuracy", "0.9700 of 3 x 2,000 samples (real test: 1.0000)")
    text = "Frechet 10.00 ± 1.00 = 2.00 times the floor 5.00 of real test images (noise: 50)"
    assert distance == ("distance", text)
    assert variety == ("variety", "recall 0.80 ± 0.10")
    without = {name: e for name, e in SCORES.estimates.items() if name != "class_accuracy"}
    assert replace(SCORES, estimates=without).lines() == [distance, variety]


def test_a_prompt_accuracy_says_among_how_many_captions_and_what_guessing_gets():
    asked = {"captions": 40, "different": 12, "choices": 10, "chance": 0.1, "real_accuracy": 0.975}
    estimates = {**SCORES.estimates, "prompt_accuracy": Estimate(0.9, 0.85, 0.95, floor=0.975, ceiling=0.1)}
    scores = replace(SCORES, estimates=estimates, prompts=asked)
    text = "0.90 ± 0.05 of 3 x 2,000 samples match their own caption best of 10 (chance: 0.10, real test: 0.97)"
    assert ("prompts", text) in scores.lines()
    assert scores.metrics()["eval/prompt_accuracy"] == 0.9
    assert SCORES.prompts is None


def test_too_few_samples_for_the_width_of_the_features_are_said_to_be():
    few = replace(SCORES, n=359)
    assert few.lines()[-1][0] == "note"
    assert "359 samples are few for 64 features" in few.lines()[-1][1]
    assert "evaluation.n to 1,280 or more" in few.lines()[-1][1]
    assert SCORES.notes() == []


def test_scores_survive_json():
    sampling = {"kind": "ddim", "steps": 50, "guidance": "classifier_free"}
    scores = Scores.from_plain(replace(SCORES, sampling=sampling).to_plain())
    assert Scores.from_plain(json.loads(json.dumps(scores.to_plain()))) == scores


def test_scores_of_the_first_release_are_read():
    plain = {
        "frechet_distance": 4.4,
        "floor": 3.5,
        "ceiling": 60.0,
        "class_accuracy": None,
        "real_accuracy": 1.0,
        "n": 359,
        "seed": 1,
        "evaluator_digest": "e",
        "dataset_digest": "d",
        "sampling": {},
    }
    scores = Scores.from_plain(plain)
    assert scores["frechet_distance"] == Estimate(4.4, floor=3.5, ceiling=60.0)
    assert (scores.n, scores.seeds, scores.class_accuracy) == (359, (1,), None)
    assert scores.metrics() == {"eval/frechet_distance": 4.4, "eval/frechet_floor": 3.5}


def test_metrics_leave_out_what_is_not_a_number():
    broken = replace(SCORES, estimates={"frechet_distance": Estimate(math.nan, floor=1.0, ceiling=2.0)})
    assert broken.metrics() == {"eval/frechet_floor": 1.0}
