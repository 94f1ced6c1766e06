"""Evaluators of digits: images that trained one are no part of its reference, and changes are what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks import evaluators
from benchmarks.evaluators import Digits, Row
from ddpm.quality import FeatureMoments
from pipelines.evaluation.evaluators.base import Encoded


class Columns:
    """An encoder whose features are the means of columns; it remembers what it was trained on."""

    width = 8

    def __init__(self):
        self.trained_on = None

    def train(self, images, labels, seed, passes):
        self.trained_on = images
        return self

    def __call__(self, images):
        return Encoded(images.float().mean(2).flatten(1) / 255, None)

    def to(self, device):
        return self


@pytest.fixture(scope="module")
def digits():
    return Digits.read()


@pytest.mark.parametrize("half", [True, False])
def test_what_an_evaluator_was_shown(digits, half, monkeypatch):
    encoder, references = Columns(), []
    of = FeatureMoments.of

    def noted(features):
        references.append(features)
        return of(features)

    monkeypatch.setattr(FeatureMoments, "of", noted)
    found = evaluators.measure(digits, Row(encoder.train, half=half, passes=1), 0, 1)
    shown = {image.numpy().tobytes() for image in encoder.trained_on}
    features = encoder(digits.train).features
    seen = torch.tensor([image.numpy().tobytes() in shown for image in digits.train])
    assert len(encoder.trained_on) == (719 if half else 1438)
    if half:
        expected = of(features[~seen])
        assert torch.allclose(of(references[0]).mean, expected.mean)
    else:
        assert len(references[0]) == 1438
    assert found["floor"] > 0
    assert found["noise_alone"] > found["noisy"] > 0
    assert found["no_3_no_5"] > found["no_3"]
    assert ("shown_to_unseen" in found) == half


def test_changed_images_are_what_their_names_say(digits):
    found = evaluators.changed(digits, 0)
    assert len(found["no_3"]) == len(digits.test) - int((digits.test_labels == 3).sum())
    assert len(found["no_3_no_5"]) < len(found["no_3"])
    for name in ("blurred", "noisy", "noise_alone"):
        assert found[name].shape == digits.test.shape
        assert found[name].dtype == torch.uint8
    contrast = digits.test.float().std()
    assert found["blurred"].float().std() < 0.9 * contrast
    assert (found["noisy"].float() - digits.test.float()).abs().mean() > 10
