import pytest
import torch

from benchmarks.train_step import dit_twin
from ddpm.conditioning import Conditioning
from ddpm.models.dit import DiTConfig, position_embedding
from tests.ddpm.on_patches import SMALL, batch, make

PUBLISHED = {"S": (384, 12, 6, 33), "B": (768, 12, 12, 130), "L": (1024, 24, 16, 458), "XL": (1152, 28, 16, 675)}
"""Width, depth, heads, and millions of parameters with patches of 2 (Peebles & Xie 2023, tables 1 and 4)."""


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


@pytest.mark.parametrize("changes", [{}, {"patch_size": 4}, {"in_channels": 3, "out_channels": 6}])
def test_it_computes_what_diffusers_dit_does(changes):
    network = make("dit", num_classes=10, **changes)
    pytest.importorskip("diffusers", reason="comes with the dev extra")
    twin = dit_twin(network, 8)
    x, t = batch(3, network.config.in_channels)
    labels = torch.tensor([0, 5, 10])
    cond = Conditioning(label=labels.clamp(max=9), drop=labels == 10)
    torch.testing.assert_close(network(x, t, cond), twin(x, t, labels).sample, rtol=1e-4, atol=1e-5)


def test_every_patch_has_a_position_of_its_own_which_is_the_same_in_images_of_other_sizes():
    small, large = (position_embedding(*size, 32, torch.device("cpu")) for size in ((3, 4), (7, 9)))
    assert torch.equal(small.view(3, 4, 32), large.view(7, 9, 32)[:3, :4])
    assert torch.cdist(large, large).fill_diagonal_(1).min() > 0.1


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
