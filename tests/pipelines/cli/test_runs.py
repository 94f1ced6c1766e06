"""`ddpm logs` on a folder, without services."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.storage import Storage
from pipelines.training.log_lines import LogLine, encode, log_address


def ddpm(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["ddpm", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides for a storage of a test's own; a local stack must not be needed, nor started."""
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))
    folder = f"file://{tmp_path}/runs/first"
    for rank, at in ((0, 2.0), (1, 1.0)):
        said = LogLine(at, "WARNING", rank, "pipelines.x", f"rank {rank} speaks")
        Storage().write(log_address(folder, 1, rank, "a", 0), encode([said]))
    return ["storage=file", f"storage.root=file://{tmp_path}"]


def test_logs_are_printed_in_order_of_time_on_stdout(elsewhere, monkeypatch, capsys, tmp_path):
    assert ddpm(monkeypatch, "logs", "first", *elsewhere) == 0
    captured = capsys.readouterr()
    assert [row.split("WARNING  ")[1] for row in captured.out.splitlines()] == ["rank 1 speaks", "rank 0 speaks"]
    assert captured.err == ""
    assert not (tmp_path / "home").exists()


def test_logs_of_one_rank_as_json(elsewhere, monkeypatch, capsys):
    assert ddpm(monkeypatch, "logs", "first", "--rank", "1", "--json", *elsewhere) == 0
    captured = capsys.readouterr()
    (row,) = captured.out.splitlines()
    assert [line["message"] for line in json.loads(row)["lines"]] == ["rank 1 speaks"]


def test_following_a_run_that_was_left_alone_ends(elsewhere, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.training.log_lines.LIVE_S", -1.0)
    assert ddpm(monkeypatch, "logs", "first", "--follow", *elsewhere) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "is not being trained" in captured.err


def test_a_run_that_does_not_exist_is_an_error_that_says_where_it_was_looked_for(elsewhere, monkeypatch, capsys):
    assert ddpm(monkeypatch, "logs", "nobody", *elsewhere) == 1
    assert "nothing is stored at file:///" in capsys.readouterr().err
