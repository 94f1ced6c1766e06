"""How fast this machine trains and draws."""

from __future__ import annotations

import torch

from pipelines.config import compose
from pipelines.training.loop.speed import measure_drawing, measure_speed, measure_training
from tests.networks import TINY_UNET

CONFIG = compose(["+experiment=digits", *TINY_UNET, "batch_size=16", "optim.precision=fp32"])


def test_speeds_measured_alone_and_together_are_of_the_same_order():
    device = torch.device("cpu")
    speed = measure_speed(CONFIG, device, 0.2)
    assert speed.train / 10 < measure_training(CONFIG, device, 0.2) < 10 * speed.train
    assert speed.draw / 10 < measure_drawing(CONFIG, device, 0.2) < 10 * speed.draw
    assert speed.parameters > 10_000
