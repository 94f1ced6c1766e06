"""Standard errors of scores from the influence of each image: they cover, they agree, they pair."""

import math

import pytest
import torch

from ddpm.quality import (
    FeatureMoments,
    density_coverage,
    frechet_distance,
    frechet_influence,
    halves,
    inception_score,
    kid,
    measure_density_coverage,
    measure_frechet,
    measure_inception_score,
    measure_kid,
    measure_precision_recall,
    precision_recall,
)


def normal(n, d, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def probabilities(n, seed):
    return torch.softmax(3 * normal(n, 5, seed), 1)


MEASURES = {
    "frechet": lambda x: measure_frechet(FeatureMoments.of(normal(4_000, 8, 0)), x),
    "kid": lambda x: measure_kid(normal(300, 8, 0), x),
    "precision": lambda x: measure_precision_recall(normal(300, 8, 0), x)[0],
    "density": lambda x: measure_density_coverage(normal(300, 8, 0), x)[0],
}


@pytest.mark.parametrize("name", MEASURES)
def test_intervals_cover_the_expectation_at_this_number_of_images(name):
    n, repeats = {"frechet": (500, 400), "kid": (200, 200)}.get(name, (200, 150))
    found = [MEASURES[name](normal(n, 8, seed, scale=1.2, shift=0.3)) for seed in range(1, repeats + 1)]
    expectation = sum(m.value for m in found) / repeats
    covered = sum(abs(m.value - expectation) < 1.96 * m.standard_error for m in found) / repeats
    assert 0.90 <= covered <= 0.99
    for measured in found:
        assert abs(measured.influence.mean()) < 1e-9


def test_the_standard_error_of_a_distance_agrees_with_that_of_random_halves():
    reference = FeatureMoments.of(normal(8_000, 64, 0))
    samples = normal(2_000, 64, 1, scale=1.1, shift=0.1)
    by_halves = halves(lambda x: frechet_distance(reference, FeatureMoments.of(x)), samples, draws=80, seed=0).std()
    assert measure_frechet(reference, samples).standard_error == pytest.approx(by_halves.item(), rel=0.2)


def test_paired_sets_are_told_apart_that_unpaired_ones_are_not():
    reference, one = FeatureMoments.of(normal(4_000, 8, 0)), normal(500, 8, 1, scale=1.2)
    other = one + 0.05 * normal(500, 8, 2)
    a, b = measure_frechet(reference, one), measure_frechet(reference, other)
    paired = (a.influence - b.influence).std() / math.sqrt(500)
    assert paired < math.hypot(a.standard_error, b.standard_error) / 4


def test_influence_of_a_part_is_that_part_of_the_influence():
    reference, samples = FeatureMoments.of(normal(500, 8, 0)), normal(100, 8, 1)
    whole = frechet_influence(reference, FeatureMoments.of(samples), samples)
    parts = [frechet_influence(reference, FeatureMoments.of(samples), part) for part in samples.split(30)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_influence_is_what_leaving_an_image_out_changes():
    reference, samples = FeatureMoments.of(normal(2_000, 4, 0)), normal(400, 4, 1, scale=1.5)
    influence = measure_frechet(reference, samples).influence
    whole = frechet_distance(reference, FeatureMoments.of(samples))
    for i in range(0, 400, 80):
        without = torch.cat([samples[:i], samples[i + 1 :]])
        change = frechet_distance(reference, FeatureMoments.of(without)) - whole
        assert -399 * change == pytest.approx(influence[i].item(), abs=0.05 * influence.abs().max().item())


def test_features_that_are_always_zero_leave_distance_and_error_as_they_are():
    # Networks with ReLUs have such features.
    reference, samples = normal(500, 6, 0), normal(200, 6, 1, scale=1.3)
    plain = measure_frechet(FeatureMoments.of(reference), samples)
    padded = [torch.cat([x, torch.zeros(len(x), 10, dtype=torch.float64)], 1) for x in (reference, samples)]
    dead = measure_frechet(FeatureMoments.of(padded[0]), padded[1])
    assert dead.value == pytest.approx(plain.value, rel=1e-6)
    assert dead.standard_error == pytest.approx(plain.standard_error, rel=1e-5)


def test_measured_values_are_those_of_the_plain_functions():
    real, fake, p = normal(120, 4, 0), normal(100, 4, 1), probabilities(100, 2)
    assert measure_kid(real, fake).value == kid(real, fake)
    assert measure_inception_score(p).value == inception_score(p)
    precision, recall = measure_precision_recall(real, fake)
    assert (precision.value, recall.value) == tuple(vars(precision_recall(real, fake)).values())
    assert (len(precision.influence), len(recall.influence)) == (100, 120)
    density, coverage = measure_density_coverage(real, fake)
    assert (density.value, coverage.value) == tuple(vars(density_coverage(real, fake)).values())


def test_density_and_coverage_of_points_on_a_line():
    # Balls to the second nearest neighbour: [-2, 2], [0, 2], [0, 4], [1, 7] and [2, 198].
    real = torch.tensor([[0.0], [1.0], [2.0], [4.0], [100.0]])
    fake = torch.tensor([[0.5], [0.5], [200.0], [500.0]])
    found = density_coverage(real, fake, k=2)
    # Both at 0.5 lie in the first three balls; the others lie in none.
    assert found.density == pytest.approx(2 * 3 / (2 * 4))
    assert found.coverage == pytest.approx(3 / 5)


def test_density_and_coverage_of_equal_distributions_and_of_a_collapsed_set():
    real, fake = normal(1_000, 8, 0), normal(1_000, 8, 1)
    equal = density_coverage(real, fake)
    assert equal.density == pytest.approx(1.0, abs=0.1)
    assert equal.coverage == pytest.approx(1 - 2**-5, abs=0.03)
    collapsed = density_coverage(real, 0.01 * fake)
    assert collapsed.coverage < 0.5
    assert collapsed.density > 1.5


def test_one_outlier_covers_no_real_image():
    # What recall, with balls around the fake ones, gets wrong (Naeem et al. 2020, fig. 2).
    real = normal(200, 2, 0)
    fake = torch.cat([normal(50, 2, 1, scale=0.01), torch.tensor([[50.0, 50.0]], dtype=torch.float64).repeat(4, 1)])
    assert density_coverage(real, fake).coverage < 0.2
