"""The ledger: its parts are the wall time, and what was lost is what was seen again."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.storage import Storage
from pipelines.training.goodput import CAUSES, Attempt, Session, measure
from pipelines.training.ledger import Ledger, goodput_of, read_sessions, write_session

KINDS = ("startup", "step", "data", "checkpoint", "grid")


def attempt(began: float, resumed_at: int, images_seen: int, step: float, **other: float) -> Attempt:
    seconds = {**dict.fromkeys(KINDS, 0.0), "step": step, **other}
    return Attempt(began, began + sum(seconds.values()), resumed_at, images_seen, seconds)


def test_a_run_without_trouble_loses_nothing_but_its_start():
    session = Session(100, 160, (attempt(105, 0, 1000, 40, startup=5, data=2, checkpoint=1, grid=2),))
    done = measure([session])
    assert done.parts() == {"productive": 40, "data": 2, "checkpoint": 1, "grid": 2, "restart": 15,
                            "recomputed": 0, "idle": 0, "unaccounted": 0}  # fmt: skip
    assert (done.wall_s, done.images_seen, done.recomputed_images) == (60, 1000, 0)
    assert done.fraction == pytest.approx(40 / 60)


def test_steps_after_the_checkpoint_that_a_restart_finds_are_lost():
    # 1000 images in 100 s, then back to 600: 400 images and 40 s for nothing.
    first, second = attempt(0, 0, 1000, 100), attempt(110, 600, 2000, 140)
    done = measure([Session(0, 250, (first, second))])
    assert (done.recomputed_images, done.recomputed_s, done.productive_s) == (
        400,
        pytest.approx(40),
        pytest.approx(200),
    )
    assert done.restart_s == pytest.approx(10)


def test_images_lost_twice_count_twice_also_across_drivers():
    lives = [attempt(0, 0, 1000, 100), attempt(200, 600, 800, 20), attempt(300, 600, 2000, 140)]
    done = measure([Session(0, 100, (lives[0],)), Session(190, 440, tuple(lives[1:]))])
    assert done.recomputed_images == 400 + 200
    assert (done.idle_s, done.attempts, done.sessions) == (pytest.approx(90), 3, 2)


def test_images_that_a_killed_driver_has_seen_and_not_stored_do_not_count_for_the_next():
    killed = Session(0, 100, (attempt(0, 0, 95_000, 100),))
    assert measure([killed]).images_seen == 95_000
    assert measure([killed, Session(110, 120, (attempt(111, 80_000, 81_000, 1),))]).images_seen == 81_000
    assert measure([killed, Session(110, 120)]).images_seen == 0  # nothing is trained yet


def test_the_length_of_a_run_is_what_the_workers_of_its_newest_driver_said_last():
    first, second = (dataclasses.replace(attempt(0, 0, 50, 1), length=length) for length in (100, 140))
    assert measure([Session(0, 100, (first, second))]).length == 140
    assert measure([Session(0, 100, (second,)), Session(110, 120, (first,))]).length == 100
    assert measure([Session(0, 100, (second,)), Session(110, 120)]).length is None


@given(st.data())
def test_the_parts_add_up_to_the_wall_time_and_kept_images_to_the_stream(data):
    seconds = st.floats(0, 100)
    now, seen, reached, sessions = 1000.0, 0, 0, []
    for _ in range(data.draw(st.integers(1, 3))):
        began, lives = now, []
        for _ in range(data.draw(st.integers(0, 3))):
            now += data.draw(seconds)
            resumed_at = data.draw(st.integers(0, seen))
            reached = resumed_at + data.draw(st.integers(0, 500))
            seen = reached
            values = {kind: data.draw(seconds) for kind in KINDS}
            lives.append(attempt(now, resumed_at, reached, **values))
            now = lives[-1].ended
        now += data.draw(seconds)
        sessions.append(Session(began, now, tuple(lives)))
        now += data.draw(seconds)
    done = measure(sessions)
    assert sum(done.parts().values()) == pytest.approx(done.wall_s, abs=1e-6)
    assert done.wall_s == pytest.approx(sessions[-1].ended - 1000)
    computed = sum(a.images_seen - a.resumed_at for s in sessions for a in s.attempts)
    lives = [a for s in sessions for a in s.attempts]
    if lives and min(a.resumed_at for a in lives) == 0:
        # What was computed and not lost is the stream from its beginning, each image once.
        assert computed - done.recomputed_images == lives[-1].images_seen
    assert done.productive_s >= -1e-9


def lost(life: Attempt, cause: str) -> Attempt:
    return dataclasses.replace(life, lost_to=cause)


def test_restarts_cost_by_cause_what_passes_until_the_next_step_and_what_is_computed_again():
    first = lost(attempt(10, 0, 1000, 100, startup=10), "node")  # until 120
    second = attempt(150, 600, 700, 10, startup=5)  # until 165; 40 s of the first were for nothing
    third, fourth = lost(attempt(200, 700, 900, 20), "node"), attempt(240, 900, 1000, 10, startup=2)
    done = measure([Session(0, 170, (first, second)), Session(190, 260, (third, fourth))])
    assert {cause: (loss.times, loss.seconds) for cause, loss in done.losses.items()} == {
        "node": (2, pytest.approx(30 + 5 + 40 + 20 + 2)),
        "driver": (1, pytest.approx(35)),
    }
    assert done.lines()[-1] == "lost 97.0 s to 2 x node, 35.0 s to 1 x driver"
    assert ("lost to: driver", "35.0 s in 1", CAUSES["driver"]) in done.table()
    # With the first start and the two ends of drivers, they are all of the time without a worker.
    away = sum(loss.seconds for loss in done.losses.values()) - done.recomputed_s
    first_start, last_end = 10 + 10, 260 - 252
    assert away + first_start + last_end == pytest.approx(done.restart_s + done.idle_s)


def test_a_restart_whose_cause_nobody_recorded_is_of_none_that_is_known():
    done = measure([Session(0, 60, (attempt(0, 0, 100, 10), attempt(20, 100, 200, 10)))])
    assert {cause: loss.times for cause, loss in done.losses.items()} == {"unknown": 1}


def test_what_the_store_has_throttled_is_added_up_and_said_where_there_is_any():
    calm = attempt(0, 0, 100, 10)
    throttled = dataclasses.replace(calm, slow_downs=37, throttled_s=41.2, throttled_wait_s=12.0)
    done = measure([Session(0, 60, (throttled, calm, throttled))])
    assert (done.slow_downs, done.throttled_s, done.throttled_wait_s) == (74, pytest.approx(82.4), 24)
    said = "82.4 s, 24.0 s of them waiting for data, after 74 answers"
    assert f"reads throttled by the store: {said}" in done.lines()
    assert ("throttled", said, "the store answered SlowDown to rank 0") in done.table()
    undisturbed = measure([Session(0, 60, (calm,))])
    assert not any("throttled" in line for line in [*undisturbed.lines(), *map(str, undisturbed.table())])


def test_a_ledger_from_before_throttling_was_counted_is_read(tmp_path):
    storage, folder = Storage(), f"file://{tmp_path}/run"
    write_session(storage, folder, 1, Session(100, 160, (attempt(105, 0, 1000, 40),)))
    (path,) = (tmp_path / "run" / "goodput").iterdir()
    plain = json.loads(path.read_text())
    for name in ("slow_downs", "throttled_s", "throttled_wait_s"):
        del plain["sessions"][0]["attempts"][0][name]
    path.write_text(json.dumps(plain))
    assert measure(read_sessions(storage, folder)).slow_downs == 0


def test_the_ledger_of_a_driver_that_was_killed_is_there_for_the_next(tmp_path):
    storage, folder = Storage(), f"file://{tmp_path}/run"
    assert read_sessions(storage, folder) == ()
    first = Session(100, 160, (attempt(105, 0, 1000, 40),))
    write_session(storage, folder, 1, first)
    ledger = Ledger(storage, folder, 2)
    with ledger.session(time.time()):
        ledger.update([attempt(200, 600, 700, 1)])
    kept = read_sessions(storage, folder)
    assert kept == ledger.sessions
    assert kept[0] == first
    assert kept[1].attempts == (attempt(200, 600, 700, 1),)
    goodput = goodput_of(read_sessions(storage, folder))
    assert goodput is not None
    assert (goodput.sessions, goodput.recomputed_images) == (2, 400)
    assert "400 images computed twice" in goodput.lines()[1]


def test_a_driver_that_was_replaced_changes_nothing_of_its_successors_ledger(tmp_path):
    storage, folder = Storage(), f"file://{tmp_path}/run"
    old, new = Ledger(storage, folder, 1), Ledger(storage, folder, 2)
    with old.session(100):
        with new.session(200):
            new.update([attempt(200, 600, 700, 1)])
        before = read_sessions(storage, folder)
        old.update([attempt(100, 0, 900, 1)])
    assert read_sessions(storage, folder)[1:] == before[-1:]


def test_the_one_file_of_an_earlier_release_comes_first(tmp_path):
    storage, folder = Storage(), f"file://{tmp_path}/run"
    sessions = [Session(100, 160, (attempt(105, 0, 1000, 40),)), Session(200, 260)]
    plain = {"version": 1, "sessions": [dataclasses.asdict(session) for session in sessions]}
    storage.write(f"{folder}/goodput.json", json.dumps(plain).encode())
    write_session(storage, folder, 1, Session(300, 360))
    assert read_sessions(storage, folder) == (*sessions, Session(300, 360))
