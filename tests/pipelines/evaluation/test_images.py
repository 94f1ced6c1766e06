import io
import tarfile

import numpy as np
import pytest
import torch

from pipelines.evaluation.images import pack_samples, thumbnail_size, thumbnails, to_levels, unpack_samples


@pytest.mark.parametrize("channels", [1, 3])
def test_a_shard_of_samples_gives_back_their_pixels(channels):
    images = np.random.default_rng(0).integers(0, 256, (5, 7, 9, channels), np.uint8)
    data = pack_samples(images, np.arange(5), 90, np.ones(5, bool))
    found, finite = unpack_samples(data, channels)
    np.testing.assert_array_equal(found, images)
    assert finite.all()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames()[:3] == ["000000090.png", "000000090.cls", "000000091.png"]


def test_equal_samples_are_equal_bytes():
    images = np.zeros((2, 4, 4, 1), np.uint8)
    whole = np.ones(2, bool)
    assert pack_samples(images, None, 0, whole) == pack_samples(images, None, 0, whole)


def test_a_shard_says_which_samples_were_no_finite_numbers():
    finite = np.array([True, False, True])
    data = pack_samples(np.zeros((3, 4, 4, 1), np.uint8), np.arange(3), 0, finite)
    np.testing.assert_array_equal(unpack_samples(data, 1)[1], finite)


def test_levels_are_those_of_a_picture():
    images = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.5]).reshape(5, 1, 1, 1)
    assert to_levels(images).flatten().tolist() == [0, 0, 128, 255, 255]


def test_small_images_are_their_own_small_copies_and_large_ones_are_averaged():
    small = torch.randint(0, 256, (2, 3, 8, 20), dtype=torch.uint8)
    np.testing.assert_array_equal(thumbnails(small), small.numpy())
    large = torch.zeros(1, 1, 128, 64, dtype=torch.uint8)
    large[..., ::2] = 200
    assert thumbnail_size(128, 64) == (32, 16)
    found = thumbnails(large)
    assert (found.shape, found.min(), found.max()) == ((1, 1, 32, 16), 100, 100)
