import json
from dataclasses import replace

import torch

from ddpm.quality import FeatureMoments, FrechetInfluence, Measured
from pipelines import tracking
from pipelines.evaluation.scores import Estimate, Scores
from pipelines.registry import promote
from pipelines.registry.gate import gate
from pipelines.tracking import ModelVersion


def scores(distance: float = 10.0, accuracy: float = 0.97, **fields) -> Scores:
    plain = {
        "estimates": {
            "frechet_distance": Estimate.of([distance], [0.1], floor=5.0, ceiling=50.0),
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
    better = gate(scores(9.7), SCORES)
    assert better.passed
    assert better.reason == "better: Frechet distance 9.700 against 10.000, by 2.1 standard errors"
    assert not gate(SCORES, SCORES).passed
    refused = gate(scores(10.1), SCORES)
    assert not refused.passed
    assert "10.100 against 10.000" in refused.reason


def test_a_difference_within_the_errors_of_both_is_not_enough():
    refused = gate(scores(9.9), SCORES)
    assert not refused.passed
    assert "a difference of 0.7 standard errors where 1.96 are asked for" in refused.reason
    assert "about 2,759 samples" in refused.reason


def test_scores_without_intervals_do_not_compare():
    earlier = replace(SCORES, estimates={**SCORES.estimates, "frechet_distance": Estimate(10.0)})
    for pair in ((scores(1.0), earlier), (earlier, scores(20.0))):
        assert "without intervals" in gate(*pair).reason


def test_equal_models_take_the_alias_from_each_other_as_rarely_as_is_said():
    generator = torch.Generator().manual_seed(0)
    reference = FeatureMoments.of(torch.randn(4_000, 8, generator=generator))

    def drawn() -> Scores:
        samples = 1.2 * torch.randn(300, 8, generator=generator) + 0.3
        influence = FrechetInfluence.of(reference, FeatureMoments.of(samples))
        found = Measured(influence.distance, influence(samples))
        distance = Estimate.of([found.value], [found.standard_error])
        return replace(SCORES, estimates={**SCORES.estimates, "frechet_distance": distance})

    passed = sum(gate(drawn(), drawn()).passed for _ in range(1_000))
    assert 10 <= passed <= 37


def test_a_distance_that_is_no_number_does_not_pass_not_even_as_the_first_version():
    for champion in (None, SCORES):
        assert "not a number" in gate(scores(float("nan")), champion).reason


def test_a_copier_of_training_images_does_not_pass_however_near_its_samples_are():
    copies = {"copies": True, "verdict": "COPIES of training images: 90.0% of 359 samples"}
    for champion in (None, SCORES):
        refused = gate(scores(1.0, memorisation=copies), champion)
        assert (refused.passed, refused.reason) == (False, copies["verdict"])
    assert gate(scores(1.0, memorisation={**copies, "copies": False}), SCORES).passed


def test_an_alias_at_a_version_without_scores_is_not_taken_from_it(monkeypatch):
    def version(number: str, tags: dict[str, str]) -> ModelVersion:
        return ModelVersion("digits", number, "run", tags, ())

    sampling = {"kind": "ddim", "steps": 50, "guidance": "classifier_free"}
    candidate = version("2", {"scores": json.dumps(scores(sampling=sampling).to_plain())})
    monkeypatch.setattr(tracking, "version", lambda uri, name, alias: version("1", {}))
    monkeypatch.setattr(tracking, "set_version_tags", lambda *arguments: None)
    verdict = promote("http://mlflow", candidate, "champion")
    assert not verdict.passed
    assert "models:/digits/1 at the alias has no scores" in verdict.reason


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
