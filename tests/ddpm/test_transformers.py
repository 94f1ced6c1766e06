"""What holds for every network on patches."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddpm.conditioning import Conditioning
from ddpm.model import ModelSpec, load_model, save_model
from ddpm.models import NETWORKS, UNetConfig
from tests.ddpm.on_patches import KINDS, batch, captions, fresh, make


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_the_blocks_of_a_fresh_network_are_the_identity_and_its_output_is_0(kind):
    network, (x, t) = fresh(kind, text_dim=12, num_classes=3), batch()
    cond = replace(captions(4), label=torch.tensor([0, 1, 2, 0]))
    assert not network(x, t, cond).any()
    patches, emb = torch.randn(4, 16, 32), torch.randn(4, 32)
    for block in network.blocks:
        assert torch.equal(block(patches, emb, (cond.text, cond.text_mask)), patches)


def test_a_fresh_network_learns_from_the_first_step_on(kind):
    network, (x, t) = fresh(kind), batch()
    (network(x, t) - x).square().mean().backward()
    assert network.linear_out.weight.grad.any()


def test_no_label_a_dropped_label_and_no_condition_are_the_same_null(kind):
    network, (x, t) = make(kind, num_classes=10), batch()
    label = Conditioning(label=torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(network(x, t), network(x, t, label.dropped(torch.ones(4, dtype=torch.bool))))
    torch.testing.assert_close(network(x, t), network(x, t, Conditioning()))
    assert not torch.allclose(network(x, t), network(x, t, label))


def test_dropped_text_and_no_text_are_the_same_null(kind):
    network, (x, t), cond = make(kind, text_dim=12), batch(), captions(4)
    drop = torch.tensor([True, False, True, False])
    expected = torch.where(drop[:, None, None, None], network(x, t), network(x, t, cond))
    torch.testing.assert_close(network(x, t, cond.dropped(drop)), expected, rtol=1e-4, atol=1e-5)


def test_text_is_seen_by_its_tokens_and_by_its_pooled_embedding_and_padding_is_not(kind):
    network, (x, t), cond = make(kind, text_dim=12), batch(), captions(4)
    out = network(x, t, cond)
    assert not torch.allclose(network(x, t, replace(cond, text=torch.randn(4, 5, 12))), out)
    assert not torch.allclose(network(x, t, replace(cond, pooled=torch.randn(4, 12))), out)
    garbage = torch.where(cond.text_mask[..., None], cond.text, 100.0)
    torch.testing.assert_close(network(x, t, replace(cond, text=garbage)), out)
    shorter = Conditioning(text=cond.text[:, :2], pooled=cond.pooled)
    same = replace(cond, text_mask=torch.arange(5).expand(4, 5) < 2)
    torch.testing.assert_close(network(x, t, shorter), network(x, t, same))


def test_a_network_for_inpainting_sees_the_known_pixels_only(kind):
    network, (x, t) = make(kind, context_channels=1), batch()
    mask, context = torch.rand(4, 1, 8, 8) < 0.5, torch.randn(4, 1, 8, 8)
    out = network(x, t, Conditioning(mask=mask, context=context))
    hidden = torch.where(mask, context, 7.0)
    torch.testing.assert_close(network(x, t, Conditioning(mask=mask, context=hidden)), out)
    assert not torch.allclose(network(x, t, Conditioning(mask=mask, context=context + 1)), out)
    nothing = Conditioning(mask=torch.zeros_like(mask), context=context)
    torch.testing.assert_close(network(x, t, nothing), network(x, t))


def test_a_network_extended_for_inpainting_starts_out_as_the_trained_one_and_its_new_channels_learn(kind):
    trained, extended = make(kind), fresh(kind, context_channels=1)
    extended.load_state_dict(extended.config.extend_for_inpainting(trained.state_dict()))
    x, t = batch()
    cond = Conditioning(mask=torch.rand(4, 1, 8, 8) < 0.5, context=torch.randn(4, 1, 8, 8))
    torch.testing.assert_close(extended(x, t, cond), trained(x, t), rtol=1e-6, atol=1e-6)
    extended(x, t, cond).square().sum().backward()
    first = next(layer for layer in extended.patch_embedding.modules() if isinstance(layer, nn.Conv2d))
    assert (first.weight.grad[:, 1:].abs().amax(dim=(0, 2, 3)) > 0).all()
    with pytest.raises(ValueError, match="extended already"):
        extended.config.extend_for_inpainting(extended.state_dict())


@pytest.mark.parametrize("height, width", [(8, 8), (4, 12), (16, 2)])
def test_one_network_takes_images_of_any_size_that_patches_fill(kind, height, width):
    network, (x, t) = make(kind, out_channels=2), batch(2, 1, height, width)
    assert network(x, t).shape == (2, 2, height, width)


def test_images_that_patches_do_not_fill_are_refused(kind):
    with pytest.raises(ValueError, match=r"images of 8 x 9 pixels .* patch_size = 2"):
        make(kind)(torch.zeros(1, 1, 8, 9), torch.zeros(1))


def test_a_patch_of_the_output_is_where_its_patch_of_the_input_is(kind):
    """With attention and perceptron gated off, an input pixel changes its own patch and nothing else."""
    network = fresh(kind)
    nn.init.normal_(network.linear_out.weight)
    x, t = batch(1, 1, 4, 8)
    changed = x.clone()
    changed[0, 0, 3, 4] += 1
    difference = (network(changed, t) - network(x, t))[0, 0] != 0
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(difference, expected)


def test_a_sample_does_not_depend_on_its_batch(kind):
    network, (x, t), cond = make(kind, text_dim=12), batch(), captions(4)
    torch.testing.assert_close(network(x, t, cond)[2:3], network(x[2:3], t[2:3], cond[2:3]), rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_gives_nearly_the_same(kind):
    network, (x, t) = make(kind, num_classes=3), batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, t)
    torch.testing.assert_close(out.float(), network(x, t), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "options, cond, message",
    [
        ({}, Conditioning(label=torch.zeros(1, dtype=torch.long)), "label was given .* set num_classes"),
        ({}, Conditioning(pooled=torch.zeros(1, 12)), "set text_dim"),
        ({}, Conditioning(mask=torch.zeros(1, 1, 8, 8)), "set context_channels"),
        ({"text_dim": 12}, Conditioning(text=torch.zeros(1, 2, 12)), "both its tokens"),
        ({"context_channels": 1}, Conditioning(mask=torch.zeros(1, 1, 8, 8)), "both the mask"),
    ],
)
def test_conditions_that_are_incomplete_or_of_another_network_are_refused(kind, options, cond, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **options)(torch.zeros(1, 1, 8, 8), torch.zeros(1), cond)


def test_a_model_folder_names_this_kind_of_network_and_none_for_a_unet(kind, tmp_path):
    network = make(kind, num_classes=2)
    spec = ModelSpec(network.config, {"kind": "cosine", "num_steps": 100, "s": 0.01}, "v", 8, ("cat", "dog"))
    save_model(tmp_path, spec, network.state_dict())
    assert json.loads((tmp_path / "model.json").read_text())["network"]["kind"] == kind
    model = load_model(tmp_path)
    assert model.spec == spec
    assert all(torch.equal(w, network.state_dict()[name]) for name, w in model.network.state_dict().items())
    assert model.generate(torch.tensor([0, 1]), seed=1).shape == (2, 1, 8, 8)
    assert "kind" not in json.loads(replace(spec, network=UNetConfig()).to_json())["network"]
    assert NETWORKS.name_of(network.config) == kind
