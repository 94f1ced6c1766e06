"""Of equal settings none is called better, however many are confirmed; of better ones those that are."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from ddpm.generate import Sampling
from ddpm.quality import FeatureMoments, Measured
from pipelines.evaluation.compare import Distance
from pipelines.evaluation.paired import LEVEL, holm, paired_test
from pipelines.evaluation.real import Real, RealSplit
from pipelines.search.confirmation import DEFAULT, decide, winner_of
from pipelines.signing import Derived
from pipelines.storage import Storage

WIDTH, SAMPLES = 6, 200
REAL = torch.randn(600, WIDTH, generator=torch.Generator().manual_seed(0))
DISTANCES = {
    "frechet_distance": Distance(FeatureMoments.of(REAL), None),
    "kid": Distance(FeatureMoments.of(REAL), REAL[:200]),
}


def drawn(count: int, generator: torch.Generator, gains: tuple[float, ...] = ()) -> list[torch.Tensor]:
    """Features of settings that share most of their noise, all as far from the real ones but for `gains`."""
    shared = torch.randn(SAMPLES, WIDTH, generator=generator)
    offsets = [0.8 - gain for gain in (*gains, *[0.0] * (count - len(gains)))]
    own = [torch.randn(SAMPLES, WIDTH, generator=generator) for _ in range(count)]
    return [1.2 * (0.8 * shared + 0.6 * alone) + at for alone, at in zip(own, offsets, strict=True)]


def confirmed(distance: Distance, features: list[torch.Tensor]):
    """The decision about settings, the first of which is the default."""
    names = [DEFAULT, *(f"trial-{i}" for i in range(1, len(features)))]
    nothing, settings = {name: {} for name in names}, dict.fromkeys(names, Sampling())
    measured = {name: distance(some) for name, some in zip(names, features, strict=True)}
    return decide(nothing, settings, measured, nothing, distance.measure)


@pytest.mark.heavy
@pytest.mark.parametrize("measure, repeats", [("frechet_distance", 1000), ("kid", 200)])
def test_the_chance_of_any_false_winner_is_kept_whatever_the_number_of_equal_settings(measure, repeats):
    generator, numbers = torch.Generator().manual_seed(1), (1, 3, 8)
    found, uncorrected = dict.fromkeys(numbers, 0), 0
    for _ in range(repeats):
        measured = [DISTANCES[measure](features) for features in drawn(9, generator)]
        p_values = {str(i): paired_test(measured[0] - one)[1] for i, one in enumerate(measured[1:])}
        for k in numbers:
            found[k] += bool(holm({name: p_values[name] for name in list(p_values)[:k]}))
        uncorrected += min(p_values.values()) <= LEVEL
    error = math.sqrt(LEVEL * (1 - LEVEL) / repeats)
    assert all(count / repeats <= LEVEL + 2 * error for count in found.values()), found
    assert uncorrected / repeats > LEVEL + 4 * error  # so the correction is what keeps it
    assert sum(found.values()) > 0  # and it is no test that never rejects


@pytest.mark.parametrize("measure", DISTANCES)
def test_settings_that_are_better_are_found_among_equal_ones_and_the_best_wins(measure):
    features = drawn(6, torch.Generator().manual_seed(3), gains=(0.0, 0.25, 0.4))
    found = confirmed(DISTANCES[measure], features)
    assert {c.trial for c in found if c.better} == {"trial-1", "trial-2"}
    winner = winner_of(found)
    assert (winner.trial, found[0].trial, winner.measure) == ("trial-2", "trial-2", measure)
    assert winner.gain.low > 0
    assert winner.z == pytest.approx(
        winner.gain.value / ((winner.gain.high - winner.gain.low) / (2 * 1.959964)), rel=1e-4
    )
    (default,) = [c for c in found if c.trial == DEFAULT]
    assert (default.gain, default.z, default.p, default.better) == (None, None, None, False)
    assert [c.distance.value for c in found] == sorted(c.distance.value for c in found)


def test_one_of_many_has_to_be_better_by_more_than_one_alone():
    """The interval of one setting alone excludes 0, and Holm's method still does not accept it among eight."""
    influence = torch.tensor([1.0, -1.0]).repeat(128)
    default = Measured(2.2 * influence.std().item() / 16, influence)
    measured = {DEFAULT: default} | {f"t{i}": Measured(9.0, 0 * influence) for i in range(8)}
    measured["t0"] = Measured(0.0, 0 * influence)
    nothing, settings = {name: {} for name in measured}, dict.fromkeys(measured, Sampling())
    of_eight = decide(nothing, settings, measured, nothing, "frechet_distance")[0]
    assert of_eight.trial == "t0"
    assert of_eight.gain.low > 0
    assert (of_eight.z, of_eight.better) == (pytest.approx(2.2), False)
    assert decide({DEFAULT: {}, "t0": {}}, settings, measured, nothing, "frechet_distance")[0].better


@pytest.mark.parametrize("width, measure", [(256, "frechet_distance"), (257, "kid")])
def test_the_kernel_distance_decides_above_256_features_and_is_to_the_reference_images_alone(tmp_path, width, measure):
    features = np.random.default_rng(0).normal(size=(5, width)).astype(np.float32)
    reference = np.array([True, False, True, True, False])
    rows = {"features": features, "labels": np.arange(5), "reference": reference}
    rows["pixels"] = np.zeros((5, 1, 2, 2), np.uint8)
    stored = Derived(Storage(), f"file://{tmp_path}", "real.json", "the real images")
    files = {"train-000000000.safetensors": stored.write("train-000000000.safetensors", save(rows))}
    split = RealSplit(5, (), FeatureMoments.of(torch.from_numpy(features[reference])))
    real = Real(stored, files, "s", split, split, width, (1, 2, 2))
    distance = Distance.of(real)
    assert distance.measure == measure
    if measure == "kid":
        assert torch.equal(distance.real, torch.from_numpy(features[reference]))


def test_a_distance_needs_only_moments_for_few_features():
    assert Distance.of(SimpleNamespace(width=64, train=SimpleNamespace(moments=1))).real is None
