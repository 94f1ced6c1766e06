import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.models.unet import UNet, UNetConfig, timestep_embedding

SMALL = {
    "in_channels": 1,
    "out_channels": 1,
    "channels": (32, 64),
    "layers_per_block": 1,
    "attention": (False, True),
    "head_dim": 32,
}
OF_HO_ET_AL = {
    "head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
}
"""As in their code, so in the models that were converted from it: google/ddpm-cifar10-32 and the like."""


def make(**changes):
    torch.manual_seed(0)
    return UNet(UNetConfig(**{**SMALL, **changes})).eval()


def diffusers_twin(config, size):
    diffusers = pytest.importorskip("diffusers", reason="comes with the dev extra")
    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in config.attention]
    up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)]
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=config.head_dim,
        norm_num_groups=config.norm_groups,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        num_class_embeds=config.num_classes + 1 if config.num_classes else None,
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
        norm_eps=config.norm_eps,
        downsample_padding=config.downsample_padding,
    ).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 10},
        {"scale_shift": True, "layers_per_block": 2},
        {"channels": (32, 64, 64), "attention": (False, True, False), "in_channels": 3, "out_channels": 3},
        {"flip_sin_to_cos": False},
        {"freq_shift": 1},
        {"norm_eps": 0.1, "scale_shift": True},
        {"downsample_padding": 0},
        {"head_dim": None, "attention": (True, True)},
        {**OF_HO_ET_AL, "channels": (32, 64, 64), "attention": (False, True, False), "layers_per_block": 2},
    ],
)
def test_it_is_the_network_of_diffusers_parameter_for_parameter(changes):
    ours = make(**changes)
    theirs = diffusers_twin(ours.config, 8)
    theirs.load_state_dict(ours.state_dict())
    x, t = torch.randn(3, ours.config.in_channels, 8, 8), torch.tensor([0.0, 400.0, 999.0])
    labels = torch.tensor([0, 5, 10]) if ours.config.num_classes else None
    cond = Conditioning(label=labels.clamp(max=9), drop=labels == 10) if labels is not None else None
    expected = theirs(x, t, labels).sample
    torch.testing.assert_close(ours(x, t, cond), expected, rtol=1e-4, atol=1e-5)
    ours(x, t, cond).square().mean().backward()
    expected.square().mean().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-5)


def test_no_label_a_dropped_label_and_no_condition_are_the_same_null():
    network, x, t = make(num_classes=10), torch.randn(2, 1, 8, 8), torch.tensor([3.0, 4.0])
    dropped = Conditioning(label=torch.tensor([1, 2]), drop=torch.tensor([True, True]))
    torch.testing.assert_close(network(x, t, None), network(x, t, dropped))
    torch.testing.assert_close(network(x, t, None), network(x, t, Conditioning()))
    assert not torch.allclose(network(x, t, None), network(x, t, Conditioning(label=torch.tensor([1, 2]))))


def test_an_unconditional_network_refuses_labels():
    with pytest.raises(ValueError, match="label was given to a network without: set num_classes"):
        make()(torch.zeros(1, 1, 8, 8), torch.zeros(1), Conditioning(label=torch.zeros(1, dtype=torch.long)))


def captions(n, length=5):
    mask = torch.arange(length)[None] < torch.tensor([2, 5, 3, 4])[:n, None]
    return Conditioning(text=torch.randn(n, length, 12), text_mask=mask, pooled=torch.randn(n, 12))


def awake(network):
    """Cross-attention starts at zero; give it something to say."""
    for name, parameter in network.named_parameters():
        if "cross_attentions" in name and "to_out" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return network


def test_text_reaches_the_image_and_starts_out_by_the_pooled_vector_alone():
    network, x, t, cond = make(text_dim=12), torch.randn(4, 1, 8, 8), torch.arange(4.0), captions(4)
    other = Conditioning(text=torch.randn(4, 5, 12), text_mask=cond.text_mask, pooled=cond.pooled)
    torch.testing.assert_close(network(x, t, cond), network(x, t, other))
    assert not torch.allclose(network(x, t, cond), network(x, t, captions(4)))
    awake(network)
    assert not torch.allclose(network(x, t, cond), network(x, t, other))


def test_padding_tokens_are_not_seen():
    network, x, t, cond = awake(make(text_dim=12)), torch.randn(4, 1, 8, 8), torch.arange(4.0), captions(4)
    garbage = torch.where(cond.text_mask[..., None], cond.text, 100.0)
    torch.testing.assert_close(
        network(x, t, cond), network(x, t, Conditioning(text=garbage, text_mask=cond.text_mask, pooled=cond.pooled))
    )
    whole = Conditioning(text=cond.text[:, :2], pooled=cond.pooled)
    same = Conditioning(text=cond.text, text_mask=torch.arange(5).expand(4, 5) < 2, pooled=cond.pooled)
    torch.testing.assert_close(network(x, t, whole), network(x, t, same))


def test_dropped_text_and_no_text_are_the_same_null():
    network, x, t, cond = awake(make(text_dim=12)), torch.randn(4, 1, 8, 8), torch.arange(4.0), captions(4)
    some = cond.dropped(torch.tensor([True, False, True, False]))
    null, with_text = network(x, t), network(x, t, cond)
    expected = torch.stack([null[0], with_text[1], null[2], with_text[3]])
    torch.testing.assert_close(network(x, t, some), expected, rtol=1e-4, atol=1e-5)


def test_a_network_for_inpainting_sees_the_known_pixels_only():
    network, x, t = make(context_channels=1), torch.randn(4, 1, 8, 8), torch.arange(4.0)
    mask, context = torch.rand(4, 1, 8, 8) < 0.5, torch.randn(4, 1, 8, 8)
    out = network(x, t, Conditioning(mask=mask, context=context))
    hidden = torch.where(mask, context, 7.0)
    torch.testing.assert_close(network(x, t, Conditioning(mask=mask, context=hidden)), out)
    known = torch.where(mask, context + 1, context)
    assert not torch.allclose(network(x, t, Conditioning(mask=mask, context=known)), out)
    nothing = Conditioning(mask=torch.zeros_like(mask), context=context)
    torch.testing.assert_close(network(x, t, nothing), network(x, t))


@pytest.mark.parametrize(
    "options, cond, message",
    [
        ({"text_dim": 12}, Conditioning(text=torch.zeros(1, 2, 12)), "both its tokens"),
        ({"context_channels": 1}, Conditioning(mask=torch.zeros(1, 1, 8, 8)), "both the mask"),
        ({}, Conditioning(pooled=torch.zeros(1, 12)), "set text_dim"),
        ({}, Conditioning(mask=torch.zeros(1, 1, 8, 8)), "set context_channels"),
    ],
)
def test_conditions_that_are_incomplete_or_of_another_network_are_refused(options, cond, message):
    with pytest.raises(ValueError, match=message):
        make(**options)(torch.zeros(1, 1, 8, 8), torch.zeros(1), cond)


def test_a_sample_does_not_depend_on_its_batch():
    network, x = make(num_classes=3), torch.randn(5, 1, 8, 8)
    t, cond = torch.arange(5.0), Conditioning(label=torch.tensor([0, 1, 2, 0, 1]))
    alone = network(x[2:3], t[2:3], Conditioning(label=torch.tensor([2])))
    torch.testing.assert_close(network(x, t, cond)[2:3], alone, rtol=1e-4, atol=1e-5)


def test_time_embeddings_are_distinct_cosines_and_sines():
    emb = timestep_embedding(torch.arange(1000.0), 64)
    assert emb.shape == (1000, 64)
    assert emb[0].tolist() == [1.0] * 32 + [0.0] * 32
    assert torch.cdist(emb, emb).fill_diagonal_(1).min() > 0.01


def test_the_time_embedding_of_ho_et_al_is_sines_then_cosines_down_to_a_frequency_of_1_in_10000():
    frequencies = 10000 ** -torch.linspace(0, 1, 32)
    expected = torch.cat([(7 * frequencies).sin(), (7 * frequencies).cos()])
    emb = timestep_embedding(torch.tensor([7.0]), 64, flip_sin_to_cos=False, freq_shift=1)
    torch.testing.assert_close(emb[0], expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention": (True,)}, "one entry per level"),
        ({"channels": (32, 65)}, "norm_groups"),
        ({"head_dim": 48}, "head_dim"),
        ({"channels": (33, 66), "norm_groups": 33, "head_dim": None}, r"channels\[0\] = 33 is odd"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"dropout": 1.0}, "dropout"),
        ({"text_dim": -1}, "text_dim"),
        ({"freq_shift": 16}, "freq_shift = 16 .* below half of channels.0. = 32"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"downsample_padding": 2}, "downsample_padding 2; allowed: 0, 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**SMALL, **changes})
