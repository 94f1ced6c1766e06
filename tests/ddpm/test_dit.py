import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddpm.conditioning import Conditioning
from ddpm.model import ModelSpec, load_model, save_model
from ddpm.models import NETWORKS, UNetConfig
from ddpm.models.dit import DiTConfig, position_embedding

SMALL = {"in_channels": 1, "out_channels": 1, "patch_size": 2, "width": 32, "depth": 2, "heads": 4}
PUBLISHED = {"S": (384, 12, 6, 33), "B": (768, 12, 12, 130), "L": (1024, 24, 16, 458), "XL": (1152, 28, 16, 675)}
"""Width, depth, heads, and millions of parameters with patches of 2 (Peebles & Xie 2023, tables 1 and 4)."""


def fresh(**changes):
    torch.manual_seed(0)
    return DiTConfig(**{**SMALL, **changes}).build().eval()


def make(**changes):
    """A network whose zeros are numbers, as after a training."""
    network = fresh(**changes)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def batch(count=4, channels=1, height=8, width=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, height, width, generator=generator), torch.arange(count) * 250.0


def captions(n, length=5):
    mask = torch.arange(length)[None] < torch.tensor([2, 5, 3, 4])[:n, None]
    return Conditioning(text=torch.randn(n, length, 12), text_mask=mask, pooled=torch.randn(n, 12))


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_networks_of_the_paper_have_its_numbers_of_parameters(size):
    width, depth, heads, millions = PUBLISHED[size]
    shape = {"in_channels": 4, "out_channels": 8, "num_classes": 1000}
    with torch.device("meta"):
        network = DiTConfig(width=width, depth=depth, heads=heads, **shape).build()
    count = sum(p.numel() for p in network.parameters())
    assert round(count / 1e6) == millions
    block = (4 + 2 * 4 + 6) * width**2 + (4 + 5 + 6) * width
    ends = (4 * 4 + 1) * width + 2 * (width**2 + width) + 4 * 8 * (width + 1)
    assert count == depth * block + ends + (256 + width + 2) * width + 1001 * width


def diffusers_twin(network, size):
    """The same network in diffusers, which embeds time and class in every block again."""
    diffusers = pytest.importorskip("diffusers", reason="comes with the dev extra")
    config = network.config
    twin = diffusers.DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    ).eval()
    ours = network.state_dict()
    renamed = {
        **{f"pos_embed.proj.{k}": ours[f"patch_embedding.{k}"] for k in ("weight", "bias")},
        **{f"proj_out_1.{k}": ours[f"modulation_out.{k}"] for k in ("weight", "bias")},
        **{f"proj_out_2.{k}": ours[f"linear_out.{k}"] for k in ("weight", "bias")},
    }
    for i, block in enumerate(twin.transformer_blocks):
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as in the code of the paper
        to = f"transformer_blocks.{i}."
        renamed[f"{to}norm1.emb.class_embedder.embedding_table.weight"] = ours["class_embedding.weight"]
        for k in ("weight", "bias"):
            for layer in (1, 2):
                name = f"{to}norm1.emb.timestep_embedder.linear_{layer}.{k}"
                renamed[name] = ours[f"time_embedding.linear_{layer}.{k}"]
            renamed[f"{to}norm1.linear.{k}"] = ours[f"blocks.{i}.modulation.{k}"]
            for name, part in zip("qkv", ours[f"blocks.{i}.attention.to_qkv.{k}"].chunk(3), strict=True):
                renamed[f"{to}attn1.to_{name}.{k}"] = part
            renamed[f"{to}attn1.to_out.0.{k}"] = ours[f"blocks.{i}.attention.to_out.{k}"]
            renamed[f"{to}ff.net.0.proj.{k}"] = ours[f"blocks.{i}.mlp.0.{k}"]
            renamed[f"{to}ff.net.2.{k}"] = ours[f"blocks.{i}.mlp.2.{k}"]
    twin.load_state_dict(renamed)
    return twin


@pytest.mark.parametrize("changes", [{}, {"patch_size": 4}, {"in_channels": 3, "out_channels": 6}])
def test_it_computes_what_diffusers_dit_does(changes):
    network = make(num_classes=10, **changes)
    twin = diffusers_twin(network, 8)
    x, t = batch(3, network.config.in_channels)
    labels = torch.tensor([0, 5, 10])
    cond = Conditioning(label=labels.clamp(max=9), drop=labels == 10)
    torch.testing.assert_close(network(x, t, cond), twin(x, t, labels).sample, rtol=1e-4, atol=1e-5)


def test_the_blocks_of_a_fresh_network_are_the_identity_and_its_output_is_0():
    network, (x, t) = fresh(text_dim=12, num_classes=3), batch()
    cond = replace(captions(4), label=torch.tensor([0, 1, 2, 0]))
    assert not network(x, t, cond).any()
    patches, emb = torch.randn(4, 16, 32), torch.randn(4, 32)
    for block in network.blocks:
        assert torch.equal(block(patches, emb, (cond.text, cond.text_mask)), patches)


def test_a_fresh_network_learns_from_the_first_step_on():
    network, (x, t) = fresh(), batch()
    (network(x, t) - x).square().mean().backward()
    assert network.linear_out.weight.grad.any()


def test_no_label_a_dropped_label_and_no_condition_are_the_same_null():
    network, (x, t) = make(num_classes=10), batch()
    label = Conditioning(label=torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(network(x, t), network(x, t, label.dropped(torch.ones(4, dtype=torch.bool))))
    torch.testing.assert_close(network(x, t), network(x, t, Conditioning()))
    assert not torch.allclose(network(x, t), network(x, t, label))


def test_dropped_text_and_no_text_are_the_same_null():
    network, (x, t), cond = make(text_dim=12), batch(), captions(4)
    drop = torch.tensor([True, False, True, False])
    expected = torch.where(drop[:, None, None, None], network(x, t), network(x, t, cond))
    torch.testing.assert_close(network(x, t, cond.dropped(drop)), expected, rtol=1e-4, atol=1e-5)


def test_text_is_seen_by_its_tokens_and_by_its_pooled_embedding_and_padding_is_not():
    network, (x, t), cond = make(text_dim=12), batch(), captions(4)
    out = network(x, t, cond)
    assert not torch.allclose(network(x, t, replace(cond, text=torch.randn(4, 5, 12))), out)
    assert not torch.allclose(network(x, t, replace(cond, pooled=torch.randn(4, 12))), out)
    garbage = torch.where(cond.text_mask[..., None], cond.text, 100.0)
    torch.testing.assert_close(network(x, t, replace(cond, text=garbage)), out)
    shorter = Conditioning(text=cond.text[:, :2], pooled=cond.pooled)
    same = replace(cond, text_mask=torch.arange(5).expand(4, 5) < 2)
    torch.testing.assert_close(network(x, t, shorter), network(x, t, same))


def test_a_network_for_inpainting_sees_the_known_pixels_only():
    network, (x, t) = make(context_channels=1), batch()
    mask, context = torch.rand(4, 1, 8, 8) < 0.5, torch.randn(4, 1, 8, 8)
    out = network(x, t, Conditioning(mask=mask, context=context))
    hidden = torch.where(mask, context, 7.0)
    torch.testing.assert_close(network(x, t, Conditioning(mask=mask, context=hidden)), out)
    assert not torch.allclose(network(x, t, Conditioning(mask=mask, context=context + 1)), out)
    nothing = Conditioning(mask=torch.zeros_like(mask), context=context)
    torch.testing.assert_close(network(x, t, nothing), network(x, t))


def test_a_network_extended_for_inpainting_starts_out_as_the_trained_one_and_its_new_channels_learn():
    trained, extended = make(), fresh(context_channels=1)
    extended.load_state_dict(extended.config.extend_for_inpainting(trained.state_dict()))
    x, t = batch()
    cond = Conditioning(mask=torch.rand(4, 1, 8, 8) < 0.5, context=torch.randn(4, 1, 8, 8))
    torch.testing.assert_close(extended(x, t, cond), trained(x, t), rtol=1e-6, atol=1e-6)
    extended(x, t, cond).square().sum().backward()
    assert (extended.patch_embedding.weight.grad[:, 1:].abs().amax(dim=(0, 2, 3)) > 0).all()
    with pytest.raises(ValueError, match="extended already"):
        extended.config.extend_for_inpainting(extended.state_dict())


@pytest.mark.parametrize("height, width", [(8, 8), (4, 12), (16, 2)])
def test_one_network_takes_images_of_any_size_that_patches_fill(height, width):
    network, (x, t) = make(out_channels=2), batch(2, 1, height, width)
    assert network(x, t).shape == (2, 2, height, width)


def test_images_that_patches_do_not_fill_are_refused():
    with pytest.raises(ValueError, match=r"images of 8 x 9 pixels .* patch_size = 2"):
        make()(torch.zeros(1, 1, 8, 9), torch.zeros(1))


def test_every_patch_has_a_position_of_its_own_which_is_the_same_in_images_of_other_sizes():
    small, large = (position_embedding(*size, 32, torch.device("cpu")) for size in ((3, 4), (7, 9)))
    assert torch.equal(small.view(3, 4, 32), large.view(7, 9, 32)[:3, :4])
    assert torch.cdist(large, large).fill_diagonal_(1).min() > 0.1


def test_a_patch_of_the_output_is_where_its_patch_of_the_input_is():
    """With attention and perceptron gated off, an input pixel changes its own patch and nothing else."""
    network = fresh()
    nn.init.normal_(network.linear_out.weight)
    x, t = batch(1, 1, 4, 8)
    changed = x.clone()
    changed[0, 0, 3, 4] += 1
    difference = (network(changed, t) - network(x, t))[0, 0] != 0
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(difference, expected)


def test_a_sample_does_not_depend_on_its_batch():
    network, (x, t), cond = make(text_dim=12), batch(), captions(4)
    torch.testing.assert_close(network(x, t, cond)[2:3], network(x[2:3], t[2:3], cond[2:3]), rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_gives_nearly_the_same():
    network, (x, t) = make(num_classes=3), batch()
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
def test_conditions_that_are_incomplete_or_of_another_network_are_refused(options, cond, message):
    with pytest.raises(ValueError, match=message):
        make(**options)(torch.zeros(1, 1, 8, 8), torch.zeros(1), cond)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 5}, "width = 32 is not divisible by heads = 5"),
        ({"width": 30, "heads": 5}, "width = 30 is not divisible by 4"),
        ({"patch_size": 0}, "patch_size must be >= 1, got 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**{**SMALL, **changes})


def test_a_model_folder_names_this_kind_of_network_and_none_for_a_unet(tmp_path):
    network = make(num_classes=2)
    spec = ModelSpec(network.config, {"kind": "cosine", "num_steps": 100, "s": 0.01}, "v", 8, ("cat", "dog"))
    save_model(tmp_path, spec, network.state_dict())
    assert json.loads((tmp_path / "model.json").read_text())["network"]["kind"] == "dit"
    model = load_model(tmp_path)
    assert model.spec == spec
    assert all(torch.equal(w, network.state_dict()[name]) for name, w in model.network.state_dict().items())
    assert model.generate(torch.tensor([0, 1]), seed=1).shape == (2, 1, 8, 8)
    assert "kind" not in json.loads(replace(spec, network=UNetConfig()).to_json())["network"]
    assert NETWORKS.name_of(network.config) == "dit"
