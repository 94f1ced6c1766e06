import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm.model import load_model, save_model, stored_weights
from ddpm.models.unet import UNet
from ddpm.tensor_files import read_weights, save_weights, split_files
from tests.ddpm.test_model import CONFIG, SPEC

NAME, INDEX = "model.safetensors", "model.safetensors.index.json"
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0), "c": torch.tensor(3.0)}


@pytest.fixture
def folder(tmp_path):
    """A folder of two files with an index."""
    save_weights(tmp_path, NAME, TENSORS, largest=24)
    return tmp_path


def test_tensors_above_a_size_are_in_files_with_an_index_as_those_of_hugging_face(folder):
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert sorted(path.name for path in folder.iterdir()) == [first, second, INDEX]
    assert json.loads((folder / INDEX).read_text()) == {
        "metadata": {"total_size": 44},
        "weight_map": {"a": first, "b": second, "c": second},
    }
    found = read_weights(folder, NAME)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_the_files_are_those_that_huggingface_hub_writes(folder, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "hub").mkdir()
    hub.save_torch_state_dict(
        TENSORS, tmp_path / "hub", filename_pattern="model{suffix}.safetensors", max_shard_size=24
    )
    for path in (tmp_path / "hub").iterdir():
        if path.suffix == ".json":
            assert json.loads(path.read_text())["weight_map"] == json.loads((folder / INDEX).read_text())["weight_map"]
        else:
            assert load_file(path).keys() == load_file(folder / path.name).keys()
    assert read_weights(tmp_path / "hub", NAME).keys() == TENSORS.keys()


def test_a_small_model_is_one_file_whatever_was_saved_there_before(folder):
    save_weights(folder, NAME, TENSORS)
    assert [path.name for path in folder.iterdir()] == [NAME]
    save_weights(folder, NAME, TENSORS, largest=1)
    assert sorted(path.name for path in folder.iterdir())[-2:] == ["model-00003-of-00003.safetensors", INDEX]
    assert NAME not in {path.name for path in folder.iterdir()}


def test_no_file_is_larger_than_allowed_unless_one_tensor_is():
    sizes = {f"t{i:02d}": size for i, size in enumerate([3, 9, 1, 1, 1, 12, 2, 2, 2])}
    groups = list(split_files(NAME, sizes, largest=5).values())
    assert sorted(name for group in groups for name in group) == sorted(sizes)
    assert all(len(group) == 1 or sum(sizes[name] for name in group) <= 5 for group in groups)


def change(folder, **entries):
    plain = json.loads((folder / INDEX).read_text())
    plain["weight_map"] |= entries
    (folder / INDEX).write_text(json.dumps(plain))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors is missing"),
        (lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b"x"), "00002.safetensors is damaged"),
        (lambda f: change(f, d="model-00001-of-00002.safetensors"), "tensor d is not there"),
        (lambda f: change(f, b="model-00001-of-00002.safetensors"), "tensor b is not there"),
        (lambda f: save_file(TENSORS, f / "model-00001-of-00002.safetensors"), "tensor b is there, and not in the"),
        (lambda f: change(f, a="../other/model.safetensors"), "names '../other/model.safetensors', which is no"),
        (lambda f: change(f, a="/etc/passwd"), "names '/etc/passwd', which is no"),
        (lambda f: change(f, a="..\\model.safetensors"), "which is no safetensors file beside it"),
        (lambda f: (f / INDEX).write_text("{"), "index.json is damaged"),
        (lambda f: (f / INDEX).write_text('{"weight_map": [1]}'), "index.json is damaged"),
        (lambda f: (f / INDEX).unlink(), "holds no weights: model.safetensors is missing"),
    ],
)
def test_files_that_do_not_go_with_their_index_are_refused_by_name(folder, harm, said):
    harm(folder)
    with pytest.raises(ValueError, match=said):
        read_weights(folder, NAME)


def test_a_model_in_several_files_draws_what_it_draws_in_one(tmp_path):
    torch.manual_seed(0)
    weights = {name: torch.randn_like(tensor) / 20 for name, tensor in UNet(CONFIG).state_dict().items()}
    save_model(tmp_path / "one", SPEC, weights)
    save_model(tmp_path / "several", SPEC, weights, largest=50_000)
    assert len(list((tmp_path / "several").iterdir())) > 4
    labels = torch.tensor([0])
    drawn = [load_model(tmp_path / folder).generate(labels, seed=1) for folder in ("one", "several")]
    assert torch.equal(*drawn)


def test_stored_weights_are_there_after_their_files_are_gone(tmp_path):
    torch.manual_seed(0)
    weights = UNet(CONFIG).state_dict()
    save_model(tmp_path / "model", SPEC, weights, largest=50_000)
    spec, found = stored_weights(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    assert spec == SPEC
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
