"""What follows what in a training, without Ray, a store or a clock."""

from __future__ import annotations

import pytest

from pipelines.storage import FencedError
from pipelines.training.errors import TrainingError
from pipelines.training.states import (
    AnotherDriver,
    Event,
    Failed,
    Finished,
    NodesCounted,
    Replaced,
    Running,
    Starting,
    State,
    Stopped,
    WorkersEnded,
    WorkersStarted,
    WorkersUnreachable,
    after,
)

LOST, FINAL, FENCED = RuntimeError("lost"), TrainingError("no GPU left"), FencedError("driver 2")


def follows(state: State, *events: Event) -> State:
    for event in events:
        state = after(state, event, max_failures=2, patience_s=60)
    return state


def ended(
    error: BaseException | None = None, *, at_start: bool = False, seen: int | None = None, complete: bool = False
) -> WorkersEnded:
    return WorkersEnded(error, at_start, seen, complete)


def test_workers_that_end_well_have_finished_the_run_or_were_stopped():
    training = follows(Starting(), WorkersStarted(None))
    assert training == Running(0, None)
    assert follows(training, ended(seen=100, complete=True)) == Finished()
    assert follows(training, ended(seen=60)) == Stopped()


def test_an_error_that_comes_again_is_final_however_far_the_run_has_got():
    assert follows(Running(0, 10), ended(FINAL, seen=90)) == Failed(FINAL)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (None, 10, Starting(0, LOST, 10)),
        (10, 20, Starting(0, LOST, 20)),
        (10, 10, Failed(LOST)),
        (None, None, Failed(LOST)),
    ],
    ids=["first checkpoint", "newer checkpoint", "same checkpoint", "no checkpoint"],
)
def test_after_a_failure_the_workers_start_again_only_from_a_newer_checkpoint(before, now, expected):
    assert follows(Running(2, before), ended(LOST, seen=now)) == expected


def test_a_worker_lost_at_its_start_is_one_of_the_failures_that_are_allowed_in_a_row():
    lost, state = ended(LOST, at_start=True), follows(Starting(), WorkersStarted(None))
    for failures in (1, 2):
        state = follows(state, lost)
        assert state == Starting(failures, LOST, 0)
        state = follows(state, WorkersStarted(None))
    assert follows(state, lost) == Failed(LOST)
    further = follows(state, ended(LOST, at_start=True, seen=10), WorkersStarted(10))
    assert further == Running(0, 10)


def test_nodes_that_are_missing_longer_than_the_patience_end_a_training_and_a_gap_begins_anew():
    training = Running(0, None)
    short, enough = (lambda at: NodesCounted(at, "2 CPUs are missing")), (lambda at: NodesCounted(at, None))
    assert follows(training, short(100), short(160)) == Running(0, None, 100)
    failed = follows(training, short(100), short(161))
    assert isinstance(failed, Failed)
    assert str(failed.error) == "2 CPUs are missing"
    assert follows(training, short(100), enough(150), short(161), short(221)) == Running(0, None, 161)


@pytest.mark.parametrize("state", [Starting(), Running(0, 10), Finished(), Stopped(), Failed(LOST)])
def test_another_driver_ends_every_state_and_no_event_leads_on_from_there(state):
    replaced = follows(state, AnotherDriver(FENCED))
    assert replaced == Replaced(FENCED)
    events = [WorkersStarted(1), ended(LOST, seen=50), NodesCounted(1e9, "short"), WorkersUnreachable(FINAL)]
    assert follows(replaced, *events, AnotherDriver(FencedError("driver 3"))) == Replaced(FENCED)


@pytest.mark.parametrize("state", [Finished(), Stopped(), Failed(LOST)])
def test_nothing_but_another_driver_follows_the_end(state):
    events = [WorkersStarted(1), ended(FINAL), NodesCounted(0, "short"), NodesCounted(1e9, "short")]
    assert follows(state, *events, WorkersUnreachable(FINAL)) == state


def test_a_driver_that_cannot_reach_its_workers_fails():
    assert follows(Running(0, 10), WorkersUnreachable(FINAL)) == Failed(FINAL)
    assert follows(Starting(), WorkersUnreachable(FINAL)) == Failed(FINAL)


def test_counting_nodes_before_the_workers_start_changes_nothing():
    assert follows(Starting(1, LOST, 10), NodesCounted(0, "short"), NodesCounted(100, "short")) == Starting(1, LOST, 10)
