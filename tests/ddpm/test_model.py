import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ddpm.generate import Sampling
from ddpm.model import Model, ModelSpec, load_model, save_guides, save_model
from ddpm.models.classifier import NoisyClassifier
from ddpm.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    in_channels=1,
    out_channels=1,
    channels=(32, 64),
    layers_per_block=1,
    attention=(False, True),
    head_dim=32,
    num_classes=2,
)
SPEC = ModelSpec(
    CONFIG,
    {"kind": "cosine", "num_steps": 100, "s": 0.01},
    "v",
    8,
    ("cat", "dog"),
    Sampling.of(scale=2.0, interval=(0.1, 0.9), steps=5),
    {"run": "test"},
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "model", SPEC, UNet(CONFIG).state_dict())
    return tmp_path / "model"


def test_a_saved_model_comes_back_with_everything_it_needs_to_sample(folder):
    model = load_model(folder)
    torch.manual_seed(0)
    reference = UNet(CONFIG).state_dict()
    assert model.spec == SPEC
    assert all(torch.equal(w, reference[name]) for name, w in model.network.state_dict().items())
    assert model.generate(torch.tensor([0, 1, 1]), seed=1).shape == (3, 1, 8, 8)
    assert model.schedule.num_steps == 100


def perturbed(network):
    with torch.no_grad():
        for parameter in network.parameters():  # some layers start at 0
            parameter += 0.05 * torch.randn_like(parameter)
    return network.eval()


@pytest.mark.parametrize("kind", ["classifier", "weak"])
def test_a_model_folder_carries_the_networks_that_guide_the_model(tmp_path, kind):
    torch.manual_seed(0)
    guide = {
        "classifier": lambda: perturbed(NoisyClassifier(CONFIG, 2)),
        "weak": lambda: Model(SPEC, perturbed(UNet(CONFIG))),
    }[kind]()
    settings = Sampling.of(guidance={"weak": "auto"}.get(kind, kind), scale=3.0, steps=3, **{kind: "anywhere"})
    model = Model(replace(SPEC, sampling=settings), perturbed(UNet(CONFIG)), **{kind: guide})
    save_model(tmp_path, model.spec, model.network.state_dict())
    with pytest.raises(ValueError, match="give `guides`"):
        load_model(tmp_path).generate(torch.tensor([0, 1]))
    save_guides(tmp_path, model)
    again = load_model(tmp_path)
    assert torch.equal(again.generate(torch.tensor([0, 1])), model.generate(torch.tensor([0, 1])))
    assert {"classifier": again.classifier, "weak": again.weak}[kind] is not None


def test_labels_that_the_model_does_not_have_are_refused(folder):
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1"):
        load_model(folder).generate(torch.tensor([2]))


def test_damaged_folders_are_refused_with_the_reason(folder, tmp_path):
    with pytest.raises(ValueError, match=r"model\.json is missing"):
        load_model(tmp_path)
    plain = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**plain, "format_version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        load_model(folder)
    plain["network"]["channels"] = [64, 64]
    (folder / "model.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="do not fit"):
        load_model(folder)
    for damaged in ("", "[]", "{", '{"format_version": 1}', json.dumps({**plain, "surplus": 1, "format_version": 1})):
        (folder / "model.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"model\.json is damaged"):
            load_model(folder)


def test_missing_and_damaged_weights_are_named(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_model(folder)


def test_an_image_has_the_channels_of_the_input_where_the_variance_is_learned():
    assert replace(SPEC, network=replace(CONFIG, in_channels=3, out_channels=6)).shape == (3, 8, 8)


def test_weights_in_half_precision_are_computed_with_in_float32_and_are_not_trained(folder):
    weights = {name: tensor.bfloat16() for name, tensor in UNet(CONFIG).state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    network = load_model(folder).network
    assert not network.training
    assert {(p.dtype, p.requires_grad) for p in network.parameters()} == {(torch.float32, False)}
    assert all(torch.equal(p, weights[name].float()) for name, p in network.named_parameters())


def test_a_network_keeps_what_its_constructor_computes_beside_its_weights(folder, monkeypatch):
    class WithTables(UNet):
        def __init__(self, config: UNetConfig) -> None:
            super().__init__(config)
            self.rates = torch.linspace(0, 1, 3).tolist()
            self.plain = torch.ones(2)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    monkeypatch.setattr(UNetConfig, "build", lambda config: WithTables(config))
    before = torch.get_rng_state()
    network = load_model(folder).network
    assert torch.equal(torch.get_rng_state(), before)  # no first weights were drawn
    assert network.rates[1] == 0.5
    assert network.plain.tolist() == [1, 1]
    assert network.table.tolist() == [0, 1, 2]
