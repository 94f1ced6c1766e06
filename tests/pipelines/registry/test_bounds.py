"""Each bound is broken by one kind of failure, names it, and nothing that is not known passes."""

import math
from dataclasses import replace

import pytest

from pipelines.evaluation.scores import Estimate, Scores
from pipelines.registry.decision import absolute_bounds
from tests.pipelines.evaluation import made_up

GOOD = made_up.scores(
    estimates={
        "frechet_distance": Estimate(3.0, 2.8, 3.2, floor=2.5, ceiling=50.0),
        "class_accuracy": Estimate(0.98, 0.97, 0.99, floor=0.99, ceiling=0.1),
        "recall": Estimate(0.7, 0.65, 0.75, floor=0.8),
        "diversity": Estimate(9.0, 8.0, 10.0, floor=10.0),
        "finite": Estimate(1.0, 1.0, 1.0, floor=1.0),
    },
    seeds=(1, 2, 3),
    real_accuracy=0.99,
    memorisation={"copies": False, "verdict": "none found"},
)


def failed(scores: Scores) -> list[str]:
    return [row.name for row in absolute_bounds(scores) if not row.passed]


def changed(name: str, **fields) -> Scores:
    return replace(GOOD, estimates={**GOOD.estimates, name: replace(GOOD.estimates[name], **fields)})


def test_a_trained_model_is_within_every_bound():
    assert failed(GOOD) == []
    assert len(absolute_bounds(GOOD)) == 6


@pytest.mark.parametrize(
    "scores, name",
    [
        (changed("finite", value=0.999), "finite samples"),
        (changed("finite", value=math.nan), "finite samples"),
        (changed("frechet_distance", value=26.0), "not noise: distance"),
        (changed("frechet_distance", value=math.nan), "not noise: distance"),
        (changed("frechet_distance", value=math.inf), "not noise: distance"),
        (changed("class_accuracy", value=0.2, low=0.18), "not noise: accuracy"),
        (changed("class_accuracy", low=math.nan), "not noise: accuracy"),
        (changed("recall", value=0.01), "not collapsed: recall"),
        (changed("diversity", value=0.5), "not collapsed: diversity"),
        (changed("diversity", value=math.nan), "not collapsed: diversity"),
        (replace(GOOD, memorisation={"copies": True, "verdict": "COPIES of training images"}), "not copies"),
    ],
)
def test_each_failure_is_refused_by_name(scores, name):
    assert failed(scores) == [name]


@pytest.mark.parametrize("name", ["finite", "frechet_distance", "recall", "diversity"])
def test_a_score_that_is_missing_does_not_pass(name):
    without = replace(GOOD, estimates={n: e for n, e in GOOD.estimates.items() if n != name})
    assert len(failed(without)) == 1


def test_copies_that_were_not_looked_for_and_floors_that_are_not_known_do_not_pass():
    assert failed(replace(GOOD, memorisation=None)) == ["not copies"]
    assert failed(changed("frechet_distance", ceiling=None)) == ["not noise: distance"]
    assert failed(changed("recall", floor=None)) == ["not collapsed: recall"]


def test_a_model_without_classes_has_no_accuracy_to_show():
    without = replace(GOOD, estimates={n: e for n, e in GOOD.estimates.items() if n != "class_accuracy"})
    assert failed(without) == []


def test_accuracy_is_asked_for_as_far_as_the_evaluator_knows_real_images():
    # Of sixteen kinds of drawings a classifier that has seen few knew 48 % of the real ones, and 38 % of good samples.
    weak = {"floor": 0.4778, "ceiling": 0.2683}
    assert failed(changed("class_accuracy", value=0.3789, low=0.3194, **weak)) == []
    assert failed(changed("class_accuracy", value=0.33, low=0.27, **weak)) == ["not noise: accuracy"]
    assert failed(changed("class_accuracy", value=0.3789, low=0.3194, floor=None, ceiling=0.2683)) != []
    assert failed(changed("class_accuracy", value=0.25, low=0.2, floor=0.26, ceiling=0.2683)) == []
