"""Files of samples, of classes whose names no file may have."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from ddpm.model import ModelSpec, load_model, save_model
from ddpm.models.unet import UNet
from pipelines.sampling import file_name, parse_labels, write_samples
from tests.pipelines.checkpoints.tiny import SMALL

CLASSES = ("cat/dog", "../../up", "a, b", "плюс", "n" * 300)
UNET = replace(SMALL, num_classes=len(CLASSES))


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    spec = ModelSpec(UNET, {"kind": "cosine", "num_steps": 50}, "v", 8, CLASSES)
    save_model(tmp_path / "model", spec, UNet(UNET).state_dict())
    return load_model(tmp_path / "model")


def test_samples_of_any_class_lie_in_the_folder_and_can_be_told_apart(model, tmp_path):
    files = write_samples(model, tmp_path / "out", count=1, steps=2)
    assert {path.parent for path in files} == {tmp_path / "out"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in files)
    assert [path.name for path in files[:4]] == [
        "00000-cat%2Fdog.png",
        "00001-..%2F..%2Fup.png",
        "00002-a, b.png",
        "00003-плюс.png",
    ]
    assert {Image.open(path).size for path in files[:-1]} == {(8, 8)}


def test_a_class_is_named_whatever_is_in_its_name():
    assert [parse_labels(name, CLASSES) for name in CLASSES] == [[0], [1], [2], [3], [4]]
    assert parse_labels("cat/dog,1", CLASSES) == [0, 1]


def test_an_ordinary_name_stays_as_it_is():
    assert file_name("maine coon") == "maine coon"
    assert file_name("a%2Fb") != file_name("a/b")
    assert len(file_name("é" * 300).encode()) <= 200
