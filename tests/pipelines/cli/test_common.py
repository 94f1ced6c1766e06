"""What the verbs share."""

import errno
import json
import os
import sys
from types import SimpleNamespace

import pytest
import typer

from pipelines.cli.common import answer_json, check_file


def test_what_ray_says_of_a_lost_node_does_not_follow_the_answer(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # is put back at the end
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    answer_json(True, {"status": "stopped"})
    print("(raylet) the node with address 10.0.0.3 has been marked dead")
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1]) == {"status": "stopped"}
    assert "marked dead" in said.err


def test_a_command_without_ray_leaves_stdout_alone(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    answer_json(True, {})
    print("more")
    assert capsys.readouterr().out.splitlines() == ["{}", "more"]


def test_an_unwritable_file_is_reported_before_any_work(tmp_path, monkeypatch):
    check_file("--out", tmp_path / "report.html", "report.html")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(typer.BadParameter, match=r"--out .*new\.html cannot be written by this user"):
        check_file("--out", tmp_path / "new.html", "report.html")
    (tmp_path / "old.html").touch()
    check_file("--out", tmp_path / "old.html", "report.html")


def test_a_file_in_a_folder_that_may_not_be_looked_into_is_refused(tmp_path, monkeypatch):
    stat = os.stat

    def closed(path, *arguments, **options):
        if path == tmp_path / "report.html":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("os.stat", closed)
        patch.setattr("os.access", lambda path, mode: False)
        with pytest.raises(typer.BadParameter, match=r"--out .*report\.html cannot be written by this user"):
            check_file("--out", tmp_path / "report.html", "report.html")
