import io
import json
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import beta

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, generate, to_uint8
from ddpm.memorisation import Neighbours, feature_neighbours, memorisation, pixel_neighbours
from ddpm.model import load_model

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier"
DRAWS = 20


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def moved(images, down, right):
    """Move images, with their edges repeated where nothing was moved to."""
    height, width = images.shape[2:]
    rows, columns = (
        (torch.arange(height) - down).clamp(0, height - 1),
        (torch.arange(width) - right).clamp(0, width - 1),
    )
    return images[:, :, rows][:, :, :, columns]


def as_jpeg(images, quality=75):
    def again(image):
        picture = image.permute(1, 2, 0).squeeze(2).numpy()
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        return torch.from_numpy(np.array(Image.open(file))).reshape(*image.shape[1:], -1).permute(2, 0, 1)

    return torch.stack([again(image) for image in images])


def by_hand(a, b):
    """Return the least distance of two images over mirroring and moves, pixel by pixel."""
    height, width = a.shape[1:]
    found = []
    for image in (a, a.flip(2)):
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                squares = [
                    (float(image[c, i - down, j - right]) - float(b[c, i, j])) ** 2
                    for c in range(len(a))
                    for i in range(height)
                    for j in range(width)
                    if 0 <= i - down < height and 0 <= j - right < width
                ]
                found.append((sum(squares) / len(squares)) ** 0.5)
    return min(found)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 3), (1, 3, 6)])
def test_distances_are_the_least_over_mirroring_and_moves_of_the_overlap(shape):
    images, training = noise(4, *shape, seed=1), noise(9, *shape, seed=2)
    expected = torch.tensor([[by_hand(a, b) for b in training] for a in images]).sort(dim=1)
    found = pixel_neighbours(images, training, k=5)
    torch.testing.assert_close(found.distance, expected.values[:, :5], rtol=1e-5, atol=0)
    assert torch.equal(found.index, expected.indices[:, :5])
    assert found.n_train == 9


@settings(deadline=None, max_examples=30)
@given(
    mirrored=st.booleans(),
    down=st.integers(-1, 1),
    right=st.integers(-1, 1),
    channels=st.sampled_from([1, 3]),
    size=st.sampled_from([(8, 8), (6, 9), (9, 5)]),
)
def test_a_copy_is_found_with_its_transformation_at_distance_zero(mirrored, down, right, channels, size):
    training = noise(30, channels, *size)
    copies = moved(training[[7, 21]], down, right)
    copies = copies.flip(3) if mirrored else copies
    found = pixel_neighbours(copies, training)
    assert found.index[:, 0].tolist() == [7, 21]
    assert found.distance[:, 0].tolist() == [0, 0]
    assert (found.distance[:, 1] > 40).all()
    # The search tells how the copy was moved back: mirroring first, then the opposite move.
    undone = copies.flip(3) if mirrored else copies
    assert found.mirrored[:, 0].tolist() == [mirrored] * 2
    assert found.shift[:, 0].tolist() == [[-down, -right]] * 2
    back = moved(undone, -down, -right)
    assert torch.equal(back[:, :, 1:-1, 1:-1], training[[7, 21]][:, :, 1:-1, 1:-1])


def test_the_parts_of_a_search_and_a_memory_map_do_not_change_what_it_finds(tmp_path, monkeypatch):
    images, training = noise(23, 3, 5, 4, seed=1), noise(57, 3, 5, 4, seed=2)
    whole = pixel_neighbours(images, training, exclude=torch.arange(23))
    np.save(tmp_path / "training.npy", training.numpy())
    mapped = np.load(tmp_path / "training.npy", mmap_mode="r")
    monkeypatch.setattr("ddpm.memorisation._BYTES", 8 * 60 * 7)  # seven training images, or less than one image, a time
    parts = pixel_neighbours(images, mapped, exclude=torch.arange(23))
    for field in ("distance", "index", "mirrored", "shift"):
        assert torch.equal(getattr(parts, field), getattr(whole, field))


def test_an_excluded_image_is_not_found_and_its_duplicate_is():
    training = torch.cat([noise(9, 1, 4, 4), noise(1, 1, 4, 4)])  # the last is the first one again
    training[9] = training[0]
    found = pixel_neighbours(training[:2], training, k=2, exclude=torch.tensor([0, 1]))
    assert found.index[0, 0] == 9
    assert found.distance[0, 0] == 0
    assert 1 not in found.index[1]


def test_features_are_compared_by_their_euclidean_distance_far_from_the_origin_too():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 7, generator=generator) + 1e4, torch.randn(60, 7, generator=generator) + 1e4
    found = feature_neighbours(a, b, k=4)
    expected = (a.double()[:, None] - b.double()).square().sum(2).sqrt().sort(dim=1)
    torch.testing.assert_close(found.distance.double(), expected.values[:, :4], rtol=1e-6, atol=1e-6)
    assert torch.equal(found.index, expected.indices[:, :4])
    assert not found.mirrored.any()
    assert feature_neighbours(b.numpy()[3:5], b.numpy()).index[:, 0].tolist() == [3, 4]


def test_the_closest_pairs_are_the_copies():
    training = noise(40, 1, 8, 8)
    images = torch.cat([noise(10, 1, 8, 8, seed=1), moved(training[[5]].flip(3), 1, 0), as_jpeg(training[[9]], 95)])
    first, second = pixel_neighbours(images, training).closest(2)
    assert (first.image, first.training, first.mirrored, first.distance) == (10, 5, True, 0)
    assert first.shift == (-1, 0)
    assert (second.image, second.training, second.mirrored) == (11, 9, False)
    assert 0 < second.distance < 20


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    return torch.from_numpy(np.round(load_digits().images * (255 / 16))).to(torch.uint8)[:, None]


def split(images, seed):
    """Return 1,000 training images, 400 held out and 200 others."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:1000]], images[order[1000:1400]], images[order[1400:1600]]


ALTERED = {
    "as they are": lambda x: x,
    "mirrored": lambda x: x.flip(3),
    "moved": lambda x: moved(x, 1, -1),
    "as JPEG": as_jpeg,
}


def joined(a, b):
    """Return the neighbours of the images of both."""
    parts = {name: torch.cat([getattr(a, name), getattr(b, name)]) for name in ("distance", "index")}
    return replace(a, **parts)


def some(found, images):
    return replace(found, distance=found.distance[images], index=found.index[images])


def test_copies_are_named_in_every_draw_and_real_images_in_none(digits):
    shares = []
    for seed in range(DRAWS):
        training, held_out, real = split(digits, seed)
        reference, genuine = pixel_neighbours(held_out, training), pixel_neighbours(real, training)
        found = memorisation(genuine, reference)
        shares.append(found.share)
        assert not found.copies
        for name, alter in ALTERED.items():
            copies = pixel_neighbours(alter(training[seed : seed + 100]), training)
            found = memorisation(copies, reference)
            assert found.copies, f"draw {seed}: copies {name} were not named"
            assert found.share > 0.97
            tenth = joined(some(copies, slice(20)), some(genuine, slice(20, None)))
            found = memorisation(tenth, reference)
            assert found.copies, f"draw {seed}: a tenth of copies {name} was not named"
            assert found.ratio > 9
    # The share of real images is the level, 4 of 401, within three standard errors of 20 draws.
    assert np.mean(shares) == pytest.approx(4 / 401, abs=3 * np.std(shares) / DRAWS**0.5)


def test_copies_are_not_authentic_and_about_half_of_real_images_are(digits):
    training, held_out, real = split(digits, 0)
    reference = pixel_neighbours(held_out, training)

    def authenticity(images):
        samples = pixel_neighbours(images, training)
        nearest = samples.index[:, 0]
        own = pixel_neighbours(training[nearest], training, k=1, exclude=nearest)
        return memorisation(samples, reference, own=own).authenticity

    assert authenticity(training[:50]) == 0
    assert authenticity(as_jpeg(training[:50])) == 0
    assert 0.4 < authenticity(real) < 0.8


def pictures(count, seed):
    """Return coloured pictures of 24 x 32, every second one with hardly any contrast, like a clear sky."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(24, 32), mode="bicubic")
    contrast = torch.tensor([50.0, 3.0]).repeat(count)[:count, None, None, None]
    return (128 + contrast * smooth).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_copies_are_named_where_some_images_are_near_one_another_anyway(alter):
    training, held_out = pictures(200, 0), pictures(150, 1)
    reference = pixel_neighbours(held_out, training)
    copies = alter(training[:60:2])  # of much contrast
    samples = pixel_neighbours(torch.cat([copies, pictures(60, 2)]), training)
    found = memorisation(samples, reference)
    assert found.copies
    assert found.share >= 30 / 90
    assert sorted(pair.image for pair in samples.closest(30)) == list(range(30))
    assert not memorisation(pixel_neighbours(pictures(90, 3), training), reference).copies


def test_smooth_and_typical_images_are_not_copies(digits):
    for seed in range(5):
        training, held_out, real = split(digits, seed)
        reference = pixel_neighbours(held_out, training)
        typical = (0.6 * real.float() + 0.4 * training.float().mean(0)).to(torch.uint8)
        assert not memorisation(pixel_neighbours(typical, training), reference).copies
        smooth = torch.nn.functional.avg_pool2d(real.float(), 3, 1, 1).to(torch.uint8)
        assert not memorisation(pixel_neighbours(smooth, training), reference).copies


def test_copies_are_named_by_features_and_real_images_are_not(digits):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(32, 1, 3, 3, generator=generator)

    def encode(images):
        return torch.nn.functional.avg_pool2d(torch.nn.functional.conv2d(images / 255, weights).relu(), 2).flatten(1)

    for seed in range(DRAWS):
        training, held_out, real = split(digits, seed)
        kept = encode(training)
        reference = feature_neighbours(encode(held_out), kept)
        assert not memorisation(feature_neighbours(encode(real), kept), reference).copies
        for alter in (ALTERED["as they are"], as_jpeg):
            few = torch.cat([alter(training[:20]), real[20:]])
            assert memorisation(feature_neighbours(encode(few), kept), reference).copies


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_trained_model_is_no_copier(digits, scale):
    """The model of the fixture, trained on 96 digits; the digits not among them are held out."""
    kept = []
    for path in sorted((EARLIER / "dataset").glob("train-*.tar")):
        with tarfile.open(path) as tar:
            files = [tar.extractfile(member) for member in tar if member.name.endswith(".png")]
            kept += [torch.from_numpy(np.array(Image.open(file).convert("L")))[None] for file in files]
    training = torch.stack(kept)
    known = (digits[:, None] == training).flatten(2).all(2).any(1)
    assert known.sum() == len(training) == 96
    model = load_model(EARLIER / "version" / "model")
    sampling = Sampling.of(steps=10, scale=scale)
    cond = Conditioning(label=torch.arange(100) % 10)
    images = generate(model.denoiser, model.schedule, sampling, cond=cond, shape=model.spec.shape, seed=0)
    samples = pixel_neighbours(to_uint8(images).permute(0, 3, 1, 2), training)
    reference = pixel_neighbours(digits[~known], training)
    assert not memorisation(samples, reference).copies
    # The same samples beside copies of the training images: the check would have seen them.
    copies = torch.cat([to_uint8(images).permute(0, 3, 1, 2)[:90], training[:10]])
    assert memorisation(pixel_neighbours(copies, training), reference).copies


def neighbours(nearest, others=1.0, n_train=100):
    """Return neighbours with these distances to the nearest, and the same for all others."""
    nearest = torch.as_tensor(nearest, dtype=torch.float32)
    distance = torch.cat([nearest[:, None], torch.full((len(nearest), 5), others)], 1)
    still = torch.zeros(*distance.shape, 2, dtype=torch.long)
    return Neighbours(distance, still[..., 0], still[..., 0].bool(), still, n_train)


def test_ratio_and_bound_are_those_of_binomial_and_order_statistics():
    held_out = neighbours(torch.arange(1, 400) / 400)  # the 4th of 399 is at 0.01
    samples = neighbours([0.0] * 3 + [0.0099] * 27 + [0.01] * 20 + [0.5] * 150)
    found = memorisation(samples, held_out, own=neighbours([0.25] * 200))
    assert found.level == 4 / 400
    assert found.threshold == pytest.approx(0.01)
    assert found.share == 30 / 200
    assert found.ratio == pytest.approx(15)
    assert found.bound == pytest.approx(beta.ppf(0.025, 30, 171) / beta.ppf(0.975, 4, 396), rel=1e-9)
    assert found.copies == (found.bound > 2)
    assert found.authenticity == 150 / 200
    assert (found.n, found.n_held_out, found.n_train) == (200, 399, 100)
    assert json.loads(json.dumps(asdict(found))) == asdict(found)


def test_the_bound_exceeds_one_for_real_images_in_at_most_one_of_twenty_draws():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(200, 400, generator=generator)
    bounds = [memorisation(neighbours(d[:200]), neighbours(d[200:]), level=0.05).bound for d in draws]
    assert np.mean(np.array(bounds) > 1) < 0.05


def test_few_held_out_images_still_name_a_copier_and_exact_duplicates_in_the_data_name_no_one():
    held_out = neighbours(torch.arange(1, 25) / 25)
    assert memorisation(neighbours([0.0] * 50), held_out).copies
    assert memorisation(neighbours([0.0] * 50), held_out).level == 1 / 25
    duplicated = neighbours([0.0] * 30 + [0.5] * 370)
    assert not memorisation(duplicated, duplicated).copies


@pytest.mark.parametrize("exact, held", [(4, 400), (1, 50), (2, 20)])
def test_a_copier_is_named_although_some_held_out_images_match_a_training_image_exactly(exact, held):
    held_out = neighbours([0.0] * exact + [0.5] * (held - exact))
    found = memorisation(neighbours([0.0] * 50), held_out)
    assert found.copies
    assert (found.share, found.level) == (1, exact / (held + 1))
    honest = memorisation(neighbours([0.0] * 1 + [0.5] * (held - 1)), held_out)
    assert not honest.copies


def test_an_image_held_many_times_is_still_at_relative_distance_zero():
    training = noise(1, 1, 6, 6).repeat(30, 1, 1, 1)
    assert pixel_neighbours(training[:1], training).relative().tolist() == [0]


def test_what_cannot_be_compared_is_refused():
    images, training = noise(3, 1, 4, 4), noise(8, 1, 4, 4)
    with pytest.raises(ValueError, match="one size"):
        pixel_neighbours(noise(3, 1, 4, 5), training)
    with pytest.raises(ValueError, match="uint8"):
        pixel_neighbours(images.float(), training)
    with pytest.raises(ValueError, match="shift must be"):
        pixel_neighbours(images, training, shift=4)
    with pytest.raises(ValueError, match="at least 9"):
        pixel_neighbours(images, training, k=8, exclude=torch.arange(3))
    with pytest.raises(ValueError, match="features must be"):
        feature_neighbours(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="finite"):
        feature_neighbours(torch.zeros(3, 4), torch.full((9, 4), float("nan")))
    found = pixel_neighbours(images, training)
    with pytest.raises(ValueError, match="same training images"):
        memorisation(found, pixel_neighbours(images, training[:7]))
    with pytest.raises(ValueError, match="k >= 2"):
        pixel_neighbours(images, training, k=1).relative()
    with pytest.raises(ValueError, match="level must be"):
        memorisation(found, found, level=0.0)
    with pytest.raises(ValueError, match="held-out"):
        memorisation(found, neighbours([], n_train=8))
    with pytest.raises(ValueError, match="own must"):
        memorisation(found, found, own=neighbours([0.0], n_train=8))
