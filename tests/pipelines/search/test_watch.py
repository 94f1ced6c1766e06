"""Which trials are ended because their process stands still."""

import time
from types import SimpleNamespace

import pytest
import ray
from ray import cloudpickle

from pipelines.search import watch
from pipelines.search.watch import TrialWatch


class Trial:
    """What the watch asks of a trial of Ray Tune."""

    def __init__(self, trial_id, actor):
        self.trial_id, self.max_failures, self.over = trial_id, 0, False
        self.temporary_state = SimpleNamespace(ray_actor=actor)
        self.run_metadata = SimpleNamespace(num_failures=0)

    def is_finished(self):
        return self.over


class Cluster:
    """Ray's store, its clock, and the actors that were ended."""

    def __init__(self, monkeypatch):
        self.now, self.store, self.killed, self.said = 100.0, {}, [], []
        monkeypatch.setattr(watch, "_place", lambda: "here")
        monkeypatch.setattr(watch, "_internal_kv_list", lambda prefix, namespace: list(self.store))
        monkeypatch.setattr(watch, "_internal_kv_get", lambda key, namespace: self.store.get(key))
        monkeypatch.setattr(watch, "_internal_kv_del", lambda key, namespace: self.store.pop(key))
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(ray, "kill", self.killed.append)
        self.trials = [Trial("one", "a"), Trial("two", None)]  # the second one is starting
        self.watch = TrialWatch(5.0, self.said.append)

    def beat(self, count, first="of a trial before", actor="a"):
        self.store[actor.encode()] = count.to_bytes(8, "big") + cloudpickle.dumps((first, actor))

    def after(self, seconds):
        self.now += seconds
        self.watch.look(self.trials, lambda trial: trial.trial_id.upper())


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch)


def test_a_trial_whose_process_beats_goes_on_however_long_it_takes(cluster):
    for count in range(20):
        cluster.beat(count)
        cluster.after(4.0)
    assert (cluster.killed, cluster.said) == ([], [])


def test_a_process_that_stands_still_is_ended_and_its_trial_begins_again(cluster):
    cluster.beat(1)
    for _ in range(6):
        cluster.beat(int(cluster.now), "two", "b")
        cluster.after(1.0)
    assert cluster.killed == ["a"]
    assert cluster.trials[0].max_failures == 1
    assert cluster.trials[1].max_failures == 0
    (said,) = cluster.said
    assert said == "trial ONE begins again: its process has not answered for 5 s and stands still"
    assert not cluster.watch.failed


def test_a_trial_that_stands_still_while_it_starts_begins_again_too(cluster):
    cluster.beat(1, "two", "b")
    cluster.after(1.0)
    cluster.after(6.0)
    assert (cluster.killed, cluster.trials[1].max_failures) == (["b"], 1)


def test_a_trial_that_stands_still_again_has_failed(cluster):
    for failures, actor in enumerate("ab"):
        cluster.trials[0].run_metadata.num_failures = failures
        cluster.trials[0].temporary_state.ray_actor = actor
        cluster.beat(1, actor=actor)
        cluster.after(1.0)
        cluster.after(6.0)
    assert cluster.killed == ["a", "b"]
    assert cluster.trials[0].max_failures == 1
    assert cluster.watch.failed == {"one": "its process has not answered for 6 s and stands still, for the second time"}
    assert cluster.said[-1].startswith("trial ONE has failed: ")


def test_what_is_left_of_an_actor_that_has_gone_with_its_trial_is_no_trial_that_stands_still(cluster):
    cluster.trials[0].over = True
    cluster.beat(1)
    cluster.beat(1, "of another study", "b")
    cluster.after(1.0)
    cluster.after(6.0)
    assert cluster.said == []
    assert cluster.store == {}
    assert cluster.trials[0].max_failures == 0
