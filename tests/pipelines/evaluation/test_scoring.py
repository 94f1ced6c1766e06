from dataclasses import replace

import pytest

from ddpm.model import ModelSpec
from pipelines.evaluation.scoring import check_fits
from pipelines.shards.index import Dataset, DatasetError
from tests.pipelines.checkpoints.tiny import SMALL

CLASSES = tuple("0123456789")
DATA = Dataset("file:///data", {"train": (), "test": ()}, CLASSES, 1, 8, (0.0,), (1.0,), "d")
SPEC = ModelSpec(SMALL, {"kind": "cosine", "num_steps": 20}, "v", 8, CLASSES)


def test_data_of_the_models_shape_and_classes_fit():
    check_fits(SPEC, DATA)
    check_fits(replace(SPEC, classes=()), DATA)
    check_fits(SPEC, replace(DATA, classes=()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 16}, r"images of shape \(1, 16, 16\) and the model draws \(1, 8, 8\)"),
        ({"channels": 3}, r"images of shape \(3, 8, 8\)"),
        ({"classes": CLASSES[:7]}, "it has 7 classes and the model 10"),
        ({"classes": ("cat", *CLASSES[1:])}, "class 0 is 'cat' there and '0' in the model"),
    ],
)
def test_other_data_is_refused_by_what_differs(change, message):
    with pytest.raises(DatasetError, match=message):
        check_fits(SPEC, replace(DATA, **change))
