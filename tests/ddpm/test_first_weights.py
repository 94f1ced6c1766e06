from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ddpm.first_weights import VERSION, Distribution, build_on_meta
from ddpm.model import make_classifier
from ddpm.models.dit import DiTConfig
from ddpm.models.jit import JiTConfig
from ddpm.models.unet import UNetConfig

UNET = UNetConfig(channels=(16, 32), attention=(False, True), norm_groups=4, head_dim=8, num_classes=3, text_dim=5)
BUILDS = {
    "unet": UNET.build,
    "dit": DiTConfig(width=32, depth=2, heads=2, num_classes=3, text_dim=5, context_channels=3).build,
    "jit": JiTConfig(
        patch_size=4, width=32, depth=2, heads=2, class_tokens_from=1, num_classes=3, text_dim=5, context_channels=3
    ).build,
    "classifier": lambda: make_classifier(UNET, 3),
}
FRESH = Distribution("uniform", -0.5, 2.0)
every_network = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def filled(distribution, shape, *, seed=0, name="weight", first=0, rows=None):
    target = torch.empty(rows or shape[0], *shape[1:]) if shape else torch.empty(())
    distribution.fill(target, seed, name, shape, first)
    return target


@every_network
def test_a_network_on_the_meta_device_is_filled_as_its_constructor_fills_it(build):
    torch.manual_seed(0)
    network, distributions = build_on_meta(build)
    usual = dict(build().named_parameters())
    assert distributions.keys() == usual.keys()
    for name, parameter in network.named_parameters():
        assert parameter.is_meta
        assert parameter.requires_grad == usual[name].requires_grad
        ours = filled(distributions[name], tuple(parameter.shape), name=name)
        a, b, theirs = distributions[name].a, distributions[name].b, usual[name].detach()
        if distributions[name].kind == "constant":
            assert torch.equal(ours, theirs)
            continue
        mean, deviation = (a, b) if distributions[name].kind == "normal" else ((a + b) / 2, (b - a) / math.sqrt(12))
        for found in (ours.double(), theirs.double()):
            assert abs(found.mean() - mean) < 5 * deviation / math.sqrt(found.numel())
            assert abs((found - mean).square().mean() / deviation**2 - 1) < 8 / math.sqrt(found.numel())
            if distributions[name].kind == "uniform":
                assert a <= found.min() <= found.max() <= b


@pytest.mark.parametrize("kind", ["constant", "uniform", "normal"])
@pytest.mark.parametrize("shape", [(7, 3, 2), (7,), ()])
def test_rows_are_the_same_whoever_draws_them(kind, shape, monkeypatch):
    whole = filled(Distribution(kind, 0.25, 1.0), shape)
    monkeypatch.setattr("ddpm.first_weights.DRAWN_AT_ONCE", 4)
    assert torch.equal(filled(Distribution(kind, 0.25, 1.0), shape), whole)
    if shape:
        assert torch.equal(filled(Distribution(kind, 0.25, 1.0), shape, first=2, rows=3), whole[2:5])


def test_other_names_and_seeds_give_other_numbers():
    shape = (4, 4)
    found = [filled(FRESH, shape), filled(FRESH, shape, seed=1), filled(FRESH, shape, name="bias")]
    assert not any(torch.equal(a, b) for a, b in zip(found, found[1:] + found[:1], strict=True))


def test_numbers_in_another_precision_are_rounded_from_the_same_ones():
    exact = torch.empty(3, 2, dtype=torch.float64)
    FRESH.fill(exact, 0, "weight", (3, 2), 0)
    assert torch.equal(exact, filled(FRESH, (3, 2)).double())


def test_the_numbers_of_this_version_stay():
    assert VERSION == 1
    assert filled(FRESH, (2, 2), seed=7).flatten().tolist() == pytest.approx(
        [0.06757418, -0.27914017, 0.90322679, 0.76837415], abs=1e-7
    )
    assert filled(Distribution("normal", 0.0, 1.0), (2,), seed=7).tolist() == pytest.approx(
        [1.4634709, -1.0735787], abs=1e-6
    )


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(3.0))


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.arange(3.0))


class Patched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 2))
        nn.init.ones_(self.weight[:1])


@pytest.mark.parametrize(
    "build, named", [(Buffered, "frequencies"), (Computed, "scale"), (Patched, "a part of a parameter")]
)
def test_what_cannot_be_filled_row_by_row_is_refused(build, named):
    with pytest.raises(ValueError, match=named):
        build_on_meta(build)
