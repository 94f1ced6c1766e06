"""A training trial is judged at growing rungs, and its seconds add up."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import ConfigError
from pipelines.search.study import StudyError, TrialRecord
from pipelines.search.study_config import StudyConfig
from pipelines.search.training_search import concurrency, rungs, trial_seconds
from pipelines.training.goodput import Attempt, Session
from tests.pipelines.search.test_space import BASE


def study(**options):
    plain = {"kind": "training", "trials": 4, "space": {"optim.lr": {"log": [1e-4, 1e-2]}}, **options}
    return StudyConfig.model_validate(plain)


@given(st.integers(1, 10_000_000), st.integers(1, 512), st.integers(1, 6), st.integers(2, 5))
def test_rungs_are_whole_batches_that_end_where_the_run_does(images, batch_size, count, reduction):
    chosen = study(rungs=count, reduction=reduction)
    if count > 1 and images // reduction ** (count - 1) < batch_size:
        with pytest.raises(ConfigError, match=r"before the first batch"):
            rungs(images, batch_size, chosen)
        return
    found = rungs(images, batch_size, chosen)
    assert len(found) == count
    assert list(found) == sorted(set(found)) or images < 2 * batch_size
    assert all(rung % batch_size == 0 for rung in found)
    assert images <= found[-1] < images + batch_size


def test_a_trials_seconds_add_up_to_its_wall_time():
    seconds = {"startup": 3.0, "step": 20.0, "data": 1.0, "grid": 4.0, "checkpoint": 0.5}
    attempt = Attempt(began=105.0, ended=105.0 + sum(seconds.values()), resumed_at=0, images_seen=640, seconds=seconds)
    record = TrialRecord("a", {}, "finished", seconds=35.0, began=100.0)
    spent = trial_seconds(record, [Session(104.0, 134.0, (attempt,))])
    assert sum(spent.values()) == pytest.approx(record.seconds)
    assert (spent["placement"], spent["start-up"], spent["training"], spent["teardown"]) == (5.0, 3.0, 21.0, 1.5)
    assert trial_seconds(replace(record, state="stopped"), [Session(104.0, 134.0, (attempt,))]) is None
    assert trial_seconds(record, [Session(104.0, 134.0, (attempt, attempt))]) is None


def test_trials_at_a_time_are_those_that_the_cluster_holds():
    assert concurrency(study(), BASE, {"CPU": 9.0}) == 9 // BASE.cluster.max_workers
    assert concurrency(study(concurrent=1), BASE, {"CPU": 9.0}) == 1
    with pytest.raises(StudyError, match=r"no room for one trial of 2 workers: 2 CPU needed, 1 there"):
        concurrency(study(), BASE, {"CPU": 1.0})
