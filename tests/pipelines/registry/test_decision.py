"""The gate promotes a better version and, however often it is asked, hardly ever one that is not."""

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch

from ddpm.quality import FeatureMoments, FrechetInfluence, Measured
from pipelines.evaluation.measure import Measures
from pipelines.evaluation.paired import level
from pipelines.registry.comparison import gate_seed
from pipelines.registry.decision import ACCURACY_LEVEL, comparable, decide
from tests.pipelines.evaluation import made_up

REFERENCE = FeatureMoments.of(torch.randn(4_000, 8, generator=torch.Generator().manual_seed(1)))


def frechet(samples) -> Measured:
    influence = FrechetInfluence.of(REFERENCE, FeatureMoments.of(samples))
    return Measured(influence.distance, influence(samples))


def samples(generator, n=300, shift=0.3):
    return 1.2 * torch.randn(n, 8, generator=generator) + shift


def measured(value: float, error: float = 0.1, seed: int = 0, n: int = 100) -> Measured:
    influence = torch.randn(n, generator=torch.Generator().manual_seed(seed)).double()
    influence = influence - influence.mean()
    return Measured(value, influence / influence.std() * error * math.sqrt(n))


def by(distance: Measured, accuracy: Measured | None = None) -> Measures:
    return Measures("frechet_distance", distance, accuracy)


def compared(
    gain: float, candidate_accuracy: Measured | None = None, champion_accuracy: Measured | None = None
) -> tuple[Measures, Measures]:
    return by(measured(10.0 - gain, seed=1), candidate_accuracy), by(measured(10.0, seed=2), champion_accuracy)


def test_a_nearer_version_passes_and_an_equal_or_farther_one_does_not():
    better = decide(*compared(1.0), 1, "models:/digits/1")
    assert better.passed
    assert better.reason.startswith("better: Frechet distance 9 against 10, by ")
    equal = decide(*compared(0.05), 1, "models:/digits/1")
    assert not equal.passed
    assert equal.reason.startswith("not distinguishable: Frechet distance 9.95 against 10")
    assert "300 more would tell one of" in equal.reason
    worse = decide(*compared(-1.0), 1, "models:/digits/1")
    assert not worse.passed
    assert worse.reason.startswith("worse: ")


def test_what_more_samples_are_said_to_tell_is_told_in_nine_cases_of_ten():
    error = decide(*compared(0.0), 1, "it")
    told = float(error.reason.split("tell a difference of ")[1].split(" ")[0])
    ours, theirs = compared(0.0)
    spread = (theirs.distance - ours.distance).standard_error
    generator = torch.Generator().manual_seed(0)
    gains = told + spread * torch.randn(2_000, generator=generator)
    shifted = measured(10.0, seed=2)
    passed = sum(
        decide(by(replace(measured(10.0, seed=1), value=10.0 - g)), by(shifted), 1, "it").passed for g in gains.tolist()
    )
    assert 0.88 < passed / len(gains) < 0.92


def test_what_both_have_in_common_does_not_count():
    shared = measured(0.0, error=5.0, seed=3)
    ours, theirs = measured(9.0, seed=1), measured(10.0, seed=2)
    both = [Measured(one.value, one.influence + shared.influence) for one in (ours, theirs)]
    assert decide(by(both[0]), by(both[1]), 1, "it").passed
    apart = Measured(ours.value, ours.influence + measured(0.0, error=5.0, seed=4).influence)
    assert not decide(by(apart), by(both[1]), 1, "it").passed


def test_the_same_samples_and_distances_that_are_no_numbers_do_not_pass():
    assert "the same samples" in decide(by(measured(10.0)), by(measured(10.0)), 1, "it").reason
    assert "not a number" in decide(by(measured(math.nan)), by(measured(10.0, seed=2)), 1, "it").reason


def test_every_attempt_is_tested_at_a_smaller_level():
    assert [level(k) for k in (1, 2, 10)] == [0.025, 0.00625, 0.00025]
    assert decide(*compared(0.31), 1, "it").passed
    assert not decide(*compared(0.31), 2, "it").passed
    assert "attempt 2, level 0.00625" in decide(*compared(0.31), 2, "it").rows[0].bound


def test_a_version_may_be_allowed_to_be_worse_by_a_margin():
    assert not decide(*compared(-0.1), 1, "it").passed
    passed = decide(*compared(-0.1), 1, "it", margin=1.0)
    assert passed.passed
    assert passed.reason.startswith("not worse by 1: ")
    assert not decide(*compared(-0.9), 1, "it", margin=1.0).passed


def accuracy(value: float, seed: int, n: int = 1_000) -> Measured:
    """The accuracy of samples of which this share is right, whichever these are."""
    right = torch.arange(n) < n * value
    return Measured.mean(right[torch.randperm(n, generator=torch.Generator().manual_seed(seed))].double())


def test_distance_is_not_bought_with_accuracy():
    allowed = compared(1.0, candidate_accuracy=accuracy(0.96, 1), champion_accuracy=accuracy(0.97, 2))
    assert decide(*allowed, 1, "it").passed
    refused = decide(*compared(1.0, candidate_accuracy=accuracy(0.90, 1), champion_accuracy=accuracy(0.97, 2)), 1, "it")
    assert not refused.passed
    assert refused.reason.startswith("accuracy not below that of it: 0.9000, asked for at least 0.94")
    assert not decide(*compared(1.0, champion_accuracy=accuracy(0.97, 2)), 1, "it").passed
    # The same samples are right but for a few: then a small difference is one.
    nested = compared(1.0, candidate_accuracy=accuracy(0.96, 1), champion_accuracy=accuracy(0.97, 1))
    assert not decide(*nested, 1, "it").passed


def test_a_version_as_accurate_as_the_present_one_is_refused_for_its_accuracy_in_the_cases_that_are_said():
    generator, refused, trials = torch.Generator().manual_seed(0), 0, 2_000
    better = [measured(5.0, seed=1), measured(10.0, seed=2)]
    for _ in range(trials):
        right = [Measured.mean((torch.rand(better[0].n, generator=generator) < 0.9).double()) for _ in range(2)]
        found = decide(by(better[0], right[0]), by(better[1], right[1]), 1, "it")
        refused += not found.passed
    assert refused / trials == pytest.approx(ACCURACY_LEVEL, abs=0.011)  # three standard errors


def test_the_line_about_accuracy_counts_in_what_more_samples_are_said_to_tell():
    def told(found) -> float:
        return float(found.reason.split("tell a difference of ")[1].split(" ")[0])

    classes = compared(0.0, candidate_accuracy=accuracy(0.9, 1), champion_accuracy=accuracy(0.9, 2))
    with_line, without = told(decide(*classes, 1, "it")), told(decide(*compared(0.0), 1, "it"))
    z = NormalDist().inv_cdf
    wanted = (z(0.975) + z(0.9 / 0.975)) / (z(0.975) + z(0.9))
    assert with_line / without == pytest.approx(wanted, rel=0.03)  # both are said with two digits


@pytest.mark.parametrize("paired", [True, False])
def test_of_two_versions_that_are_equally_good_one_passes_in_the_cases_that_are_said(paired):
    """A pair of samples of the same noise is exchanged at random between the two, so neither is better."""
    generator = torch.Generator().manual_seed(0)
    passed = 0
    for _ in range(1_000):
        one = samples(generator)
        other = 0.5 * one + 0.866 * samples(generator, shift=0.17) if paired else samples(generator)
        exchange = (torch.rand(len(one), 1, generator=generator) < 0.5).float()
        ours, theirs = exchange * one + (1 - exchange) * other, exchange * other + (1 - exchange) * one
        passed += decide(by(frechet(ours)), by(frechet(theirs)), 1, "it").passed
    assert 12 <= passed <= 38


def test_of_many_attempts_against_one_champion_hardly_any_passes_wrongly():
    generator = torch.Generator().manual_seed(1)
    wrong = 0
    for _ in range(200):
        champion = frechet(samples(generator, 200))
        for attempt in range(1, 11):
            candidate = frechet(samples(generator, 200))
            wrong += decide(by(candidate), by(champion), attempt, "it").passed
    assert wrong <= 16  # 8.2 are expected at most; more than 16 would happen once in 200 repetitions


def test_scores_of_another_evaluator_other_data_or_another_number_do_not_compare():
    scores = made_up.scores()
    assert all(row.passed for row in comparable(scores, scores, "it"))
    for change in ({"evaluator_digest": "x"}, {"stream_digest": "x"}, {"n": 10}, {"stream_digest": ""}):
        assert [row.passed for row in comparable(replace(scores, **change), scores, "it")].count(False) == 1
    nothing = replace(scores, stream_digest="")
    assert not all(row.passed for row in comparable(nothing, nothing, "it"))


def test_the_noise_of_a_comparison_is_that_of_its_champion():
    assert gate_seed("digits", "champion", "a") == gate_seed("digits", "champion", "a")
    others = [("digits", "champion", "b"), ("digits", "staging", "a"), ("faces", "champion", "a")]
    seeds = {gate_seed(*other) for other in others} | {gate_seed("digits", "champion", "a")}
    assert len(seeds) == 4
    assert all(0 <= seed < 1 << 63 for seed in seeds)
