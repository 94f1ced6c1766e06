"""The gate's decisions: what they say, and the log of them in storage, which every decision is added to.

    ROOT/registry/MODEL/ALIAS/000000.json, 000001.json, …       {"verdict": …, "signature": …}

Entries are only ever added, each under the next number and on the condition that nobody has taken it. What is signed
names model, alias and number: an entry that was copied to another place is not believed there. The log says how often
an alias was asked for, and where it belongs; the tags of a version are copies for who reads its page.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any

from pipelines.presentation.blocks import Block, Table, Text
from pipelines.signing import SignatureError, Signer, Trust, seal, unseal
from pipelines.storage import ConflictError, Storage, join, layout

FIELD = "verdict"
"""Key of an entry's file that holds the decision."""


@dataclass(frozen=True)
class VerdictRow:
    """One line of the gate's table.

    Attributes:
        name: what is asked for.
        figure: what was found, in words.
        bound: what it has to be, in words.
        passed: whether it is.
    """

    name: str
    figure: str
    bound: str
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """A decision whether an alias may point to a version.

    Attributes:
        passed: whether it may.
        reason: in words.
        model: name of the registered model.
        alias: the alias.
        version: the version that it was about.
        served_digest: SHA-256 of the weights and settings that it serves; empty where it has no evidence.
        champion: the version at the alias then; None where it had none.
        champion_digest: the same of that version; empty where nothing was compared.
        attempt: which comparison with that champion this was, 1 for the first; 0 where nothing was compared.
        n: samples of each that were compared; 0 where nothing was compared.
        margin: distance by which the version was allowed to be worse; None where it had to be better.
        rollback: whether the alias was given back to a version that had had it before.
        content_digest: SHA-256 of all files of the model that it serves; empty where it has no evidence, and in
            decisions of earlier releases.
        rows: the gate's table.
        at: when, in UTC.
    """

    passed: bool
    reason: str
    model: str = ""
    alias: str = ""
    version: str = ""
    served_digest: str = ""
    champion: str | None = None
    champion_digest: str = ""
    attempt: int = 0
    n: int = 0
    margin: float | None = None
    rollback: bool = False
    content_digest: str = ""
    rows: tuple[VerdictRow, ...] = ()
    at: str = ""

    def __str__(self) -> str:
        """Return the verdict in words."""
        return f"{self.outcome}: {self.reason}"

    @property
    def outcome(self) -> str:
        """Return "passed" or "refused"."""
        return "passed" if self.passed else "refused"

    def refused(self, rows: Sequence[VerdictRow]) -> Verdict:
        """Return this verdict with a table, of which it names the first line that does not pass."""
        wrong = next(row for row in rows if not row.passed)
        return replace(self, reason=f"{wrong.name}: {wrong.figure}; required: {wrong.bound}", rows=tuple(rows))

    def to_plain(self) -> dict[str, Any]:
        """Return the verdict as JSON types."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Verdict:
        """Read what `to_plain` gave."""
        known = {f.name: plain[f.name] for f in fields(cls) if f.name in plain}
        return cls(**{**known, "rows": tuple(VerdictRow(**row) for row in plain["rows"])})


def verdict_blocks(verdict: Verdict) -> list[Block]:
    """Return a decision in a sentence, and the table that it rests on."""
    at = verdict.at.replace("T", " ").replace("+00:00", " UTC")
    text = f"Alias {verdict.alias}, version {verdict.version}, {at}: {verdict}"
    if verdict.champion is not None:
        text += f"; compared with version {verdict.champion}"
    if verdict.n:
        text += f" on {verdict.n:,} samples of each, attempt {verdict.attempt}"
    rows = [("yes" if row.passed else "NO", row.name, row.figure, row.bound) for row in verdict.rows]
    table = [Table(("passed", "check", "found", "required"), rows, headed=False)] if rows else []
    return [Text(f"{text}."), *table]


@dataclass(frozen=True)
class VerdictLog:
    """The decisions about one alias of one registered model.

    Attributes:
        uri: folder of the log.
        trust: whose entries are believed; others are as if they were not there.
    """

    uri: str
    storage: Storage
    trust: Trust

    @classmethod
    def of(cls, root: str, model: str, alias: str, storage: Storage, trust: Trust) -> VerdictLog:
        """Return the log of an alias below a storage root."""
        return cls(layout.verdict_folder(root, model, alias), storage, trust)

    def read(self) -> list[Verdict]:
        """Return the decisions that somebody who is trusted has signed, oldest first."""
        found = []
        for uri in self._entries():
            with suppress(SignatureError):
                found.append(read_entry(uri, self.storage, self.trust))
        return found

    def add(self, verdict: Verdict, signer: Signer, number: int) -> bool:
        """Add a decision under the number that was the next one before it was made, and return whether it still was.

        Where another decision has it, nothing is added: read the log and decide again.
        """
        uri = join(self.uri, layout.numbered(number, 6))
        entry = seal(verdict.to_plain(), _place(uri), signer, FIELD)
        try:
            self.storage.write_if(uri, entry, None)
        except ConflictError:
            return False
        return True

    def next_number(self) -> int:
        """Return the number of the next entry: after the last one that is there, by whomever."""
        numbers = [uri.rsplit("/", 1)[-1].removesuffix(".json") for uri in self._entries()]
        return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1

    def _entries(self) -> list[str]:
        return sorted(entry.uri for entry in self.storage.list(self.uri) if entry.uri.endswith(".json"))


def standing(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the decisions that gave an alias to one version after another, up to the one that has it now.

    Giving it back to an earlier version takes away those that came after that.
    """
    held: list[Verdict] = []
    for verdict in (verdict for verdict in verdicts if verdict.passed):
        versions = [earlier.version for earlier in held]
        if verdict.rollback and verdict.version in versions:
            del held[versions.index(verdict.version) :]
        held.append(verdict)
    return held


def read_entry(uri: str, storage: Storage, trust: Trust) -> Verdict:
    """Return the decision in an entry of a log.

    Raises:
        SignatureError: it is damaged, nobody who is trusted has signed it, or it was signed for another place.
        NotFoundError: it is not there.
    """
    return Verdict.from_plain(unseal(storage.read(uri), _place(uri), trust, FIELD))


def last_passed(verdicts: Sequence[Verdict]) -> Verdict | None:
    """Return the last decision that let an alias move; None without one."""
    return next((verdict for verdict in reversed(verdicts) if verdict.passed), None)


def now() -> str:
    """Return the time, as verdicts have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _place(uri: str) -> str:
    """Return MODEL/ALIAS/NUMBER.json of an entry, which is the same wherever the storage root is moved to."""
    return "/".join(uri.split("/")[-3:])
