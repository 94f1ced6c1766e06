"""How many training trials a cluster runs at a time."""

import pytest

from pipelines.search.study import StudyError
from pipelines.search.study_config import StudyConfig
from pipelines.search.training_search import concurrency
from tests.pipelines.search.test_space import BASE


def study(**options):
    plain = {"kind": "training", "trials": 4, "space": {"optim.lr": {"log": [1e-4, 1e-2]}}, **options}
    return StudyConfig.model_validate(plain)


def test_trials_at_a_time_are_those_that_the_cluster_holds():
    assert concurrency(study(), BASE, {"CPU": 9.0}) == 9 // BASE.cluster.max_workers
    assert concurrency(study(concurrent=1), BASE, {"CPU": 9.0}) == 1
    with pytest.raises(StudyError, match=r"no room for one trial of 2 workers: 2 CPU needed, 1 there"):
        concurrency(study(), BASE, {"CPU": 1.0})
