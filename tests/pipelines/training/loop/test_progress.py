"""Wall time by kind, and the length of a run that is given seconds: on a clock of the test's, and in the loop."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.checkpoints import verify_checkpoint
from pipelines.config import ConfigError, compose
from pipelines.training.loop.optimizer import learning_rate
from pipelines.training.loop.progress import FIRST, LOOKS, Clock, Length
from tests.forked import start_ranks
from tests.pipelines.training.loop.ranks import last_checkpoint, run_ranks, tiny_config, trace, train_here

BATCH = 20


def test_seconds_by_kind_add_up_to_the_time_since_the_start():
    started = time.monotonic() - 5
    clock = Clock(started)
    clock.switch("step")
    with clock.during("grid"), clock.during("data"):
        time.sleep(0.02)
    with clock.during("checkpoint"):
        time.sleep(0.01)
    time.sleep(0.01)
    seconds = clock.seconds()
    assert sum(seconds.values()) == pytest.approx(time.monotonic() - started, abs=0.005)
    assert seconds["startup"] == pytest.approx(5, abs=0.1)
    assert seconds["data"] >= 0.02 and seconds["checkpoint"] >= 0.01 and seconds["step"] >= 0.01  # noqa: PT018


def test_the_time_in_a_phase_begins_anew_with_every_phase_and_not_when_it_is_counted():
    clock = Clock(time.monotonic() - 5)
    clock.seconds()
    phase, seconds = clock.phase()
    assert phase == "startup"
    assert seconds == pytest.approx(5, abs=0.5)
    with clock.during("data"):
        time.sleep(0.05)
        assert clock.phase()[0] == "data"
    assert clock.phase()[0] == "startup"
    assert clock.phase()[1] < 0.05


class Machine:
    """Trains at the given speed on a clock that only its steps move."""

    def __init__(self, seconds: float, planned: int, trained_s: float = 0.0, seen: int = 0) -> None:
        self.now_s, self.seen, self.planned = 0.0, seen, planned
        clock = SimpleNamespace(seconds=lambda: {"startup": 50.0, "step": self.now_s, "grid": 0.0})
        self.length = Length(seconds, BATCH, cast(Any, clock), trained_s)
        self.corrections: list[int] = []

    def train(self, images_per_s: Any) -> float:
        """Train to the end and return the seconds of it; the speed is a number, or a function of the time."""
        while self.seen < self.planned:
            if (corrected := self.length.corrected(self.seen)) is not None:
                self.planned = corrected
                self.corrections.append(corrected)
            rate = images_per_s(self.now_s) if callable(images_per_s) else images_per_s
            self.now_s += BATCH / rate
            self.seen += BATCH
        return self.now_s


@given(rate=st.floats(5, 500), off=st.floats(0.3, 30))
def test_a_run_takes_its_seconds_however_far_off_the_first_guess_was(rate, off):
    seconds = 400.0
    machine = Machine(seconds, max(BATCH, int(off * rate * seconds)))
    step_s = BATCH / rate
    assert machine.train(rate) == pytest.approx(seconds, abs=2 * step_s)
    assert machine.seen % BATCH == 0
    assert len(machine.corrections) < LOOKS


def test_a_machine_that_changes_its_speed_half_way_moves_the_end_by_little():
    for later in (20.0, 80.0):
        machine = Machine(400.0, 16_000)
        took_s = machine.train(lambda s, later=later: 40.0 if s < 200 else later)
        assert took_s == pytest.approx(400.0, rel=0.06)


def test_a_guess_that_is_too_short_to_be_corrected_is_kept():
    machine = Machine(400.0, 20 * BATCH)
    assert machine.train(40.0) < FIRST * 400.0
    assert not machine.corrections


def test_a_resumed_run_counts_what_it_trained_before_and_measures_anew():
    machine = Machine(400.0, 16_000, trained_s=200.0, seen=8_000)
    assert machine.train(20.0) == pytest.approx(200.0, abs=2.0)
    late = Machine(400.0, 16_000, trained_s=390.0, seen=15_000)
    late.train(20.0)
    assert not late.corrections


def test_the_rate_falls_to_the_corrected_end():
    config = compose(["+experiment=digits", "images=1000", "optim.decay=linear", "optim.warmup_images=0"])
    assert learning_rate(config, 1_000, 2_000) == pytest.approx(0.5 * config.optim.lr)
    assert learning_rate(config, 1_990, 2_000) == pytest.approx(0.02 * config.optim.lr)
    assert learning_rate(config, 500) == learning_rate(config, 500, 1_000)


def test_a_run_without_seconds_is_as_long_as_configured(digits, tmp_path):
    train_here(tmp_path, digits, tiny_config(tmp_path, 3 * BATCH, BATCH))
    stored = verify_checkpoint(last_checkpoint(tmp_path))
    assert (stored.images_seen, stored.length) == (3 * BATCH, 3 * BATCH)


SECONDS = 4.0


@pytest.mark.heavy
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_end_together_near_their_seconds_and_checkpoints_say_where(digits, tmp_path, ranks):
    config = tiny_config(tmp_path, 500_000, BATCH, f"training_s={SECONDS}", "tracking.grid_every=null")
    if ranks == 1:
        train_here(tmp_path, digits, config)
    else:
        start_ranks(run_ranks, (ranks, tmp_path / "meeting", digits, [(tmp_path, config)]), ranks)
    last = verify_checkpoint(last_checkpoint(tmp_path))
    assert last.images_seen == last.length < 500_000
    assert last.ends_at(config) == last.length
    assert last.images_seen == max(trace(tmp_path))
    assert 0.5 * SECONDS < last.trained_s < 2 * SECONDS


def test_the_stages_of_consistency_tuning_need_a_length_that_is_known():
    with pytest.raises(ConfigError, match="leaves the length open"):
        compose(["+experiment=cifar10_consistency", "init_from=models:/teacher/1", "training_s=60"])
