import shutil
from dataclasses import replace

import pytest

from pipelines.config import RegistryConfig
from pipelines.registry.verdict import Verdict, VerdictLog, VerdictRow, last_passed, standing
from pipelines.signing import Signer, Trust
from pipelines.storage import Storage

VERDICT = Verdict(
    True, "better", "digits", "champion", "2", "d2", "1", "d1", 1, 5000, rows=(VerdictRow("a", "1", "2", True),)
)


@pytest.fixture
def signer(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))
    return Signer.of(RegistryConfig(model="digits"))


@pytest.fixture
def log(tmp_path, signer):
    trust = Trust.of(RegistryConfig(model="digits"))
    return VerdictLog.of(f"file://{tmp_path}/root", "digits", "champion", Storage(), trust)


def test_a_verdict_is_read_as_it_was_written(log, signer):
    assert log.read() == []
    assert log.add(VERDICT, signer, 0)
    assert log.read() == [VERDICT]


def test_of_two_decisions_made_at_the_same_time_one_is_added(log, signer):
    assert log.add(VERDICT, signer, 0)
    assert not log.add(replace(VERDICT, version="3"), signer, 0)
    assert [verdict.version for verdict in log.read()] == ["2"]


def test_entries_of_a_stranger_and_changed_ones_are_not_believed(log, signer, tmp_path, monkeypatch):
    assert log.add(VERDICT, signer, 0)
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "other"))
    assert log.add(replace(VERDICT, version="3"), Signer.of(RegistryConfig(model="digits")), 1)
    assert [verdict.version for verdict in log.read()] == ["2"]
    first = min((tmp_path / "root" / "registry" / "digits" / "champion").glob("*.json"))
    first.write_text(first.read_text().replace("better", "beTTer"))
    assert log.read() == []


def test_an_entry_is_believed_only_in_the_place_for_which_it_was_signed(log, signer, tmp_path):
    """Else a version that was let through once, or for another alias, could be brought back by copying a file."""
    assert log.add(VERDICT, signer, 0)
    assert log.add(replace(VERDICT, version="3"), signer, 1)
    folder = tmp_path / "root" / "registry" / "digits"
    shutil.copy(folder / "champion" / "000000.json", folder / "champion" / "000002.json")
    assert [verdict.version for verdict in log.read()] == ["2", "3"]
    shutil.copytree(folder / "champion", folder / "stable")
    assert replace(log, uri=f"file://{folder}/stable").read() == []
    shutil.copytree(tmp_path / "root", tmp_path / "moved")
    assert len(replace(log, uri=f"file://{tmp_path}/moved/registry/digits/champion").read()) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"verdict": 1}', '{"verdict": 1, "signature": 2}', "null"])
def test_a_damaged_entry_is_as_if_it_were_not_there(log, signer, tmp_path, content):
    assert log.add(VERDICT, signer, 0)
    (tmp_path / "root" / "registry" / "digits" / "champion" / "000001.json").write_text(content)
    assert log.read() == [VERDICT]


def test_an_entry_of_a_stranger_under_a_later_number_does_not_close_the_log(log, signer, tmp_path):
    assert log.add(VERDICT, signer, log.next_number())
    (tmp_path / "root" / "registry" / "digits" / "champion" / "000009.json").write_text("{}")
    assert log.next_number() == 10
    assert log.add(replace(VERDICT, version="3"), signer, log.next_number())
    assert [verdict.version for verdict in log.read()] == ["2", "3"]


def test_what_came_after_a_version_falls_away_when_the_alias_goes_back_to_it():
    third, back = replace(VERDICT, version="3"), replace(VERDICT, rollback=True)
    assert [v.version for v in standing([VERDICT, third])] == ["2", "3"]
    assert standing([VERDICT, third, back]) == [back]
    fourth = replace(VERDICT, version="4")
    assert [v.version for v in standing([VERDICT, third, back, replace(fourth, passed=False), fourth])] == ["2", "4"]


def test_an_alias_belongs_to_the_version_of_the_last_decision_that_let_it_move():
    refused = replace(VERDICT, passed=False, version="3")
    assert last_passed([]) is None
    assert last_passed([refused]) is None
    assert last_passed([VERDICT, replace(VERDICT, version="4"), refused]).version == "4"
