import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm.quality import FeatureMoments, frechet_distance


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
