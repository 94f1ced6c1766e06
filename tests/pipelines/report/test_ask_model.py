"""What a report asks of a model, of a small one with random weights."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, to_uint8
from ddpm.model import Model, ModelSpec
from ddpm.models.unet import UNet
from pipelines.checkpoints.references import Resolved
from pipelines.inference.likelihood import Data
from pipelines.report.ask_model import FILLED, FILMED, MOST_STEPS, film, inpainting, levels
from tests.pipelines.checkpoints.tiny import SMALL

CLASSES = tuple("abcdefgh")
SPEC = ModelSpec(
    replace(SMALL, num_classes=len(CLASSES), context_channels=1),
    {"kind": "cosine", "num_steps": 100},
    "eps",
    8,
    CLASSES,
    sampling=Sampling.of(steps=4),
)
ZOOM, GAP = 6, 4  # of an 8 x 8 picture in a grid


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model(SPEC, UNet(SPEC.network).eval())


@pytest.fixture(scope="module")
def data():
    # Odd levels: none is that of a hidden pixel.
    pixels = 2 * torch.randint(0, 128, (10, 1, 8, 8), generator=torch.Generator().manual_seed(1)) + 1
    return Data("made up", pixels.float() / 127.5 - 1, Conditioning(label=torch.arange(10) % len(CLASSES)))


def tiles(picture) -> np.ndarray:
    """The pictures of a grid by row and column, uint8 [rows, columns, 8, 8]."""
    pixels = np.asarray(Image.open(io.BytesIO(picture.data)).convert("L"))
    side = 8 * ZOOM + GAP
    rows, columns = (pixels.shape[0] - GAP) // side, (pixels.shape[1] - GAP) // side
    top = pixels.shape[0] - rows * side  # a grid with names has a header
    return np.stack(
        [
            [pixels[top + r * side :, GAP + c * side :][: 8 * ZOOM : ZOOM, : 8 * ZOOM : ZOOM] for c in range(columns)]
            for r in range(rows)
        ]
    )


def test_a_network_that_predicts_no_noise_misses_all_of_its_variance_at_every_level(model, data):
    for parameter in model.network.parameters():
        parameter.data.zero_()
    found = levels(model, data)
    assert found.images == 10
    assert [point.x for point in found.loss][:: len(found.loss) - 1] == [1, 100]
    for point in found.loss:
        assert point.y == pytest.approx(1.0, abs=0.25)
        assert point.low < point.y < point.high
    assert levels(model, data) == found


def test_filled_images_keep_the_known_pixels_and_stand_between_what_was_known_and_the_original(model, data):
    known, filled, original = tiles(inpainting(model, data))
    assert len(original) == FILLED
    chosen = [round(i * 9 / (FILLED - 1)) for i in range(FILLED)]
    assert np.array_equal(original, to_uint8(data.images[chosen])[..., 0].numpy())
    hidden = known != original
    assert hidden.any(axis=(1, 2)).all()
    assert set(known[hidden]) == {128}
    assert np.array_equal(filled[~hidden], original[~hidden])
    assert (filled[hidden] != original[hidden]).mean() > 0.5


def test_a_film_has_pairs_of_rows_for_classes_that_are_spread_over_all_and_few_steps(model):
    found = film(Resolved("m", model), None)
    assert len(tiles(found.picture)) == 2 * FILMED
    assert found.text == "ddim, 4 steps, guidance scale 1"
    long = replace(model, spec=replace(SPEC, sampling=Sampling.of(steps=MOST_STEPS + 10)))
    assert f", {MOST_STEPS} steps" in film(Resolved("m", long), None).text
