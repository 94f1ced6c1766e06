from dataclasses import replace

import pytest

from pipelines.search.study import TrialRecord
from pipelines.search.training_trial import trial_seconds
from pipelines.training.goodput import Attempt, Session


def test_a_trials_seconds_add_up_to_its_wall_time():
    seconds = {"startup": 3.0, "step": 20.0, "data": 1.0, "grid": 4.0, "checkpoint": 0.5}
    attempt = Attempt(began=105.0, ended=105.0 + sum(seconds.values()), resumed_at=0, images_seen=640, seconds=seconds)
    record = TrialRecord("a", {}, "finished", seconds=35.0, began=100.0)
    spent = trial_seconds(record, [Session(104.0, 134.0, (attempt,))])
    assert sum(spent.values()) == pytest.approx(record.seconds)
    assert (spent["placement"], spent["start-up"], spent["training"], spent["teardown"]) == (5.0, 3.0, 21.0, 1.5)
    assert trial_seconds(replace(record, state="stopped"), [Session(104.0, 134.0, (attempt,))]) is None
    assert trial_seconds(record, [Session(104.0, 134.0, (attempt, attempt))]) is None
