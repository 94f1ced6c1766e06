"""What a worker logs, from its handler to storage and to the driver's terminal; no Ray, a mailbox in this process."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from pathlib import Path

import pytest

from pipelines.storage import Storage, TransientStorageError
from pipelines.training.log_lines import LogLine, LogReader, log_address
from pipelines.training.ray_train import worker_logs
from pipelines.training.ray_train.mailboxes import HEARD_LINES, Monitor
from pipelines.training.ray_train.worker_logs import LogDeduplicator, recorded

ours = logging.getLogger("pipelines.somewhere")
theirs = logging.getLogger("another.package")


class Handle:
    """A monitor's handle, whose calls happen at once."""

    def __init__(self) -> None:
        self.monitor = Monitor()
        self.hear = self

    def remote(self, lines: list[tuple[int, str]]) -> None:
        self.monitor.hear(lines)


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.wait", lambda references, timeout: None)
    monkeypatch.setattr(worker_logs, "TOGETHER_S", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return f"file://{tmp_path}/runs/first"


def run(folder: str, handle: Handle, rank: int = 0, attempt: str = "aa", storage: Storage | None = None):
    return recorded(storage or Storage(), folder, handle, epoch=3, rank=rank, attempt=attempt)


def stored(folder: str, rank: int | None = None) -> list[LogLine]:
    return LogReader(Storage(), folder, rank).new_lines()


def test_warnings_reach_storage_and_the_driver_and_those_of_others_storage_only(folder):
    handle = Handle()
    with run(folder, handle):
        ours.warning("%d updates left out", 3)
        ours.debug("not for a user")
        theirs.info("not a warning")
        theirs.warning("their %s", "noise")
        theirs.error("their failure")
        warnings.warn("a habit of yours", UserWarning, stacklevel=1)
    ours.warning("after the training")
    assert handle.monitor.take().lines == [(0, "3 updates left out"), (0, "their failure")]
    assert handle.monitor.take().lines == []
    lines = stored(folder)
    assert [line.message for line in lines[:3]] == ["3 updates left out", "their noise", "their failure"]
    assert "a habit of yours" in lines[3].message
    assert len(lines) == 4
    assert [(line.level, line.rank, line.logger) for line in lines[:3:2]] == [
        ("WARNING", 0, "pipelines.somewhere"),
        ("ERROR", 0, "another.package"),
    ]
    assert abs(lines[0].time - time.time()) < 60


def test_what_this_project_says_at_level_info_reaches_storage_and_the_driver_while_a_rank_trains(folder):
    handle = Handle()
    level = ours.getEffectiveLevel()
    with run(folder, handle):
        ours.info("whole shards are cached on this node")
        theirs.setLevel(logging.INFO)
        theirs.info("of no interest here")
    theirs.setLevel(logging.NOTSET)
    assert ours.getEffectiveLevel() == level
    assert handle.monitor.take().lines == [(0, "whole shards are cached on this node")]
    assert [(line.level, line.message) for line in stored(folder)] == [("INFO", "whole shards are cached on this node")]


def test_every_rank_and_attempt_has_an_object_of_its_own_and_all_are_read_in_order_of_time(folder, tmp_path):
    handle = Handle()
    for rank, attempt in ((1, "aa"), (0, "aa"), (0, "bb")):
        with run(folder, handle, rank, attempt):
            ours.warning("rank %d in %s", rank, attempt)
    names = sorted(path.name for path in (tmp_path / "runs/first/logs").iterdir())
    assert names == ["000003-rank-0-aa.000.log", "000003-rank-0-bb.000.log", "000003-rank-1-aa.000.log"]
    assert [line.message for line in stored(folder)] == ["rank 1 in aa", "rank 0 in aa", "rank 0 in bb"]
    assert [line.message for line in stored(folder, rank=1)] == ["rank 1 in aa"]


def test_a_failing_rank_leaves_its_traceback_and_the_error_goes_on(folder):
    handle = Handle()
    with pytest.raises(ZeroDivisionError), run(folder, handle, rank=2):
        _ = 1 / 0
    ((rank, text),) = handle.monitor.take().lines
    said: list[str] = []
    LogDeduplicator(said.append, "first").add([(rank, text)])
    assert said == ["rank 2: failed: ZeroDivisionError: division by zero"]
    (line,) = stored(folder)
    assert line.level == "ERROR"
    assert "Traceback (most recent call last)" in line.message
    assert "_ = 1 / 0" in line.message


def test_lines_are_there_while_training_goes_on_and_a_reader_gets_each_once(folder, monkeypatch):
    monkeypatch.setattr(worker_logs, "WRITE_EVERY_S", 0.05)
    reader = LogReader(Storage(), folder)
    handle = Handle()
    with run(folder, handle):
        for number in range(3):
            ours.warning("line %d", number)
            found, deadline = [], time.monotonic() + 10
            while not found and time.monotonic() < deadline:
                found = reader.new_lines()
                time.sleep(0.01)
            assert [line.message for line in found] == [f"line {number}"]
    assert reader.new_lines() == []


class Away(Storage):
    """A store that answers nothing until `back` is set; a write hangs for as long."""

    back = threading.Event()

    def write(self, uri: str, data: bytes, *, patience_s: float = 0) -> None:
        if not self.back.wait(5):
            raise TransientStorageError("away")
        super().write(uri, data, patience_s=patience_s)


def test_a_store_that_hangs_neither_blocks_the_step_nor_keeps_the_driver_from_hearing_of_it(folder, monkeypatch):
    monkeypatch.setattr(worker_logs, "WRITE_EVERY_S", 0.01)
    monkeypatch.setattr(worker_logs, "CLOSE_S", 0.5)
    Away.back.clear()
    handle = Handle()
    began = time.monotonic()
    with run(folder, handle, storage=Away()):
        ours.warning("first")
        time.sleep(0.1)  # its write hangs by now
        logged = time.monotonic()
        ours.warning("storage is away")
        assert time.monotonic() - logged < 0.05
        said, deadline = [], time.monotonic() + 5
        while len(said) < 2 and time.monotonic() < deadline:
            said += handle.monitor.take().lines
            time.sleep(0.01)
        assert [text for _, text in said] == ["first", "storage is away"]
    assert time.monotonic() - began < 4
    Away.back.set()


def test_the_log_of_an_attempt_is_bounded_and_keeps_its_beginning_and_its_end(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_logs, "PART_BYTES", 1_000)
    monkeypatch.setattr(worker_logs, "WRITE_EVERY_S", 0.01)
    handle = Handle()
    with run(folder, handle):
        for number in range(100):
            ours.warning("line %03d %s", number, "x" * 100)
            if number % 10 == 0:
                time.sleep(0.03)
    sizes = [path.stat().st_size for path in (tmp_path / "runs/first/logs").iterdir()]
    assert len(sizes) <= worker_logs.PARTS
    assert max(sizes) <= 1_000
    messages = [line.message for line in stored(folder)]
    assert messages[0].startswith("line 000")
    assert messages[-1].startswith("line 099")


def test_a_thread_that_comes_late_leaves_no_part_too_many(folder, monkeypatch):
    monkeypatch.setattr(worker_logs, "PART_BYTES", 1)  # every line is a part
    log = worker_logs._StoredLog(Storage(), lambda part: log_address(folder, 3, 0, "aa", part))
    number = 0
    for count in (2, 1, 7, 3, 9):
        log.add([LogLine(float(number + i), "WARNING", 0, "pipelines", f"{number + i}") for i in range(count)])
        number += count
        log.write()
        kept = [int(line.message) for line in stored(folder)]
        assert len(kept) <= worker_logs.PARTS
        assert (kept[0], kept[-1]) == (0, number - 1)


def test_a_flood_is_counted_and_a_huge_message_is_cut(folder, monkeypatch):
    monkeypatch.setattr(worker_logs, "WAITING_LINES", 10)
    handle = Handle()
    with run(folder, handle):
        ours.warning("a" * 100_000)
        for _ in range(1_000):
            ours.warning("again")
    lines = stored(folder)
    assert len(lines[0].message) < worker_logs.MESSAGE_CHARACTERS + 10
    assert any("came too fast and are left out" in line.message for line in lines)
    assert len(lines) < 1_000


def test_a_format_string_that_does_not_fit_ends_nothing(folder):
    log = worker_logs.WorkerLog(Storage(), lambda part: log_address(folder, 3, 0, "aa", part), 0, lambda lines: None)
    log.emit(logging.LogRecord("pipelines", logging.WARNING, __file__, 1, "%d images", ("many",), None))
    log.close()
    assert [line.message for line in stored(folder)] == ["%d images"]


def test_the_monitor_keeps_the_newest_lines_where_nobody_takes_them():
    monitor = Monitor()
    monitor.hear([(0, str(number)) for number in range(HEARD_LINES + 5)])
    assert monitor.take().lines[0] == (0, "5")


def test_a_text_is_shown_once_and_counted_where_it_repeats():
    said: list[str] = []
    heard = LogDeduplicator(said.append, "first")
    heard.add([(0, "S3 is away"), (1, "S3 is away"), (1, "update 17 left out")])
    assert said == ["ranks 0, 1: S3 is away", "rank 1: update 17 left out"]
    heard.add([(rank, "S3 is away") for rank in range(8)])
    assert said[2:] == ["ranks 0, 1, 2, 3 and 4 more: S3 is away (10 times)"]
    heard.close()
    assert len(said) == 3
    heard.add([(1, "update 18 left out")])
    heard.close()
    assert said[3:] == ["rank 1: update 18 left out (2 times)"]


def test_a_terminal_is_not_flooded_by_ever_new_texts():
    said: list[str] = []
    heard = LogDeduplicator(said.append, "first")
    heard.add([(0, f"batch {'x' * number} is odd") for number in range(2_000)])
    heard.close()
    assert len(said) < LogDeduplicator.MOST + 10
    assert "`ddpm logs first` shows" in said[-1]
