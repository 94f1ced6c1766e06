import importlib.util
import stat

import pytest

from pipelines.stack import StackError, orchestrator
from pipelines.stack.private import choose_private


def test_dagster_keeps_its_state_in_the_stacks_folder_and_the_users_settings_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    orchestrator.prepare(tmp_path)
    settings = tmp_path / orchestrator.SETTINGS_FILE
    assert stat.S_IMODE((tmp_path / "dagster").stat().st_mode) == 0o700
    files = [settings, tmp_path / "dagster" / "dagster.yaml"]
    for file in files:
        file.write_text("# mine")
    orchestrator.prepare(tmp_path)
    assert [file.read_text() for file in files] == ["# mine"] * 2
    environment = orchestrator.orchestrator_environment(tmp_path)
    assert environment["DAGSTER_HOME"] == str(tmp_path / "dagster")
    assert environment["DDPM_ORCHESTRATE"] == str(settings)
    assert environment["DDPM_HOME"] == str(tmp_path)


def test_a_private_stack_has_no_page_without_a_password(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    choose_private(tmp_path, True)
    with pytest.raises(StackError, match=r"asks nobody for a password.*ddpm up --shared --orchestrator"):
        orchestrator.prepare(tmp_path)


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StackError, match=r"dagster and dagster_webserver.*ddpm-pipelines\[orchestrate\]"):
        orchestrator.prepare(tmp_path)
    assert not (tmp_path / "dagster").exists()
