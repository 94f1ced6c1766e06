"""The nearest of k candidates of noise."""

import math

import pytest
import torch

from ddpm.noise import Purpose, normal, words
from ddpm.noise_choice import nearest_noise

SHAPE = (3, 5, 5)  # an odd number of values: draws do not share a block
N = torch.arange(40) + (1 << 33)
X_0 = 0.5 * normal(9, N, Purpose.CAPTION, SHAPE)


def candidates(k, shape=SHAPE, n=N):
    return torch.stack([normal(7, n, Purpose.NOISE, shape, draw=j) for j in range(k)])


def test_one_candidate_is_the_noise_of_ordinary_training_bit_for_bit():
    assert torch.equal(nearest_noise(X_0, 7, N, 1), normal(7, N, Purpose.NOISE, SHAPE))
    with pytest.raises(ValueError, match="candidates must be >= 1, got 0"):
        nearest_noise(X_0, 7, N, 0)


def test_the_chosen_one_is_the_nearest_of_all():
    drawn = candidates(6)
    distances = (drawn - X_0).flatten(2).norm(dim=2)
    expected = drawn[distances.argmin(0), torch.arange(len(N))]
    assert torch.equal(nearest_noise(X_0, 7, N, 6), expected)
    assert len(distances.argmin(0).unique()) > 3


def test_candidates_are_different_draws_and_the_first_ones_of_more():
    drawn = candidates(4).flatten(2).double()
    correlation = torch.corrcoef(drawn.flatten(1)) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(drawn[0].numel())
    both = torch.cat([words(7, N, Purpose.NOISE, 76, draw=j) for j in range(2)], dim=1)
    assert torch.equal(both, words(7, N, Purpose.NOISE, 152))  # successive blocks of one stream, none of them twice


def test_what_an_image_gets_does_not_depend_on_its_batch():
    whole = nearest_noise(X_0, 7, N, 4)
    for part in (slice(3, 4), slice(1, None, 3)):
        assert torch.equal(nearest_noise(X_0[part], 7, N[part], 4), whole[part])


def test_the_noise_depends_on_the_image_and_is_shorter_than_independent_noise():
    """|x - eps|^2 has the variance 2 d + 4 |x|^2, of which 2 d is that of |eps|^2."""
    n, d, best_of_8 = torch.arange(4000), 64, 1.4236  # the mean of the largest of 8 standard normal numbers
    x_0 = 0.5 * normal(3, n, Purpose.CAPTION, (d,))
    eps = nearest_noise(x_0, 7, n, 8).double()
    spread = math.sqrt(2 * d + 4 * 0.25 * d)
    assert eps.square().sum(1).mean().item() == pytest.approx(d - best_of_8 * 2 * d / spread, rel=0.03)
    assert (eps * x_0).sum(1).mean().item() == pytest.approx(best_of_8 * 2 * 0.25 * d / spread, rel=0.15)
