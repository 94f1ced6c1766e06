import pytest
import torch
from torch import nn

from pipelines.config import compose
from pipelines.training.loop.hardware import (
    autocast,
    computes_in_bf16,
    flops_per_image,
    peak_flops,
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
        assert flops_per_image(Convolution(), 3, 8) == 3 * 2 * (8 * 8) * 5 * 3 * 9


def test_the_peak_is_the_configured_one_or_the_cards_or_unknown():
    assert peak_flops(compose(["cluster.peak_tflops=2"]), CPU) == 2e12
    assert peak_flops(compose([]), CPU) is None


@pytest.mark.parametrize(
    "precision, weights, output",
    [
        ("bf16", torch.float32, torch.bfloat16),
        ("fp32", torch.float32, torch.float32),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_weights_keep_their_precision_whatever_is_computed_in(precision, weights, output):
    config = compose([f"optim.precision={precision}"])
    assert weight_dtype(config.optim) is weights
    assert computes_in_bf16(config.optim, CPU) is (output is torch.bfloat16)
    network = nn.Linear(2, 2).to(weights)
    images = to_device(torch.zeros(1, 3, 4, 4), config, CPU)
    assert images.dtype is weights
    with autocast(config.optim, CPU):
        assert network(torch.zeros(1, 2, dtype=weights)).dtype is output
