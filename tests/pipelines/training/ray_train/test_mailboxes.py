"""The mailboxes between workers and driver, without the actors around them."""

from __future__ import annotations

import pytest

from pipelines.training.ray_train.mailboxes import JobQueue, Monitor

NOTHING_YET, THE_END = (JobQueue.WAIT, None), (JobQueue.END, None)


def test_each_worker_takes_every_job_once_and_in_order():
    queue = JobQueue(idle_s=60)
    last = [0, 0]
    for number, job in enumerate(("first", "second", "third"), start=1):
        assert [queue.take(seen) for seen in last] == [NOTHING_YET] * 2
        assert queue.put(job) == number
        for rank in (1, 0):
            assert queue.take(last[rank]) == (number, job)
            last[rank] = number
            assert queue.take(last[rank]) == NOTHING_YET  # the other is still at it
        assert queue.state()[:2] == (number, True)
        queue.done(number)
        assert queue.state()[:2] == (number, False)
    queue.close()
    assert [queue.take(seen) for seen in last] == [THE_END] * 2
    assert queue.put("fourth") is None


def test_messages_and_samples_are_delivered_once_and_newer_samples_replace_older_ones():
    monitor = Monitor()
    assert monitor.take() == ([], None, [], None)
    monitor.hear([(0, "a warning")])
    monitor.show("older")
    monitor.show("newer")
    monitor.hear([(1, "another")])
    news = monitor.take()
    assert (news.lines, news.samples) == ([(0, "a warning"), (1, "another")], "newer")
    assert monitor.take() == ([], None, [], None)


def test_restarted_workers_take_the_current_run_and_never_one_that_has_ended():
    queue = JobQueue(idle_s=60)
    queue.group_started()
    queue.put("first")
    queue.done(1)
    queue.put("second")
    queue.group_started()
    assert queue.take(0) == (2, "second")
    queue.done(1)  # late news of an earlier run
    assert queue.state() == (2, True, 2)
    queue.done(2)
    assert queue.take(0) == NOTHING_YET


def test_workers_end_together_after_a_while_without_a_run(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    queue = JobQueue(idle_s=20)
    queue.put("long")
    now += 3600
    assert queue.take(1) == NOTHING_YET  # the other trains for an hour
    queue.done(1)
    now += 19
    assert queue.take(1) == NOTHING_YET
    now += 2
    assert queue.take(1) == THE_END
    assert queue.put("too late") is None
    assert queue.take(1) == THE_END
