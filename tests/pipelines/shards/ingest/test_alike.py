"""Near-duplicates: which images are alike, and that they are in one split."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageEnhance

from pipelines.shards.ingest.alike import fingerprint, leaders
from pipelines.shards.ingest.sources import open_source
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from tests.pipelines.shards.ingest.sources import write_files

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
    plain = {image.origin: image.split for image in open_source(source, STORAGE, 0.3).images}
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
