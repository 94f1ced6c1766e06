"""How fast this machine trains and draws."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from pipelines.config import compose
from pipelines.evaluation.devices import one_thread
from pipelines.training.loop.speed import measure_drawing, measure_ranks, measure_speed, measure_training
from tests.networks import TINY_UNET

CONFIG = compose(["+experiment=digits", *TINY_UNET, "batch_size=16", "optim.precision=fp32"])


def test_two_ranks_take_the_same_steps_and_are_about_as_fast_as_one_or_two():
    with one_thread():
        alone = measure_training(CONFIG, torch.device("cpu"), 0.3)
    assert 0.05 * alone < measure_ranks(CONFIG, 2, 0.3) < 4 * alone


def test_an_error_of_a_rank_is_that_of_the_measurement_and_leaves_no_other_rank_waiting():
    wrong = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"kind": "nothing"})})
    with pytest.raises(ProcessRaisedException, match="nothing"):
        measure_ranks(wrong, 2, 0.1)


def test_what_is_measured_alone_is_of_the_order_of_what_is_measured_together():
    device = torch.device("cpu")
    speed = measure_speed(CONFIG, device, 0.2)
    assert speed.train / 10 < measure_training(CONFIG, device, 0.2) < 10 * speed.train
    assert speed.draw / 10 < measure_drawing(CONFIG, device, 0.2) < 10 * speed.draw
    assert speed.parameters > 10_000
