import json
from dataclasses import replace

import pytest
import torch

from ddpm.models.unet import UNet
from pipelines.config import compose, unet_config
from pipelines.models import (
    ModelError,
    check_resumable,
    load_checkpoint,
    load_optimizer_tensors,
    model_spec,
    optimizer_tensors,
    resolve,
    save_checkpoint,
)
from pipelines.shards.index import ShardInfo, make_dataset
from pipelines.storage import Storage

CONFIG = compose(["+experiment=digits"])
DATASET = make_dataset(
    "file:///data",
    splits={"train": (ShardInfo("train-000000.tar", 5, 10, "ab"),), "test": (ShardInfo("t.tar", 5, 10, "cd"),)},
    classes=tuple("0123456789"),
    channels=1,
    image_size=8,
    mean=(0.0,),
    std=(1.0,),
)


@pytest.fixture
def checkpoint(tmp_path):
    network = UNet(unet_config(CONFIG))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network(torch.randn(2, 1, 8, 8), torch.zeros(2)).square().mean().backward()
    optimizer.step()
    names = [name for name, _ in network.named_parameters()]
    weights = {f"network.{k}": v for k, v in network.state_dict().items()}
    state = save_checkpoint(
        tmp_path / "c",
        model_spec(CONFIG, DATASET, {}),
        network.state_dict(),
        {**weights, **optimizer_tensors(optimizer, names)},
        images_seen=128,
        identity=CONFIG.identity(),
        optimizer_steps=1,
    )
    return tmp_path / "c", state, network, optimizer, names


def test_a_checkpoint_brings_back_every_bit(checkpoint):
    folder, state, network, optimizer, names = checkpoint
    loaded, averaged, tensors = load_checkpoint(folder)
    assert loaded == replace(state, identity=json.loads(json.dumps(state.identity)))
    assert all(torch.equal(averaged[k], v) for k, v in network.state_dict().items())
    fresh = torch.optim.AdamW(network.parameters(), lr=1e-3)
    load_optimizer_tensors(fresh, names, tensors)
    before, after = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])


def test_a_checkpoint_is_a_model_folder(checkpoint):
    model = resolve(str(checkpoint[0]), tracking_uri=None, storage=Storage()).model
    assert model.spec.classes == DATASET.classes
    assert model.spec.sampling.scale == CONFIG.guidance.scale


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "model.json"])
def test_a_flipped_bit_or_a_missing_file_is_found(checkpoint, name):
    path = checkpoint[0] / name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=f"{name} is missing or damaged"):
        load_checkpoint(checkpoint[0])
    path.unlink()
    with pytest.raises(ModelError, match=f"{name} is missing or damaged"):
        load_checkpoint(checkpoint[0])


def test_a_folder_without_its_last_file_is_incomplete(checkpoint):
    (checkpoint[0] / "state.json").unlink()
    with pytest.raises(ModelError, match="not a complete checkpoint"):
        load_checkpoint(checkpoint[0])


def test_other_settings_or_data_are_refused_by_name(checkpoint):
    state = load_checkpoint(checkpoint[0])[0]
    check_resumable(state, CONFIG, DATASET)
    check_resumable(state, compose(["+experiment=digits", "cluster.num_workers=1"]), DATASET)
    with pytest.raises(ModelError, match=r"optim\.lr: 0\.002 before, 0\.5 now"):
        check_resumable(state, compose(["+experiment=digits", "optim.lr=0.5"]), DATASET)
    with pytest.raises(ModelError, match="dataset digest"):
        check_resumable(state, CONFIG, replace(DATASET, digest="other"))


@pytest.mark.parametrize(
    "reference, message",
    [
        ("nowhere", "names no model"),
        ("runs:/abc", "needs an MLflow server"),
        ("models:/x@y", "needs an MLflow server"),
    ],
)
def test_references_that_name_nothing_say_what_a_reference_is(reference, message):
    with pytest.raises(ModelError, match=message):
        resolve(reference, tracking_uri=None, storage=Storage())
