"""The lines that workers have stored, and whether more will come."""

from __future__ import annotations

import time

import pytest

from pipelines.storage import Storage
from pipelines.training.log_lines import LogLine, LogReader, NoSuchRunError, encode, has_ended, last_write, log_address

STORAGE = Storage()


def line(at: float, message: str, rank: int = 0) -> LogLine:
    return LogLine(at, "WARNING", rank, "pipelines.x", message)


def test_lines_of_several_rows_and_any_characters_are_read_as_they_were_written(tmp_path):
    folder = f"file://{tmp_path}"
    said = [line(1.0, "first\nTraceback:\n  at x"), line(2.0, "ß \u2028 \x85 \x00 end")]
    STORAGE.write(log_address(folder, 1, 0, "a", 0), encode(said))
    assert LogReader(STORAGE, folder).new_lines() == said


def test_a_growing_log_is_read_further_and_other_files_are_ignored(tmp_path):
    folder = f"file://{tmp_path}"
    STORAGE.write(f"{folder}/logs/notes.txt", b"mine")
    reader = LogReader(STORAGE, folder)
    assert reader.new_lines() == []
    first, second, other = line(1, "first"), line(3, "second"), line(2, "other", rank=1)
    STORAGE.write(log_address(folder, 1, 0, "a", 0), encode([first]))
    assert reader.new_lines() == [first]
    time.sleep(0.01)
    STORAGE.write(log_address(folder, 1, 0, "a", 0), encode([first, second]))
    STORAGE.write(log_address(folder, 1, 1, "a", 0), encode([other]))
    assert reader.new_lines() == [other, second]
    assert reader.new_lines() == []
    assert LogReader(STORAGE, folder, rank=1).new_lines() == [other]


@pytest.mark.parametrize(
    "status, idle_s, ended",
    [
        ("RUNNING", 5, False),
        ("RUNNING", 300, True),  # its driver was killed
        ("FINISHED", 5, True),
        ("KILLED", 5, True),
        (None, 5, False),  # MLflow does not answer
        (None, 300, True),
        ("RUNNING", None, False),  # the store does not say
    ],
)
def test_a_run_has_ended_when_mlflow_says_so_or_nothing_is_written_any_more(status, idle_s, ended):
    now = 10_000.0
    assert has_ended(status, None if idle_s is None else now - idle_s, now) is ended


def test_a_missing_run_is_named_in_the_error(tmp_path):
    with pytest.raises(NoSuchRunError, match=r"nothing is stored at .*nobody"):
        last_write(STORAGE, f"file://{tmp_path}/runs/nobody")
    STORAGE.write(f"file://{tmp_path}/runs/first/driver", b"x")
    written = last_write(STORAGE, f"file://{tmp_path}/runs/first")
    assert written is not None
    assert abs(written - time.time()) < 60
