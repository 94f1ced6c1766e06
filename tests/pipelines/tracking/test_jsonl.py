"""Curves as JSON lines: every point once, whatever happens to rank 0 and to the store."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.config import compose
from pipelines.storage import Storage, TransientStorageError
from pipelines.tracking import Destination, RunLog, Tracker, jsonl, run_log

TRACKER = Tracker("http://nowhere", "run")


@dataclass(frozen=True)
class Flaky(Storage):
    """A store that takes what it does not acknowledge, as often as `failures` has entries."""

    failures: tuple[list[int], ...] = ()

    def __hash__(self):
        return 0

    def write_if(self, uri, data, tag, **patience):
        found = super().write_if(uri, data, tag, **patience)
        if self.failures and self.failures[0]:
            self.failures[0].pop()
            raise TransientStorageError("timed out")
        return found


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(run_log, "RETRY_S", 0.01)


def open_log(root: Path, node: str, storage: Storage | None = None) -> RunLog:
    run = Destination(TRACKER, storage or Storage(), f"file://{root}/runs/r")
    return RunLog.open(["jsonl"], run, root / node / "unsent")


def lines(root: Path) -> list[dict]:
    folder = root / "runs" / "r"
    files = [*sorted((folder / "metrics").glob("*.jsonl")), folder / "metrics.jsonl"]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def log_steps(log: RunLog, steps: range) -> None:
    for step in steps:
        log.metrics({"train/loss": 1 / step}, step)
        if step % 3 == 0:
            log.metrics({"eval/score": float(step)}, step)
    log.flush(20)
    log.close()


def test_a_resumed_run_on_another_node_goes_on_in_the_same_file_without_a_point_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "PART_BYTES", 150)
    log_steps(open_log(tmp_path, "here"), range(1, 8))
    log_steps(open_log(tmp_path, "there"), range(4, 12))  # resumed at 3: passes 4 to 7 again
    found = lines(tmp_path)
    assert [point["step"] for point in found if "train/loss" in point] == list(range(1, 12))
    assert [point["eval/score"] for point in found if "eval/score" in point] == [3.0, 6.0, 9.0]
    assert found[0]["train/loss"] == 1.0
    assert all(point["at_ms"] > 1e12 for point in found)
    assert len(list((tmp_path / "runs" / "r" / "metrics").iterdir())) > 2


def test_what_the_store_took_without_an_answer_is_there_once(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "PART_BYTES", 150)
    failures = [1] * 4
    log_steps(open_log(tmp_path, "here", Flaky(failures=(failures,))), range(1, 12))
    assert not failures
    assert [point["step"] for point in lines(tmp_path) if "train/loss" in point] == list(range(1, 12))


def test_a_kill_between_putting_a_part_aside_and_the_next_one_repeats_nothing(tmp_path):
    log_steps(open_log(tmp_path, "here"), range(1, 5))
    folder = tmp_path / "runs" / "r"
    (folder / "metrics").mkdir()
    (folder / "metrics" / "000001.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
    log_steps(open_log(tmp_path, "there"), range(3, 8))
    assert [point["step"] for point in lines(tmp_path) if "train/loss" in point] == list(range(1, 8))


def test_a_process_that_was_replaced_undoes_nothing_and_repeats_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "PART_BYTES", 150)
    old, new = open_log(tmp_path, "here"), open_log(tmp_path, "there")
    for log, steps in ((old, range(1, 4)), (new, range(3, 8)), (old, range(4, 10)), (new, range(8, 12))):
        for step in steps:
            log.metrics({"train/loss": 1 / step}, step)
        log.flush(20)
    old.close()
    new.close()
    assert [point["step"] for point in lines(tmp_path)] == list(range(1, 12))


def test_every_line_is_json_and_pictures_are_left_to_others(tmp_path):
    log = open_log(tmp_path, "here")
    log.metrics({"a": math.nan, "b": math.inf, "c": 1.0}, 1)
    log.text("a text", "name", 1)
    log.flush(20)
    log.close()
    (line,) = (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in line
    assert "Infinity" not in line
    assert json.loads(line) | {"at_ms": 0} == {"step": 1, "at_ms": 0, "a": None, "b": None, "c": 1.0}


def test_the_configuration_names_it():
    assert compose(["tracking.sinks=[mlflow,jsonl]"]).tracking.sinks == ("mlflow", "jsonl")
