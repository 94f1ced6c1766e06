"""What the gate's door does around its decision: who signs it, what it is about, and when an earlier one answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from ddpm.model import ModelSpec
from pipelines import tracking
from pipelines.config import ConfigError, compose
from pipelines.presentation.progress import Silent
from pipelines.registry import Gate, Trust, Verdict
from pipelines.registry.comparison import gate_seed
from pipelines.registry.decision import SAMPLES, comparable
from pipelines.registry.gate import OpenedVersion, _content_digest, _judged_before, _other_settings
from pipelines.registry.verdict import VerdictLog, VerdictRow
from pipelines.signing.keys import public_key
from pipelines.storage import Storage
from pipelines.tracking import ModelVersion
from tests.pipelines.registry.version import SPEC, scores
from tests.pipelines.signing.authority import write_key

STORAGE = Storage()


@pytest.fixture
def world(home, tmp_path, monkeypatch):
    """A gate before `champion` of two versions that passes every one, and what it was asked and has moved."""
    made = [ModelVersion("m", number, "r", {"served_digest": number}, ()) for number in "12"]
    found = SimpleNamespace(versions=made, aliases={}, judged=[], moved=[], wrong=None)

    def version(uri, name, *, alias=None, number=None):
        wanted = found.aliases.get(alias) if alias else number
        return next((v for v in made if v.version == wanted), None)

    def judge(self, version, champion, verdicts, margin, first, dry_run):
        found.judged.append((version.version, champion.version if champion else first))
        number = version.version
        return None, Verdict(True, "judged", self.model, self.alias, number, served_digest=number)

    def set_alias(uri, name, alias, number):
        found.moved.append((alias, number))
        found.aliases[alias] = number

    monkeypatch.setattr(tracking, "version", version)
    monkeypatch.setattr(tracking, "set_alias", set_alias)
    monkeypatch.setattr(Gate, "_judge", judge)
    monkeypatch.setattr(Gate, "_wrong", lambda self, version: found.wrong)
    monkeypatch.setattr(Gate, "_record", lambda self, verdict, opened: None)
    found.config = compose(["+experiment=digits", f"storage.root=file://{tmp_path}", "tracking.uri=http://mlflow"])
    found.gate = Gate(found.config, Silent(), lambda: None, "m", "champion")
    return found


def test_a_decision_that_nobody_here_would_believe_is_not_made(world, tmp_path):
    other = public_key(write_key(tmp_path / "other.pem", ec.generate_private_key(ec.SECP256R1())))
    stranger = world.config.registry.model_copy(update={"trusted_keys": (str(other),)})
    gate = replace(world.gate, config=world.config.model_copy(update={"registry": stranger}))
    with pytest.raises(ConfigError, match="would not be believed here"):
        gate.promote(world.versions[0])
    with pytest.raises(ConfigError, match="would not be believed here"):
        gate.rollback()
    assert (world.judged, world.moved, gate.log.next_number()) == ([], [], 0)
    assert gate.promote(world.versions[0], dry_run=True).passed


def test_an_alias_that_was_moved_by_hand_proves_nothing(world):
    world.aliases["champion"] = "1"
    assert world.gate.holds(world.versions[0]) is None
    assert world.gate.promote(world.versions[0]).reason == "judged"
    assert world.judged == [("1", "no version with the alias has passed yet")]
    assert world.gate.holds(world.versions[0]).passed
    assert world.gate.promote(world.versions[0]).reason == "the alias champion is there already"
    assert len(world.judged) == 1


def test_a_dry_run_does_not_put_an_alias_back_where_it_belongs(world):
    world.gate.promote(world.versions[0])
    world.aliases["champion"] = "2"
    world.moved.clear()
    verdict = world.gate.promote(world.versions[0], dry_run=True)
    assert (verdict.passed, verdict.reason) == (True, "the alias champion belongs there by the log of decisions")
    assert world.moved == []
    world.gate.promote(world.versions[0])
    assert world.moved == [("champion", "1")]


def test_a_version_that_has_the_alias_is_refused_once_its_files_are_not_what_was_signed(world):
    world.gate.promote(world.versions[0])
    world.moved.clear()
    world.wrong = VerdictRow("signature", "model.safetensors is another", "by somebody who is trusted", False)
    assert world.gate.holds(world.versions[0]) is None
    verdict = world.gate.promote(world.versions[0])
    assert (verdict.passed, verdict.reason.startswith("signature: model.safetensors is another")) == (False, True)
    assert (world.moved, world.gate.log.next_number()) == ([], 1)
    assert not world.gate.promote(world.versions[0], dry_run=True).passed


def test_what_a_dry_run_compares_is_drawn_from_other_noise_than_what_decides():
    seeds = [gate_seed("m", "champion", "d"), gate_seed("m", "champion", "d", dry_run=True)]
    assert len({*seeds, gate_seed("m", "champion", "e", dry_run=True)}) == 3


def present(evidence, *rows: bool, version: str = "1") -> OpenedVersion:
    table = tuple(VerdictRow("signature", "", "", passed) for passed in rows)
    return OpenedVersion(ModelVersion("m", version, "r", {}, ()), evidence, table, Path("nowhere"), None)


def test_what_the_present_version_serves_is_known_by_what_is_signed_alone():
    evidence = SimpleNamespace(content_digest="c1")
    logged = replace(EARLIER, version="1", content_digest="c0")
    assert _content_digest(present(evidence, True), [logged]) == "c1"
    assert _content_digest(present(evidence, False), [logged]) == "c0"  # its folder may have been made to look alike
    assert _content_digest(present(None, False), [logged]) == "c0"
    assert _content_digest(present(evidence, False), [replace(logged, content_digest="")]) is None
    assert _content_digest(present(evidence, False, version="3"), [logged]) is None


ALIKE = comparable(scores(), scores(), "models:/m/1")
EARLIER = Verdict(True, "better", "m", "champion", "2", "c", "1", "d", 1, 359, rows=tuple(ALIKE))


@pytest.mark.parametrize(
    "now, answers",
    [
        ({}, True),
        ({"n": 500}, True),  # the comparison draws samples of its own
        ({"evaluator_digest": "another"}, False),
        ({"stream_digest": "another"}, False),
        ({"prompts": {"captions_digest": "p"}}, False),
    ],
)
def test_an_earlier_decision_answers_only_where_evaluator_and_data_are_the_same(now, answers):
    asked = replace(EARLIER, version="4", attempt=0, rows=())
    alike = comparable(scores(**now), scores(**now), "models:/m/3")
    assert SAMPLES in {row.name for row in alike}
    assert (_judged_before([EARLIER], asked, alike) is EARLIER) is answers
    assert _judged_before([EARLIER], replace(asked, n=400), alike) is None


def opened(data: str, trained: str | None = "file:///old", **fields) -> OpenedVersion:
    evidence = None if data == "" else SimpleNamespace(scores=scores(**fields), dataset_uri=data)
    spec = None if trained is None else replace(SPEC, lineage={"dataset_uri": trained})
    assert spec is None or isinstance(spec, ModelSpec)
    return OpenedVersion(None, evidence, (VerdictRow("signature", "", "", passed=True),), None, spec)


@pytest.mark.parametrize(
    "candidate, champion, settings",
    [
        (opened("file:///old"), opened("file:///old"), []),
        (opened("file:///new"), opened("file:///old"), ["data.uri=file:///new"]),
        (opened("file:///new"), opened("file:///new"), ["data.uri=file:///new"]),
        (opened("file:///old", n=500), opened("file:///old"), ["evaluation.n=500"]),
        (
            opened("file:///old", evaluator="encoder"),
            opened("", None),
            ["data.uri=file:///old", "evaluation.n=359", "evaluation.evaluator=encoder"],
        ),
    ],
)
def test_a_refusal_names_what_scores_the_champion_as_the_candidate_was(candidate, champion, settings):
    assert _other_settings(candidate, champion) == settings


def test_the_log_is_that_of_the_alias(world):
    world.gate.promote(world.versions[0])
    log = VerdictLog.of(world.config.storage.root, "m", "champion", STORAGE, Trust.of(world.config.registry))
    assert [verdict.version for verdict in log.read()] == ["1"]
