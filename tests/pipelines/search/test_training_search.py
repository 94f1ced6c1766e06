"""How many training trials a cluster runs at a time, and which of them are stopped before their end."""

from types import SimpleNamespace

import pytest

from pipelines.search.study import StudyError, TrialRecord, trial_name
from pipelines.search.study_config import StudyConfig
from pipelines.search.training_search import StopBehind, concurrency
from tests.pipelines.search.test_space import BASE


def study(**options):
    plain = {"kind": "training", "trials": 4, "space": {"optim.lr": {"log": [1e-4, 1e-2]}}, **options}
    return StudyConfig.model_validate(plain)


def test_trials_at_a_time_are_those_that_the_cluster_holds():
    assert concurrency(study(), BASE, {"CPU": 9.0}) == 9 // BASE.cluster.max_workers
    assert concurrency(study(concurrent=1), BASE, {"CPU": 9.0}) == 1
    with pytest.raises(StudyError, match=r"no room for one trial of 2 workers: 2 CPU needed, 1 there"):
        concurrency(study(), BASE, {"CPU": 1.0})


def test_a_study_that_goes_on_compares_with_the_trials_that_ended_before():
    options = {"time_attr": "images_seen", "metric": "frechet_distance", "mode": "min", "max_t": 400}
    ended = [
        TrialRecord(
            str(i), {}, "finished", {}, [{"images_seen": seen, "frechet_distance": 1.0 + i} for seen in (100, 200, 400)]
        )
        for i in range(4)
    ]
    for records, wanted in (((), "CONTINUE"), (ended, "STOP")):
        scheduler = StopBehind("spared", records, **options, grace_period=100, reduction_factor=2)
        for seen, distance, action in ((100, 1.5, "CONTINUE"), (200, 90.0, wanted)):
            trial = SimpleNamespace(trial_id="new", config={"optim.lr": 0.001})
            if seen == 100:
                scheduler.on_trial_add(None, trial)
            result = {"images_seen": seen, "frechet_distance": distance}
            assert scheduler.on_trial_result(None, trial, result) == action


def test_the_configuration_as_it_stands_trains_to_its_end_however_far_it_is_behind():
    default, other = {"optim.lr": 0.002}, {"optim.lr": 0.009}
    options = {"time_attr": "images_seen", "metric": "frechet_distance", "mode": "min", "max_t": 400}
    scheduler = StopBehind(trial_name(default), **options, grace_period=100, reduction_factor=2)

    def report(trial_id, params, seen, distance):
        trial = SimpleNamespace(trial_id=trial_id, config={**params, "__internal__": 1})
        if trial_id not in scheduler._trial_info:
            scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trial, {"images_seen": seen, "frechet_distance": distance})

    for i in range(4):
        report(f"good-{i}", {"optim.lr": 0.001 * i}, 100, 1.0 + i)
    assert report("other", other, 100, 90.0) == "STOP"
    assert report("default", default, 100, 99.0) == "CONTINUE"
    assert report("default", default, 200, 99.0) == "CONTINUE"
    assert report("default", default, 400, 99.0) == "STOP"
