from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm.generate import Sampling
from ddpm.quality import FeatureMoments
from pipelines.evaluation.compare import NEAREST, Comparison
from pipelines.evaluation.real import RealRows
from pipelines.evaluation.rows import Rows
from pipelines.evaluation.samples import DrawnRows, SamplePlan

WIDTH = 4
UNLABELLED = SimpleNamespace(labels=False, accuracy=None)


def comparison(folder, samples: int, test: int, train: int = 40) -> Comparison:
    """Samples beside real images, all of one distribution, by their features."""
    random = np.random.default_rng(0)

    def rows(name: str, count: int) -> Rows:
        found = Rows(folder / name, (WIDTH,), np.float32)
        found.write(0, random.normal(size=(count, WIDTH)).astype(np.float32))
        return found

    splits = {}
    for split, count in {"train": train, "test": test}.items():
        features = rows(split, count)
        others = RealRows.at(folder / "rest", split, WIDTH, (1, 2, 2))
        splits[split] = RealRows(features, others.labels, others.reference, others.pixels)
    moments = {name: FeatureMoments.of(torch.from_numpy(part.features.read(0, 99))) for name, part in splits.items()}
    real = SimpleNamespace(**{name: SimpleNamespace(moments=found) for name, found in moments.items()})
    finite = Rows(folder / "finite", (), np.bool_)
    finite.write(0, np.ones(samples, bool))
    drawn = DrawnRows(rows("samples", samples), Rows(folder / "pixels", (1, 2, 2), np.uint8), finite)
    plan = SamplePlan("d", Sampling.of(), samples, (1,), (), 8, "file:///none")
    reference = torch.from_numpy(splits["train"].features.read(0, train))
    noise = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0)) + 9
    return Comparison(plan, drawn, real, splits["train"], splits["test"], reference, noise)


@pytest.mark.parametrize("samples, test", [(2, 2), (NEAREST - 1, 40), (40, NEAREST - 1), (2, 40), (40, 2)])
def test_with_few_images_the_scores_of_nearest_neighbours_are_left_out_where_they_are_not_known(
    tmp_path, samples, test
):
    (tmp_path / "rest").mkdir()
    found = comparison(tmp_path, samples, test).estimates(UNLABELLED)
    assert found["frechet_distance"].floor is not None
    assert found["kid"].value < found["kid"].ceiling
    assert ("precision" in found) == ("coverage" in found) == (samples >= NEAREST)
    if "precision" in found:
        assert (found["precision"].floor is None) == (found["recall"].floor is None) == (test < NEAREST)


def test_more_noise_seeds_do_not_shrink_the_interval_of_a_share_of_the_same_real_images(tmp_path):
    (tmp_path / "rest").mkdir()
    one = comparison(tmp_path, 40, 40)
    same = replace(one, plan=replace(one.plan, n=20, seeds=(1,))).estimates(UNLABELLED)
    twice = np.concatenate([one.drawn.features.read(0, 20)] * 2)  # two seeds that happen to draw the same
    features = Rows(tmp_path / "twice", (WIDTH,), np.float32)
    features.write(0, twice)
    drawn = replace(one.drawn, features=features)
    both = replace(one, drawn=drawn, plan=replace(one.plan, n=20, seeds=(1, 2))).estimates(UNLABELLED)
    for name in ("recall", "coverage"):
        assert both[name].value == same[name].value
        assert both[name].standard_error == pytest.approx(same[name].standard_error)
    for name in ("precision", "density", "kid"):
        assert both[name].standard_error == pytest.approx(same[name].standard_error / 2**0.5)


def test_with_enough_images_each_has_its_value_and_floor(tmp_path):
    (tmp_path / "rest").mkdir()
    found = comparison(tmp_path, NEAREST, NEAREST).estimates(UNLABELLED)
    assert all(found[name].floor is not None for name in ("precision", "recall", "density", "coverage"))
