"""Standard errors from the influence of each sample: intervals, paired differences, density and coverage."""

import math

import pytest
import torch

from ddpm.quality import (
    FeatureMoments,
    FrechetInfluence,
    Measured,
    density_coverage,
    frechet_distance,
    frechet_influence,
    halves,
    inception_score,
    kid,
    measured_diversity,
    measured_inception_score,
    measured_kid,
    measured_precision_recall,
    precision_recall,
)


def gaussian(n, d, seed, scale=1.0, shift=0.0):
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * z + shift


def standard_normal(d, count=10**6):
    """Return the moments of a reference that is N(0, I)."""
    return FeatureMoments(count, torch.zeros(d).double(), (count - 1) * torch.eye(d).double())


def measured_frechet(reference, features):
    moments = FeatureMoments.of(features)
    return Measured(frechet_distance(reference, moments), frechet_influence(reference, moments, features))


def probabilities(features):
    return features.softmax(1)


REAL = gaussian(150, 4, 10**6)
MEASURES = {
    "frechet": lambda x: measured_frechet(standard_normal(x.shape[1]), x),
    "kid": lambda x: measured_kid(REAL, x[:, :4]),
    "inception": lambda x: measured_inception_score(probabilities(x)),
    "precision": lambda x: measured_precision_recall(REAL, x[:, :4])[0],
    "density": lambda x: density_coverage(REAL, x[:, :4])[0],
    "accuracy": lambda x: Measured.mean(x[:, 0] > 0),
}


@pytest.mark.parametrize(("name", "n", "d"), [("frechet", 500, 8), *((m, 150, 4) for m in MEASURES if m != "frechet")])
def test_95_percent_intervals_hold_the_expectation_at_this_n(name, n, d):
    draws = [MEASURES[name](gaussian(n, d, seed, scale=1.3, shift=0.5)) for seed in range(400)]
    values = torch.tensor([m.value for m in draws], dtype=torch.float64)
    expectation = values.mean().item()
    if name == "frechet":  # the distance of the distributions, and its bias at this n, below which the interval may lie
        truth = d * (0.5**2 + 0.3**2)
        assert truth < expectation < truth * 1.05
    intervals = [m.interval() for m in draws]
    assert 0.90 <= sum(i.low <= expectation <= i.high for i in intervals) / 400 <= 0.98
    typical = sum(m.standard_error for m in draws) / 400
    assert typical == pytest.approx(values.std().item(), rel=0.12)


def test_the_standard_error_of_the_frechet_distance_is_that_of_halves():
    for seed in range(3):
        reference = FeatureMoments.of(gaussian(3000, 64, seed))
        features = gaussian(2000, 64, seed + 100, scale=1.1, shift=0.1)
        spread = halves(lambda x, r=reference: frechet_distance(r, FeatureMoments.of(x)), features, draws=150, seed=0)
        assert measured_frechet(reference, features).standard_error == pytest.approx(spread.std().item(), rel=0.15)


def test_the_influence_is_the_derivative_of_the_frechet_distance_towards_a_member():
    reference = FeatureMoments.of(gaussian(40, 5, 0) @ gaussian(5, 5, 1))
    features = gaussian(30, 5, 2) @ gaussian(5, 5, 3) + 0.3
    moments = FeatureMoments.of(features)
    n, size = len(features), 1e-5

    def towards(x, step):
        """Return the distance of the mixture of the set, with weight 1 - step, and a member, with weight step."""
        d = x - moments.mean
        covariance = (1 - step) * (moments.covariance + step * torch.outer(d, d))
        return frechet_distance(reference, FeatureMoments(n, moments.mean + step * d, covariance * (n - 1)))

    slopes = [(towards(x, size) - towards(x, -size)) / (2 * size) for x in features]
    expected = torch.tensor(slopes, dtype=torch.float64)
    found = frechet_influence(reference, moments, features)
    torch.testing.assert_close(found, expected - expected.mean(), rtol=1e-6, atol=1e-6)
    assert found.mean().item() == pytest.approx(0, abs=1e-9)


def test_the_influence_in_parts_is_that_of_the_whole():
    reference, features = FeatureMoments.of(gaussian(90, 6, 0)), gaussian(100, 6, 1, scale=1.2).float()
    moments = FeatureMoments.of(features[:37]) + FeatureMoments.of(features[37:])
    whole = frechet_influence(reference, moments, features)
    parts = FrechetInfluence.of(reference, moments)
    assert parts.distance == frechet_distance(reference, moments)
    torch.testing.assert_close(torch.cat([parts(part) for part in features.split(7)]), whole, rtol=1e-12, atol=1e-12)
    assert whole.dtype == torch.float64
    assert whole.mean().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dead_in", ["both", "reference", "set"])
@pytest.mark.parametrize("level", [0.0, 1e-9])
def test_dead_dimensions_add_no_more_than_their_own_variance(dead_in, level):
    """Half of the dimensions have no variance, or hardly any, as those of ReLUs that never fire."""
    alive = torch.tensor([1.0] * 4 + [0.0] * 4).double()
    real, fake = gaussian(300, 8, 0), gaussian(300, 8, 1, scale=1.2, shift=0.2)
    faint = alive + level * (1 - alive)
    reference = FeatureMoments.of(real * faint if dead_in != "set" else real)
    features = fake * faint if dead_in != "reference" else fake
    found = measured_frechet(reference, features)
    expected = measured_frechet(FeatureMoments.of(real[:, :4]), fake[:, :4]).influence
    if dead_in == "reference":  # where the reference has no variance, the distance is that of the members to its mean
        squares = (fake[:, 4:] - reference.mean[4:]).square().sum(1)
        expected = expected + squares - squares.mean()
    # The dead part couples to the living one only by chance correlations of 300 samples.
    assert found.standard_error == pytest.approx(Measured(0, expected).standard_error, rel=0.06)
    if dead_in == "both" and level == 0:
        torch.testing.assert_close(found.influence, expected, rtol=1e-8, atol=1e-8)


def test_the_influence_is_stable_for_fewer_members_than_dimensions():
    reference = FeatureMoments.of(gaussian(500, 64, 0))
    errors = []
    for seed in range(20):
        found = measured_frechet(reference, gaussian(40, 64, seed + 1, scale=1.1, shift=0.5))
        assert found.influence.isfinite().all()
        assert found.influence.mean().item() == pytest.approx(0, abs=1e-8)
        errors.append((found.value, found.standard_error))
    values, errors = torch.tensor(errors).T
    assert 0.7 < errors.mean() / values.std() < 1.7


@pytest.mark.parametrize("name", ["kid", "inception"])
def test_the_influence_is_what_leaving_a_sample_out_changes(name):
    x = gaussian(120, 4, 3, scale=1.3, shift=0.3)
    whole = MEASURES[name](x)
    without = [MEASURES[name](torch.cat([x[:i], x[i + 1 :]])).value for i in range(len(x))]
    changes = (len(x) - 1) * (whole.value - torch.tensor(without, dtype=torch.float64))
    torch.testing.assert_close(
        whole.influence, changes - changes.mean(), rtol=0.1, atol=0.03 * whole.influence.std().item()
    )


def test_measured_values_are_those_of_the_plain_functions():
    x = gaussian(120, 4, 3, scale=1.3)
    assert measured_kid(REAL, x).value == kid(REAL, x)
    assert measured_kid(REAL, x, chunk=7).value == pytest.approx(kid(REAL, x), rel=1e-12)
    assert measured_inception_score(probabilities(x)).value == inception_score(probabilities(x))
    precision, recall = measured_precision_recall(REAL, x)
    both = precision_recall(REAL, x)
    assert (precision.value, recall.value) == (both.precision, both.recall)
    assert (precision.n, precision.over, recall.n, recall.over) == (120, "generated", 150, "real")


@pytest.mark.parametrize("name", MEASURES)
def test_a_paired_difference_is_surer_than_an_unpaired_one_and_its_error_is_right(name):
    """The second sampler is the first one, moved a little."""
    pairs = []
    for seed in range(150):
        x = gaussian(150, 4, seed, scale=1.3, shift=0.5)
        other = x + gaussian(150, 4, seed + 5000, scale=0.3)
        pairs.append((MEASURES[name](x), MEASURES[name](other)))
    differences = torch.tensor([(a - b).value for a, b in pairs])
    paired = sum((a - b).standard_error for a, b in pairs) / len(pairs)
    unpaired = sum(math.hypot(a.standard_error, b.standard_error) for a, b in pairs) / len(pairs)
    assert paired < 0.75 * unpaired
    assert paired == pytest.approx(differences.std().item(), rel=0.2)


def test_recall_and_coverage_are_paired_by_real_image():
    x, y = gaussian(120, 4, 1, scale=0.6), gaussian(200, 4, 2, scale=0.6)  # of different sizes
    for measure in (measured_precision_recall, density_coverage):
        (first, a), (second, b) = measure(REAL, x), measure(REAL, y)
        difference = a - b
        assert (difference.n, difference.over) == (150, "real")
        assert difference.standard_error < math.hypot(a.standard_error, b.standard_error)
        with pytest.raises(ValueError, match="same samples"):
            first - second
        with pytest.raises(ValueError, match="same samples"):
            measure(REAL, gaussian(150, 4, 3))[0] - a


def test_an_interval_is_normal_around_the_value():
    measured = Measured.mean(torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]))
    assert measured.value == pytest.approx(0.6)
    assert measured.standard_error == pytest.approx(0.3**0.5 / 5**0.5)
    interval = measured.interval()
    assert interval.high - interval.value == pytest.approx(1.959964 * measured.standard_error, rel=1e-6)
    assert interval.value - interval.low == pytest.approx(interval.high - interval.value)
    assert interval.n == (5,)
    narrow = measured.interval(0.5)
    assert narrow.high - narrow.value == pytest.approx(0.674490 * measured.standard_error, rel=1e-6)
    with pytest.raises(ValueError, match="level"):
        measured.interval(1.0)
    with pytest.raises(ValueError, match="at least 2"):
        Measured.mean(torch.ones(1)).interval()


def test_density_and_coverage_are_their_definition():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # radii 1, 1, 2, 4 for k = 1; 3, 2, 3, 6 for k = 2
    fake = torch.tensor([[0.5], [4.5], [-0.5], [50.0]])
    # k = 1: in the balls of {0, 1}, {3, 7}, {0} and none: 5 balls of 4 fakes; every real ball holds one.
    density, coverage = density_coverage(real, fake, k=1)
    assert (density.value, coverage.value) == (5 / 4, 1)
    assert density.influence.tolist() == [0.75, 0.75, -0.25, -1.25]
    # k = 2: {0, 1, 3}, {3, 7}, {0, 1} and none, over 2.
    density, coverage = density_coverage(real, fake, k=2, chunk=1)
    assert (density.value, coverage.value) == (7 / 8, 1)
    density, coverage = density_coverage(real, fake[[1, 3]], k=1)
    assert (density.value, coverage.value) == (1, 0.5)
    assert coverage.influence.tolist() == [-0.5, -0.5, 0.5, 0.5]
    # What lies on the surface of a ball is outside: 2 is at the radius of 1, inside that of 3 and outside that of 0.
    density, coverage = density_coverage(real, torch.tensor([[2.0], [2.0]]), k=1)
    assert (density.value, coverage.value) == (1, 0.25)


def test_equal_distributions_have_the_expected_density_and_coverage_and_a_collapsed_set_has_not():
    n, m, k = 300, 200, 5
    draws = [density_coverage(gaussian(n, 6, s), gaussian(m, 6, s + 1000), k) for s in range(30)]
    densities = torch.tensor([d.value for d, _ in draws])
    coverages = torch.tensor([c.value for _, c in draws])
    expected = 1 - math.prod((n - i) / (n + m - i) for i in range(1, k + 1))
    assert densities.mean().item() == pytest.approx(1, abs=4 * densities.std().item() / 30**0.5)
    assert coverages.mean().item() == pytest.approx(expected, abs=4 * coverages.std().item() / 30**0.5)
    _, coverage = density_coverage(gaussian(n, 6, 0), gaussian(m, 6, 1, scale=0.01))
    assert coverage.value < 0.1
    density, _ = density_coverage(gaussian(n, 6, 0), gaussian(m, 6, 1, shift=50))
    assert density.value == 0


def test_density_and_coverage_refuse_what_they_cannot_compare():
    with pytest.raises(ValueError, match="k must be"):
        density_coverage(gaussian(9, 2, 0), gaussian(9, 2, 1), k=0)
    with pytest.raises(ValueError, match="at least 6"):
        density_coverage(gaussian(5, 2, 0), gaussian(9, 2, 1))
    with pytest.raises(ValueError, match="finite"):
        density_coverage(gaussian(9, 2, 0), gaussian(9, 2, 1) * math.nan)


def test_diversity_is_the_mean_squared_distance_of_pairs_within_a_class():
    x, labels = gaussian(60, 3, 5), torch.arange(60) % 4
    pairs = [torch.pdist(x[labels == c].double()).square().mean() * (labels == c).sum() / len(x) for c in range(4)]
    assert measured_diversity(x, labels).value == pytest.approx(torch.stack(pairs).sum().item(), rel=1e-12)
    assert measured_diversity(x).value == pytest.approx(torch.pdist(x.double()).square().mean().item(), rel=1e-12)


def test_one_image_for_each_class_has_no_diversity_however_far_the_classes_are_apart():
    labels = torch.arange(40) % 4
    assert measured_diversity(10 * torch.eye(4)[labels], labels).value == pytest.approx(0, abs=1e-9)


def test_classes_of_a_single_image_have_no_pairs():
    x = gaussian(5, 3, 6)
    found = measured_diversity(x, torch.tensor([0, 0, 1, 2, 2]))
    assert found.n == 4
    with pytest.raises(ValueError, match="a class of at least 2 images"):
        measured_diversity(x, torch.arange(5))
