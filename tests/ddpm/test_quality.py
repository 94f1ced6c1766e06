import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm.quality import (
    FeatureMoments,
    PrecisionRecall,
    bootstrap,
    frechet_distance,
    inception_score,
    kid,
    precision_recall,
)


def features(n, d, seed, scale=1.0, shift=0.0):
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * z @ torch.linspace(0.5, 1.5, d, dtype=torch.float64).diag() + shift


@given(cut=st.integers(2, 97))
def test_moments_of_parts_add_up_to_those_of_the_whole(cut):
    whole = features(100, 5, 0)
    summed = FeatureMoments.of(whole[:cut]) + FeatureMoments.of(whole[cut:])
    torch.testing.assert_close(summed.mean, whole.mean(0))
    torch.testing.assert_close(summed.covariance, torch.from_numpy(np.cov(whole.numpy().T)))
    assert summed.count == 100


def test_the_distance_is_that_of_scipys_matrix_square_root():
    from scipy.linalg import sqrtm

    a, b = FeatureMoments.of(features(300, 6, 1)), FeatureMoments.of(features(200, 6, 2, scale=1.3, shift=0.4))
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_the_distance_of_a_set_to_itself_is_zero_and_of_a_shift_its_square():
    x = features(50, 8, 3)
    a = FeatureMoments.of(x)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, FeatureMoments.of(x + 2)) == pytest.approx(4 * 8, rel=1e-9)


def test_one_vector_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(FeatureMoments.of(features(1, 3, 0)), FeatureMoments.of(features(5, 3, 0)))


def test_kid_is_its_definition_in_chunks_of_any_size():
    a, b = features(7, 5, 0), features(4, 5, 1, shift=0.5)

    def k(x, y):
        return (x @ y / 5 + 1).item() ** 3

    def mean(pairs):
        values = [k(x, y) for x, y in pairs]
        return sum(values) / len(values)

    expected = (
        mean(itertools.permutations(a, 2)) + mean(itertools.permutations(b, 2)) - 2 * mean(itertools.product(a, b))
    )
    for chunk in (1, 3, 100):
        assert kid(a, b, chunk=chunk) == pytest.approx(expected, rel=1e-12)
    assert kid(a.float(), b.float()) == pytest.approx(expected, rel=1e-5)
    assert kid(b, a) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_kid_is_unbiased_at_every_sample_size(shift):
    """In one dimension MMD^2 is sum_j binomial(3, j) (E x^j - E y^j)^2; x ~ N(0, 1), y ~ N(shift, 1)."""
    moments = (shift, shift**2, shift**3 + 3 * shift)  # differences of the first three
    exact = 3 * moments[0] ** 2 + 3 * moments[1] ** 2 + moments[2] ** 2
    generator = torch.Generator().manual_seed(0)
    for n in (2, 10):
        z = torch.randn(1500, 2, n, 1, generator=generator, dtype=torch.float64)
        estimates = torch.tensor([kid(x, y + shift) for x, y in z], dtype=torch.float64)
        standard_error = estimates.std().item() / 1500**0.5
        assert estimates.mean().item() == pytest.approx(exact, abs=4 * standard_error)
        # Counting the pairs (x, x) adds 2 (E k(x, x) - E k(x, x')) / n = 2 (28 - 4) / n at least: it would be seen.
        assert 4 * standard_error < 48 / n


def test_the_inception_score_has_its_closed_forms():
    sure = torch.eye(5, dtype=torch.float64).repeat(4, 1)
    assert inception_score(sure) == pytest.approx(5)
    assert inception_score(torch.full((20, 5), 0.2)) == pytest.approx(1)
    unbalanced = torch.cat([sure[:1].expand(3, -1), sure[1:2]])
    assert inception_score(unbalanced) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    # Binary symmetric channel: log 2 less the entropy of its noise.
    noisy = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert inception_score(noisy) == pytest.approx(2 * math.exp(0.9 * math.log(0.9) + 0.1 * math.log(0.1)), rel=1e-6)


@given(seed=st.integers(0, 1000), scale=st.floats(0, 30))
def test_the_inception_score_lies_between_one_and_the_number_of_classes(seed, scale):
    logits = features(20, 4, seed, scale)
    score = inception_score(logits.float().softmax(1))
    assert 1 - 1e-12 <= score <= 4 + 1e-12
    assert inception_score(logits.softmax(1).flip(0)) == pytest.approx(score, rel=1e-5)


def test_identical_sets_cover_each_other_and_disjoint_sets_do_not():
    x = features(60, 6, 0)
    assert precision_recall(x, x) == PrecisionRecall(1, 1)
    assert precision_recall(x, x.flip(0), chunk=7) == PrecisionRecall(1, 1)
    assert precision_recall(x, x + 100) == PrecisionRecall(0, 0)


def test_precision_falls_with_unreal_samples_and_recall_with_missing_ones():
    x = features(200, 2, 0)
    # One half of the fakes are real images, the other half far from any.
    half_unreal = torch.cat([x[:100], x[:100] + 1000])
    assert precision_recall(x, half_unreal).precision == 0.5
    # Fakes of one of two real modes: every fake is real enough, and half of the real ones are out of reach.
    two_modes = torch.cat([x[:100], x[:100] + 1000])
    missing = precision_recall(two_modes, x[:100])
    assert missing == PrecisionRecall(1, 0.5)
    assert precision_recall(x[:100], two_modes) == PrecisionRecall(0.5, 1)


def test_balls_reach_to_the_kth_other_member():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # radii 1, 1, 2, 4 for k = 1; 3, 2, 3, 6 for k = 2
    fake = torch.tensor([[-1.0], [-1.01], [11.0], [11.01], [-3.0], [13.5]])
    assert precision_recall(real, fake, k=1).precision == pytest.approx(2 / 6)
    assert precision_recall(real, fake, k=2).precision == pytest.approx(5 / 6)


@given(seed=st.integers(0, 100), chunk=st.integers(1, 40), k=st.integers(1, 5))
def test_precision_and_recall_swap_with_the_sets_and_ignore_a_common_move(seed, chunk, k):
    a, b = features(30, 3, seed), features(20, 3, seed + 1, scale=1.5, shift=0.5)
    one, other = precision_recall(a, b, k), precision_recall(b, a, k, chunk=chunk)
    assert (one.precision, one.recall) == (other.recall, other.precision)
    assert precision_recall(a * 3 + 1e7, b * 3 + 1e7, k) == one


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [
        (torch.zeros(1, 3), torch.zeros(9, 3), "at least"),
        (torch.zeros(9, 3), torch.zeros(1, 3), "at least"),
        (torch.zeros(9, 3), torch.zeros(9, 4), "features must be"),
        (torch.zeros(9, 3, 1), torch.zeros(9, 3, 1), "features must be"),
        (torch.zeros(9, 3), torch.full((9, 3), float("nan")), "finite"),
    ],
)
@pytest.mark.parametrize("measure", [kid, precision_recall])
def test_features_that_cannot_be_compared_are_refused(measure, a, b, match):
    with pytest.raises(ValueError, match=match):
        measure(a, b)


def test_neighbours_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(features(3, 2, 0), features(9, 2, 1), k=3)
    with pytest.raises(ValueError, match="k must be"):
        precision_recall(features(9, 2, 0), features(9, 2, 1), k=0)


@pytest.mark.parametrize(
    "bad", [torch.ones(1, 1), torch.ones(4), torch.randn(5, 3), torch.ones(5, 3), torch.full((5, 2), float("nan"))]
)
def test_inputs_that_are_not_a_table_of_probabilities_are_refused(bad):
    with pytest.raises(ValueError, match="probabilities"):
        inception_score(bad)


def mean_of(x):
    return x.mean().item()


def frechet(a, b):
    return frechet_distance(FeatureMoments.of(a), FeatureMoments.of(b))


@pytest.mark.parametrize(
    ("statistic", "draw", "truth", "repeats"),
    [
        (mean_of, lambda i: (features(40, 1, i),), 0.0, 200),
        # Biased upwards by four fifths at this size: the interval is about the truth none the less.
        (frechet, lambda i: (features(200, 16, i), features(200, 16, i + 10**6, shift=0.25)), 1.0, 50),
        (kid, lambda i: (features(60, 1, i), features(60, 1, i + 10**6, shift=0.5)), None, 60),
    ],
    ids=["mean", "frechet", "kid"],
)
def test_ninety_percent_intervals_hold_the_truth_about_nine_times_in_ten(statistic, draw, truth, repeats):
    if truth is None:  # one dimension, N(0, 1/4) against its shift by 1/2
        shift, variance = 0.5, 0.25
        truth = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift * variance) ** 2
    intervals = [bootstrap(statistic, *draw(i), draws=40, seed=i, level=0.9) for i in range(repeats)]
    held = sum(i.low <= truth <= i.high for i in intervals) / repeats
    assert 0.8 <= held <= 0.98


def test_an_interval_repeats_with_its_seed_and_narrows_with_n_and_level():
    x, y = features(400, 1, 0), features(200, 1, 1)

    def difference(a, b):
        return (a.mean() - b.mean()).item()

    interval = bootstrap(difference, x, y, draws=400, seed=3)
    assert interval == bootstrap(difference, x, y, draws=400, seed=3)
    assert interval != bootstrap(difference, x, y, draws=400, seed=4)
    assert interval.value == difference(x, y)
    assert interval.n == (400, 200)
    # Both samples' own noise is in it, with nothing drawn in common.
    normal = 2 * 1.96 * (x.var().item() / 400 + y.var().item() / 200) ** 0.5
    assert interval.high - interval.low == pytest.approx(normal, rel=0.15)
    narrower = bootstrap(difference, x, y, draws=400, seed=3, level=0.5)
    assert narrower.high - narrower.low == pytest.approx(normal * 0.6745 / 1.96, rel=0.2)


def test_halves_hold_no_member_twice():
    seen = []

    def statistic(x):
        seen.append(x.tolist())
        return 0.0

    bootstrap(statistic, torch.arange(9.0), draws=40, seed=0)
    assert len(seen) == 41
    assert all(len(half) == len(set(half)) == 4 for half in seen[1:])
    assert len({tuple(sorted(half)) for half in seen[1:]}) > 20


@pytest.mark.parametrize(
    ("samples", "options", "match"),
    [
        ((), {}, "one sample or more"),
        ((torch.zeros(1, 2),), {}, "at least 2 members"),
        ((torch.zeros(5, 2), torch.zeros(1, 2)), {}, "at least 2 members"),
        ((torch.zeros(5, 2),), {"draws": 39}, "draws must be >= 40"),
        ((torch.zeros(5, 2),), {"draws": 100, "level": 0.99}, "draws must be >= 200"),
        ((torch.zeros(5, 2),), {"level": 1.0}, "level"),
        ((torch.zeros(5, 2),), {"level": 0.0}, "level"),
    ],
)
def test_a_bootstrap_without_enough_to_go_on_is_refused(samples, options, match):
    with pytest.raises(ValueError, match=match):
        bootstrap(mean_of, *samples, **{"draws": 40, "seed": 0} | options)
