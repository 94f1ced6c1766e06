import time
from dataclasses import dataclass, field, replace

import pytest

from pipelines import tracking
from pipelines.config import RegistryConfig
from pipelines.registry import guard as module
from pipelines.registry.guard import Correction, Guard, Logs, correction, watch
from pipelines.registry.verdict import Verdict, VerdictLog
from pipelines.signing import Signer, Trust
from pipelines.storage import Storage, TransientStorageError
from pipelines.tracking import ModelVersion, TrackingError, UnreachableError

CHAMPION = ("digits", "champion")
FIRST = Verdict(True, "first", "digits", "champion", "1", "d1", at="2026-01-01T00:00:00+00:00")
SECOND = replace(FIRST, version="2", served_digest="d2")
REFUSED = replace(FIRST, passed=False, version="3", served_digest="d3")


def belongs(found, verdicts, digest):
    """The version that an alias is put on, or "stays"."""
    wrong = correction(CHAMPION, found, verdicts, digest)
    return "stays" if wrong is None else wrong.belongs


@pytest.mark.parametrize(
    "found, verdicts, digest, expected",
    [
        ("1", [FIRST], "d1", "stays"),
        ("2", [FIRST], "d1", "1"),
        (None, [FIRST], "d1", "1"),
        ("1", [FIRST, SECOND], "d2", "2"),  # a promotion that has written its verdict and not yet moved the alias
        ("2", [FIRST, SECOND], "d2", "stays"),
        ("3", [FIRST, REFUSED], "d1", "1"),
        ("1", [FIRST, REFUSED], "d1", "stays"),
    ],
)
def test_an_alias_belongs_to_the_version_that_was_let_through_last(found, verdicts, digest, expected):
    assert belongs(found, verdicts, digest) == expected


@pytest.mark.parametrize("verdicts", [[], [REFUSED]])
def test_an_alias_that_was_never_let_through_is_taken_away(verdicts):
    assert belongs("3", verdicts, None) is None
    assert belongs(None, verdicts, None) == "stays"


def test_an_alias_goes_nowhere_else_where_its_version_is_gone_or_replaced():
    """Neither back to the version before, nor to another model that has its number now."""
    for digest in (None, "", "other"):
        assert belongs("1", [FIRST, SECOND], digest) is None
        assert belongs("2", [FIRST, SECOND], digest) is None
        assert belongs(None, [FIRST, SECOND], digest) == "stays"


def test_a_correction_says_what_from_where_and_why():
    moved = Correction("digits", "champion", "2", "1", "it was let through on Monday")
    assert str(moved) == (
        "alias champion of digits was at version 2, and was put back on version 1: it was let through on Monday"
    )
    assert "was gone, and was put back on version 1" in str(replace(moved, found=None))
    assert "was taken away from version 2" in str(replace(moved, belongs=None))


@dataclass
class Registry:
    """What MLflow has; `meanwhile` happens once, after it was asked for aliases."""

    aliases: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(
        default_factory=lambda: {n: {"served_digest": f"d{n}"} for n in ("1", "2", "3")}
    )
    meanwhile: list = field(default_factory=list)
    moves: list[str] = field(default_factory=list)

    def find(self, uri, name):
        found = dict(self.aliases) if name == "digits" else {}
        for happen in (self.meanwhile.pop() for _ in range(len(self.meanwhile))):
            happen()
        return found

    def version(self, uri, name, *, number):
        tags = self.versions.get(number)
        return None if tags is None else ModelVersion(name, number, "", tags, ())

    def put(self, uri, name, alias, number):
        self.moves.append(f"{alias}->{number}")
        self.aliases[alias] = number

    def take(self, uri, name, alias):
        self.moves.append(f"{alias}->")
        del self.aliases[alias]

    def tag(self, uri, name, number, tags):
        self.versions[number] |= tags


@pytest.fixture
def registry(monkeypatch):
    made = Registry()
    monkeypatch.setattr(tracking, "aliases", made.find)
    monkeypatch.setattr(tracking, "version", made.version)
    monkeypatch.setattr(tracking, "set_alias", made.put)
    monkeypatch.setattr(tracking, "delete_alias", made.take)
    monkeypatch.setattr(tracking, "set_version_tags", made.tag)
    return made


@dataclass
class Gate:
    """Writes signed verdicts below a root, and has a guard of it."""

    root: str
    signer: Signer
    trust: Trust
    said: list[str] = field(default_factory=list)

    def decide(self, *verdicts: Verdict, signer: Signer | None = None) -> None:
        for verdict in verdicts:
            log = VerdictLog.of(self.root, verdict.model, verdict.alias, Storage(), self.trust)
            assert log.add(verdict, signer or self.signer, log.next_number())

    def guard(self) -> Guard:
        return Guard("", Logs(self.root, Storage(), self.trust, self.said.append), CHAMPION, self.said.append)


@pytest.fixture
def gate(tmp_path, monkeypatch):
    config = RegistryConfig(model="digits")
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))
    return Gate(f"file://{tmp_path}/root", Signer.of(config), Trust.of(config))


def stranger(tmp_path, monkeypatch) -> Signer:
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "stranger"))
    return Signer.of(RegistryConfig(model="digits"))


def test_a_moved_alias_is_put_back_and_both_versions_say_so(registry, gate):
    gate.decide(FIRST)
    registry.aliases["champion"] = "2"
    guard = gate.guard()
    guard.settle()
    assert registry.aliases == {"champion": "1"}
    (done,) = guard.corrections
    assert done.at
    assert gate.said == [str(done)]
    assert registry.versions["1"]["guard.champion"] == registry.versions["2"]["guard.champion"] == f"{done.at} {done}"
    assert "guard.champion" not in registry.versions["3"]
    guard.settle()
    assert len(guard.corrections) == 1


def test_aliases_that_the_gate_does_not_guard_are_left_alone(registry, gate):
    gate.decide(FIRST, replace(SECOND, alias="stable"))
    registry.aliases |= {"champion": "1", "candidate": "3", "previous": "3", "stable": "3"}
    gate.guard().settle()
    assert registry.aliases == {"champion": "1", "candidate": "3", "previous": "3", "stable": "2"}


def test_the_configured_alias_is_guarded_before_it_has_a_log(registry, gate):
    gate.decide(replace(FIRST, alias="stable"))
    registry.aliases |= {"champion": "3", "stable": "1"}
    gate.guard().settle()
    assert registry.aliases == {"stable": "1"}


def test_without_a_believed_verdict_anywhere_nothing_is_touched_and_that_is_said_once(
    registry, gate, tmp_path, monkeypatch
):
    """A guard with another root, or without the key, must not take every alias away."""
    registry.aliases["champion"] = "3"
    guard = gate.guard()
    guard.settle()
    guard.settle()
    assert len(gate.said) == 1
    assert "storage.root is another one" in gate.said[0]
    gate.decide(FIRST, signer=stranger(tmp_path, monkeypatch))
    again = gate.guard()
    again.settle()
    assert "registry.trusted_keys" in gate.said[-1]
    assert registry.aliases == {"champion": "3"}
    gate.decide(FIRST)
    again.settle()
    assert registry.aliases == {"champion": "1"}


def test_a_forged_entry_is_not_believed_and_said_once(registry, gate, tmp_path, monkeypatch):
    gate.decide(FIRST)
    registry.aliases["champion"] = "1"
    guard = gate.guard()
    guard.settle()
    gate.decide(SECOND, signer=stranger(tmp_path, monkeypatch))
    registry.aliases["champion"] = "2"
    guard.settle()
    guard.settle()
    assert registry.aliases == {"champion": "1"}
    (said,) = [line for line in gate.said if "is not believed" in line]
    assert "000001.json" in said


def test_a_promotion_between_the_questions_is_not_undone(registry, gate):
    """It writes its verdict and moves the alias after the guard has asked MLflow, before it reads the log."""

    def promote():
        gate.decide(SECOND)
        registry.aliases["champion"] = "2"

    gate.decide(FIRST)
    registry.aliases["champion"] = "1"
    registry.meanwhile = [promote]
    gate.guard().settle()
    assert registry.aliases == {"champion": "2"}
    assert "champion->1" not in registry.moves


def test_a_promotion_that_the_guard_undid_is_done_again_at_once(registry, gate, monkeypatch):
    """One that came between the reading of the log and the guard's own move."""
    gate.decide(FIRST)
    registry.aliases["champion"] = "3"
    put = registry.put

    def late(uri, name, alias, number):
        if not registry.moves:
            gate.decide(SECOND)
            registry.aliases["champion"] = "2"
        put(uri, name, alias, number)

    monkeypatch.setattr(tracking, "set_alias", late)
    gate.guard().settle()
    assert registry.moves == ["champion->1", "champion->2"]


def test_an_alias_that_gets_its_first_log_is_guarded_from_the_same_look_on(registry, gate):
    gate.decide(FIRST)
    registry.aliases |= {"champion": "1", "stable": "3"}
    guard = gate.guard()
    guard.settle()
    gate.decide(replace(SECOND, alias="stable"))
    guard.settle()
    assert registry.aliases == {"champion": "1", "stable": "2"}


def test_two_guards_that_disagree_do_not_keep_each_other_busy_within_a_look(registry, gate, monkeypatch):
    gate.decide(FIRST)

    def contrary(uri, name, alias, number):
        registry.put(uri, name, alias, "3")

    monkeypatch.setattr(tracking, "set_alias", contrary)
    registry.aliases["champion"] = "3"
    gate.guard().settle()
    assert len(registry.moves) == module.ROUNDS


def test_what_mlflow_refuses_of_one_model_keeps_no_other_from_being_guarded(registry, gate, monkeypatch):
    """As where the guard may not write to every model."""
    gate.decide(replace(FIRST, model="closed"), FIRST)
    registry.aliases["champion"] = "2"

    def find(uri, name):
        if name == "closed":
            raise TrackingError("permission denied", 403)
        return registry.find(uri, name)

    monkeypatch.setattr(tracking, "aliases", find)
    guard = gate.guard()
    guard.guarded.add(("closed", "champion"))
    with pytest.raises(TrackingError, match="permission denied"):
        guard.settle()
    assert registry.aliases == {"champion": "1"}


def test_an_outage_is_waited_for_and_said_once(registry, gate, monkeypatch):
    """Whichever service it is, and however its words differ from try to try."""
    gate.decide(FIRST)
    registry.aliases["champion"] = "2"
    outages = [UnreachableError("no answer 1"), UnreachableError("no answer 2"), TransientStorageError("no S3")]
    waits: list[float] = []

    def find(uri, name):
        if outages:
            raise outages.pop(0)
        return registry.find(uri, name)

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(tracking, "aliases", find)
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        watch(gate.guard())
    assert registry.aliases == {"champion": "1"}
    assert waits == [2.0] * 4
    assert [line.partition(":")[0] for line in gate.said] == [
        "waiting, and trying again every 2 s",
        "waiting, and trying again every 2 s",
        "alias champion of digits was at version 2, and was put back on version 1",
        "MLflow and storage answer again",
    ]
