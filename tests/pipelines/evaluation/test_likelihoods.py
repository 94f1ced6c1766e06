"""The bound of real images: of the variance that has the tighter one, whatever the images are divided into."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddpm.model import load_model
from pipelines.evaluation import likelihoods
from pipelines.evaluation.likelihoods import Bounds, bound_bits
from tests.pipelines.drawing import model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(model_folder(tmp_path_factory.mktemp("model") / "model"))


def images(model, count: int = 5) -> torch.Tensor:
    levels = torch.randint(256, (count, *model.spec.shape), generator=torch.Generator().manual_seed(0))
    return levels.float() / 127.5 - 1


def bounds(model, x_0: torch.Tensor, first: int = 0) -> Bounds:
    return bound_bits(model, x_0, None, torch.arange(first, first + len(x_0)), 0)


def test_the_tighter_bound_is_that_of_the_lower_mean_over_all_images():
    low, high = np.array([1.0, 2.0]), np.array([1.5, 1.4])
    found = Bounds({"small": low, "large": high}, {"small": low[:, None], "large": high[:, None]}, np.array([1]))
    assert found.tighter == "large"
    first, second = (
        Bounds(
            {n: v[i : i + 1] for n, v in found.totals.items()},
            {n: v[i : i + 1] for n, v in found.terms.items()},
            found.timesteps,
        )
        for i in range(2)
    )
    assert (first.tighter, second.tighter) == ("small", "large")
    joined = Bounds.joined([first, second])
    assert joined.tighter == "large"
    assert np.array_equal(joined.totals["small"], low)


def test_images_have_the_same_bounds_in_any_batches(model):
    x_0 = images(model)
    whole, parts = bounds(model, x_0), Bounds.joined([bounds(model, x_0[:2]), bounds(model, x_0[2:], 2)])
    assert whole.tighter == parts.tighter
    for variance, total in whole.totals.items():
        np.testing.assert_allclose(parts.totals[variance], total, rtol=1e-5)
        np.testing.assert_allclose(whole.terms[variance].sum(1), total, rtol=1e-9)
    assert len(whole.timesteps) == whole.terms["small"].shape[1]


def test_one_pass_of_the_network_gives_both_and_no_more_than_the_smaller_alone(model, monkeypatch):
    found = bounds(model, images(model))
    assert set(found.totals) == {"small", "large"}
    assert found.totals[found.tighter].mean() <= found.totals["small"].mean()
    monkeypatch.setattr(likelihoods, "BOUND_STEPS", 3)
    assert bounds(model, images(model)).terms["large"].shape == (5, 4)
