import pytest
import torch

from ddpm.models.unet import UNet, UNetConfig, timestep_embedding
from ddpm.prediction import Conditioning

SMALL = {
    "in_channels": 1,
    "out_channels": 1,
    "channels": (32, 64),
    "layers_per_block": 1,
    "attention": (False, True),
    "head_dim": 32,
}


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
    ).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 10},
        {"scale_shift": True, "layers_per_block": 2},
        {"channels": (32, 64, 64), "attention": (False, True, False), "in_channels": 3, "out_channels": 3},
    ],
)
def test_it_is_the_network_of_diffusers_parameter_for_parameter(changes):
    ours = make(**changes)
    theirs = diffusers_twin(ours.config, 8)
    theirs.load_state_dict(ours.state_dict())
    x, t = torch.randn(3, ours.config.in_channels, 8, 8), torch.tensor([0.0, 400.0, 999.0])
    labels = torch.tensor([0, 5, 10]) if ours.config.num_classes else None
    cond = Conditioning(labels.clamp(max=9), labels == 10) if labels is not None else None
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
    with pytest.raises(ValueError, match="without classes"):
        make()(torch.zeros(1, 1, 8, 8), torch.zeros(1), Conditioning(label=torch.zeros(1, dtype=torch.long)))


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


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention": (True,)}, "one entry per level"),
        ({"channels": (32, 65)}, "norm_groups"),
        ({"head_dim": 48}, "head_dim"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**SMALL, **changes})
