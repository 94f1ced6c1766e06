import pickle

import pytest
import torch
from torch import nn

from pipelines.evaluation.evaluators import check_evaluator, open_evaluator
from pipelines.evaluation.evaluators.encoder import Preparation, features_of
from pipelines.presentation.errors import ConfigError

SMALL = ["evaluation.encoder_size=12", "evaluation.encoder_mean=[0.5,0.4,0.3]", "evaluation.encoder_std=[0.2,0.3,0.4]"]


class Net(nn.Module):
    """Averages of channels over quarters of the image."""

    def __init__(self, tokens=False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.tokens = tokens

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(x * self.scale.view(1, 3, 1, 1), 2).flatten(1)
        return x.unsqueeze(1).repeat(1, 4, 1) if self.tokens else x


def wrong(x):
    return x.sum()


def scripted(path, network):
    torch.jit.script(network).save(str(path))
    return path


def opened(config, dataset, path, *overrides):
    made = config("evaluation.evaluator=encoder", f"evaluation.weights={path}", *SMALL, *overrides)
    return open_evaluator(made, dataset)


IMAGES = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SETTINGS = Preparation(12, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_a_scripted_network_gets_prepared_images_and_travels(labelled, config, tmp_path):
    path = scripted(tmp_path / "net.pt", Net())
    found = opened(config, labelled, path)
    assert (found.kind, found.source, found.labels) == ("encoder", "net.pt", False)
    assert (found.accuracy, found.share) == (None, None)
    assert found.encoder.width == 12
    assert "resized to 12 pixels" in found.preparation
    encoded = found.encoder(IMAGES)
    assert encoded.probabilities is None
    torch.testing.assert_close(encoded.features, Net()(SETTINGS(IMAGES)).detach())
    again = pickle.loads(pickle.dumps(found.encoder))
    assert torch.equal(again(IMAGES).features, encoded.features)


def test_weights_and_preparation_make_the_digest(labelled, config, tmp_path):
    path = scripted(tmp_path / "net.pt", Net())
    one = opened(config, labelled, path)
    assert opened(config, labelled, path).digest == one.digest
    assert opened(config, labelled, path, "evaluation.encoder_size=16").digest != one.digest
    other = Net()
    other.scale.data[0] = 5
    assert opened(config, labelled, scripted(tmp_path / "other.pt", other)).digest != one.digest


def test_an_exported_network_is_opened(labelled, config, tmp_path):
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(Net().eval(), (torch.zeros(2, 3, 12, 12),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "net.pt2")
    found = opened(config, labelled, tmp_path / "net.pt2")
    torch.testing.assert_close(found.encoder(IMAGES).features, Net()(SETTINGS(IMAGES)).detach())
    again = pickle.loads(pickle.dumps(found.encoder))
    assert torch.equal(again(IMAGES).features, found.encoder(IMAGES).features)


def test_a_folder_of_transformers_is_opened_with_what_it_says_of_preparation(labelled, config, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    network = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    network.save_pretrained(tmp_path / "dino")
    said = '{"crop_size": {"height": 28, "width": 28}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    (tmp_path / "dino" / "preprocessor_config.json").write_text(said)
    made = config("evaluation.evaluator=encoder", f"evaluation.weights={tmp_path}/dino")
    found = open_evaluator(made, labelled)
    with torch.no_grad():
        wanted = network(Preparation(28, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))(IMAGES)).pooler_output
    torch.testing.assert_close(found.encoder(IMAGES).features, wanted, rtol=1e-4, atol=1e-5)
    again = pickle.loads(pickle.dumps(found.encoder))
    torch.testing.assert_close(again(IMAGES).features, wanted, rtol=1e-4, atol=1e-5)


def test_weights_at_an_address_are_fetched(labelled, config, tmp_path):
    scripted(tmp_path / "net.pt", Net())
    here, there = (opened(config, labelled, f"{scheme}{tmp_path}/net.pt") for scheme in ("", "file://"))
    assert here.digest == there.digest


def test_the_class_token_is_taken_of_tokens_and_the_pooled_output_of_transformers():
    flat, tokens = torch.rand(2, 5), torch.rand(2, 3, 5)
    assert features_of(flat) is flat
    assert torch.equal(features_of(tokens), tokens[:, 0])
    assert features_of({"last_hidden_state": tokens, "pooler_output": flat}) is flat
    assert torch.equal(features_of({"last_hidden_state": tokens, "pooler_output": None}), tokens[:, 0])
    for output in (torch.rand(2, 3, 4, 4), torch.rand(()), (flat, flat), {"logits": flat}, "text"):
        with pytest.raises(ValueError, match=r"features are \[N, D\]"):
            features_of(output)


def test_a_network_without_features_is_refused_before_anything_starts(labelled, config, tmp_path):
    torch.jit.script(wrong).save(str(tmp_path / "wrong.pt"))
    with pytest.raises(ConfigError, match=r"cannot encode images of 1 x 8 x 8 pixels.*features are \[N, D\]"):
        opened(config, labelled, tmp_path / "wrong.pt")


def test_what_is_no_network_is_refused(labelled, config, tmp_path):
    torch.save(Net().state_dict(), tmp_path / "state.pt")
    with pytest.raises(ConfigError, match=r"state.pt cannot encode images"):
        opened(config, labelled, tmp_path / "state.pt")
    (tmp_path / "net.onnx").write_bytes(b"onnx")
    with pytest.raises(ConfigError, match=r"net.onnx must be a TorchScript file"):
        opened(config, labelled, tmp_path / "net.onnx")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds weights alone: name the folder"):
        check_evaluator(
            config("evaluation.evaluator=encoder", f"evaluation.weights={tmp_path}/model.safetensors"), labelled
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no config.json and safetensors in it"):
        opened(config, labelled, tmp_path / "empty")


def test_preparation_shrinks_without_aliasing_and_keeps_grey_grey():
    stripes = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 254
    small = Preparation(8, (0.0,) * 3, (1.0,) * 3)(stripes)
    assert small.shape == (1, 3, 8, 8)
    assert (small[..., 1:-1] - 127 / 255).abs().max() < 0.05
    assert torch.equal(small[:, 0], small[:, 2])
    assert Preparation(32, (0.0,), (1.0,))(stripes).shape == (1, 1, 32, 32)
