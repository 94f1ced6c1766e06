"""Near-duplicates: which images are alike, and that they are in one split."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pipelines.environment.scratch import temporary_folder
from pipelines.shards.ingest.alike import BITS, correlate, fingerprint
from pipelines.shards.ingest.alike import leaders as leaders_of
from pipelines.shards.ingest.neighbours import MOST_PARTS, near_groups, parts_for
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from tests.pipelines.shards.ingest.sources import opened, write_files

STORAGE = Storage()


def photograph(seed: int) -> Image.Image:
    """A smooth picture with some structure at every scale, as photographs have."""
    random = np.random.default_rng(seed)
    layers = [Image.fromarray(random.integers(0, 256, (n, n, 3), dtype=np.uint8)) for n in (3, 6, 12, 24)]
    pixels = sum(
        np.asarray(layer.resize((96, 96), Image.Resampling.BICUBIC), float) / 2**i for i, layer in enumerate(layers)
    )
    return Image.fromarray((pixels / 1.875).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def copies(image: Image.Image) -> dict[str, Image.Image]:
    return {
        "small": image.resize((48, 48)),
        "jpeg": Image.open(io.BytesIO(encoded(image, "jpeg", quality=40))),
        "bright": ImageEnhance.Brightness(image).enhance(1.1),
    }


def leaders(prints) -> list[int]:
    """For each fingerprint the position of the first similar one, or its own."""
    there = np.array([i for i, own in enumerate(prints) if own is not None])
    hashes = np.array([own.hash for own in prints if own is not None], np.uint64)
    with temporary_folder("leaders") as scratch:
        near = near_groups(iter([(there, hashes)]), BITS, scratch)
        joined = dict(leaders_of(near, lambda i, j: correlate(prints[i].small, prints[j].small)))
    return [joined.get(i, i) for i in range(len(prints))]


def test_resized_recompressed_and_brighter_copies_are_alike_and_other_photographs_are_not():
    originals = [photograph(seed) for seed in range(60)]
    images = [*originals, *(copy for image in originals for copy in copies(image).values())]
    found = leaders([fingerprint(image) for image in images])
    assert found[:60] == list(range(60))
    assert found[60:] == [seed for seed in range(60) for _ in range(3)]


def test_groups_do_not_grow_into_each_other():
    first, last = photograph(1), photograph(2)
    between = [Image.blend(first, last, share / 30) for share in range(31)]
    found = leaders([fingerprint(image) for image in between])
    assert len(set(found)) > 3
    assert all(found[leader] == leader for leader in found)


def test_images_of_one_grey_or_of_drawings_on_white_are_not_taken_for_each_other():
    assert fingerprint(Image.new("RGB", (32, 32), (90, 90, 90))) is None
    drawings = []
    for seed in range(80):
        random = np.random.default_rng(seed)
        pixels = np.full((64, 64), 255, np.uint8)
        x, y, w, h = (int(value) for value in random.integers((4, 4, 10, 10), (30, 30, 30, 30)))
        pixels[y : y + h, x : x + w] = 0
        drawings.append(fingerprint(Image.fromarray(pixels)))
    assert len(set(leaders(drawings))) > 70


def test_near_duplicates_are_in_one_split_and_the_report_says_so(tmp_path):
    files = {}
    for seed in range(40):
        image = photograph(seed)
        files[f"a/{seed:02d}.png"] = encoded(image, "png")
        files |= {
            f"a/{seed:02d}-{name}.jpg": encoded(copy.convert("RGB"), "jpeg") for name, copy in copies(image).items()
        }
    source = str(write_files(tmp_path / "photos", files))
    plain = {image.origin: image.split for image in opened(source, STORAGE, 0.3).images}
    assert any(len({plain[name] for name in files if name.startswith(f"a/{seed:02d}")}) == 2 for seed in range(40))
    done = ingest(source, f"file://{tmp_path}/ds", STORAGE, image_size=16, channels=3, test_fraction=0.3)
    listed = {split: done.dataset.samples(split) for split in ("train", "test")}
    assert sum(listed.values()) == 160
    assert listed["test"] % 4 == 0
    assert done.report.alike
    assert any("nearly the same as" in line for line in done.report.lines())
    again = ingest(source, f"file://{tmp_path}/again", STORAGE, image_size=16, channels=3, test_fraction=0.3)
    assert again.dataset.digest == done.dataset.digest


def test_a_split_that_the_source_makes_stays_as_it_is(tmp_path):
    files = {f"{split}/a/{i}.png": encoded(photograph(i), "png") for split in ("train", "test") for i in range(6)}
    source = str(write_files(tmp_path / "photos", files))
    done = ingest(source, f"file://{tmp_path}/ds", STORAGE, image_size=16, channels=3)
    assert {split: done.dataset.samples(split) for split in ("train", "test")} == {"train": 6, "test": 6}
    assert not done.report.alike


@pytest.mark.parametrize("parts", range(BITS + 1, MOST_PARTS + 1))
@pytest.mark.parametrize("in_a_file", [32, 1 << 17])
def test_every_pair_within_the_radius_is_found_whatever_the_number_of_parts(tmp_path, monkeypatch, parts, in_a_file):
    monkeypatch.setattr("pipelines.shards.ingest.neighbours.parts_for", lambda count, radius: parts)
    monkeypatch.setattr("pipelines.shards.ingest.neighbours.IN_A_FILE", in_a_file)
    random = np.random.default_rng(parts)
    first = random.integers(0, 1 << 63, 40, dtype=np.uint64)
    flipped = [random.choice(63, random.integers(0, 10), replace=False) for _ in range(4 * len(first))]
    masks = [np.uint64(sum(1 << int(bit) for bit in bits)) for bits in flipped]
    planted = [value ^ mask for value, mask in zip([*first] * 4, masks, strict=True)]
    hashes = np.concatenate([first, np.array(planted, np.uint64)])
    pieces = [(np.arange(begin, min(begin + 30, 200)), hashes[begin : begin + 30]) for begin in range(0, 200, 30)]
    listed = list(near_groups(iter(pieces), BITS, tmp_path))
    assert [position for position, _ in listed] == sorted({position for position, _ in listed})
    group = {position: group for position, (group, _) in listed}
    found = {(j, i) for j, (own, near) in listed for i in group if i < j and group[i] in (own, *near)}
    near = {(j, i) for j in range(200) for i in range(j) if int(hashes[i] ^ hashes[j]).bit_count() <= BITS}
    assert len(near) > 80
    assert any(hashes[i] == hashes[j] for j, i in near)
    assert found == near


def test_a_picture_that_is_there_very_often_is_compared_once_each_time(tmp_path):
    hashes = np.array([5, 6] * 20_000, np.uint64)
    near = near_groups(iter([(np.arange(len(hashes)), hashes)]), BITS, tmp_path)
    compared = []

    def alike(image: int, other: int) -> bool:
        compared.append((image, other))
        return True

    assert list(leaders_of(near, alike)) == [(image, 0) for image in range(1, 40_000)]
    assert len(compared) == 39_999


def test_more_hashes_are_divided_into_more_parts():
    chosen = [parts_for(count, BITS) for count in (10**3, 10**5, 10**7, 10**9)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1] > chosen[0]) == (BITS + 1, True)
