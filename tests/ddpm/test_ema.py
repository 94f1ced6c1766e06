import pytest
import torch
from torch import nn

from ddpm.ema import EMA


def test_after_a_half_life_half_of_the_old_average_is_left():
    module = nn.Linear(1, 1)
    ema = EMA(module, half_life=1000, ramp=1e9)
    start = ema.shadow["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    for step in range(10):
        ema.update(module, (step + 1) * 100, 100)
    torch.testing.assert_close(ema.shadow["weight"], start + 0.5)


def test_two_batches_of_half_the_size_move_as_far_as_one():
    ema = EMA(nn.Linear(1, 1), half_life=1000, ramp=1e9)
    assert ema.decay(5000, 64) ** 2 == pytest.approx(ema.decay(5000, 128))


def test_early_weights_are_forgotten_fast():
    ema = EMA(nn.Linear(1, 1), half_life=1_000_000, ramp=0.05)
    assert ema.decay(128, 128) < 1e-5
    assert ema.decay(20_000_000, 128) == pytest.approx(0.5 ** (128 / 1_000_000))


def test_the_average_round_trips_and_foreign_names_are_refused():
    module = nn.Linear(2, 2)
    ema, other = EMA(module, 100), EMA(nn.Linear(2, 2), 100)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.shadow["weight"], module.weight)
    with pytest.raises(ValueError, match="names differ"):
        ema.load_state_dict({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="must be > 0"):
        EMA(module, half_life=0)
