"""What is said of copies of training images, and of how many images it is said."""

import numpy as np
import pytest

from pipelines.evaluation import copies
from pipelines.evaluation.copies import look_for_copies
from pipelines.evaluation.real import RealRows
from pipelines.evaluation.rows import Rows
from pipelines.evaluation.samples import DrawnRows


def rows(folder, name, content) -> Rows:
    made = Rows(folder / name, content.shape[1:], content.dtype)
    made.write(0, content)
    return made


def split(folder, pictures) -> RealRows:
    folder.mkdir()
    count = len(pictures)
    flat = pictures.reshape(count, -1).astype(np.float32)
    zeros, ones = np.zeros(count, np.int64), np.ones(count, bool)
    return RealRows(
        rows(folder, "f", flat), rows(folder, "l", zeros), rows(folder, "r", ones), rows(folder, "p", pictures)
    )


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (160, 1, 4, 4), dtype=np.uint8)


def drawn(folder, pictures) -> DrawnRows:
    found = split(folder, pictures)
    return DrawnRows(found.features, found.pixels, found.reference)


def test_copies_of_training_images_are_named(tmp_path, pictures):
    train, test = split(tmp_path / "train", pictures[:100]), split(tmp_path / "test", pictures[100:130])
    honest = look_for_copies(train, test, drawn(tmp_path / "fresh", pictures[130:]), 30)
    copied = look_for_copies(train, test, drawn(tmp_path / "copied", pictures[:30]), 30)
    assert honest is not None
    assert copied is not None
    assert (honest.named, copied.named) == (False, True)
    assert "were searched" not in honest.verdict() + copied.verdict()
    assert (honest.to_plain()["searched"], honest.to_plain()["training"]) == (100, 100)


def test_a_finding_says_what_share_of_the_training_images_was_searched(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(copies, "TRAINING", 40)
    train, test = split(tmp_path / "train", pictures[:100]), split(tmp_path / "test", pictures[100:130])
    found = look_for_copies(train, test, drawn(tmp_path / "later", pictures[60:90]), 30)
    assert found is not None
    assert not found.named
    assert found.verdict().endswith("in the 40% of the training images that were searched")
    assert (found.to_plain()["searched"], found.to_plain()["training"]) == (40, 100)
