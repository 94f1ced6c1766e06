import pytest
import torch
from torch import nn

from pipelines.config import compose
from pipelines.training.loop.hardware import (
    autocast,
    flops_per_image,
    peak_flops,
    precision_change,
    resolve_precision,
    to_device,
    weight_dtype,
)

CPU = torch.device("cpu")


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x)


def test_operations_of_a_convolution_are_those_counted_by_hand_forward_and_twice_backward():
    with torch.device("meta"):
        assert flops_per_image(Convolution(), (3, 8, 8)) == 3 * 2 * (8 * 8) * 5 * 3 * 9


def test_the_peak_is_the_configured_one_or_the_cards_or_unknown():
    assert peak_flops(compose(["cluster.peak_tflops=2"]), CPU) == 2e12
    assert peak_flops(compose([]), CPU) is None


@pytest.mark.parametrize(
    "precision, weights, output",
    [
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
        ("tf32", torch.float32, torch.float32),
        ("fp32", torch.float32, torch.float32),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_weights_keep_their_precision_whatever_is_computed_in(precision, weights, output):
    config = compose([f"optim.precision={precision}"])
    assert weight_dtype(config.optim) is weights
    assert resolve_precision(config.optim, CPU) == precision
    network = nn.Linear(2, 2).to(weights)
    images = to_device(torch.zeros(1, 3, 4, 4), config, CPU)
    assert images.dtype is weights
    with autocast(precision, CPU):
        assert network(torch.zeros(1, 2, dtype=weights)).dtype is output


@pytest.mark.parametrize(
    "capability, bf16, found",
    [
        ((8, 0), True, "bf16"),
        ((9, 0), True, "bf16"),
        ((7, 5), False, "fp16"),
        ((7, 0), False, "fp16"),
        ((6, 1), False, "fp32"),
    ],
    ids=["A100", "H100", "T4", "V100", "P40"],
)
def test_a_gpu_is_asked_for_what_it_computes_in_without_emulation(monkeypatch, capability, bf16, found):
    # PyTorch says yes to emulated bf16, unless it is told not to count that.
    supported = lambda including_emulation=True: bf16 or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert resolve_precision(compose([]).optim, gpu) == found
    assert resolve_precision(compose(["optim.precision=tf32"]).optim, gpu) == "tf32"


def test_another_precision_than_before_is_named_where_it_was_recorded():
    assert precision_change(None, "fp16") is None
    assert precision_change("bf16", "bf16") is None
    assert "in bf16 so far and goes on in fp16" in str(precision_change("bf16", "fp16"))
