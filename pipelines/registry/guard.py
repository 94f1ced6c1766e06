"""The guard of aliases: an alias that was moved behind the gate's back is noticed, and put back where it belongs.

Where an alias belongs is what the log of the gate's verdicts says, never what MLflow says. MLflow has no way to move an
alias only if nothing has changed meanwhile; so the guard asks MLflow first and reads the log after that. A promotion
writes its verdict before it moves the alias: whatever a promotion has moved by the time of the question is in the log
by the time of the reading. What has changed after that shows in the next look, which follows every correction at once.
So the guard may do a promotion's move itself, or a moment later than another one undo it, and both end the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from pipelines import tracking
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Notice
from pipelines.registry.verdict import Verdict, last_passed, now, read_entry
from pipelines.signing import SignatureError, Trust
from pipelines.storage import Entry, NotFoundError, Storage, join, layout
from pipelines.tracking import TrackingError, UnreachableError

Alias = tuple[str, str]
"""(registered model, alias)."""

EVERY_S = 2.0
"""Seconds between two looks."""
ROUNDS = 5
"""Looks that follow each other at once while there is something to correct."""


@dataclass(frozen=True)
class Correction:
    """An alias that is not where it belongs.

    Attributes:
        found: the version that it pointed to; None where it was nowhere.
        belongs: the version that it is put on; None where it is taken away.
        why: in words.
        at: when it was corrected, in UTC; empty before that.
    """

    model: str
    alias: str
    found: str | None
    belongs: str | None
    why: str
    at: str = ""

    def __str__(self) -> str:
        """Return what was done, in words."""
        where = f"alias {self.alias} of {self.model}"
        if self.belongs is None:
            return f"{where} was taken away from version {self.found}: {self.why}"
        found = "was gone, and" if self.found is None else f"was at version {self.found}, and"
        return f"{where} {found} was put back on version {self.belongs}: {self.why}"


def correction(alias: Alias, found: str | None, verdicts: Sequence[Verdict], digest: str | None) -> Correction | None:
    """Return how an alias has to be corrected; None where it is where it belongs.

    It belongs to the version that the last passing verdict let it move to. Where that version is gone, or another model
    has its number now, it belongs nowhere: no earlier version is let through again.

    Args:
        found: the version that it points to; None where it is nowhere.
        verdicts: of the alias, as far as they are believed, oldest first.
        digest: the tag `served_digest` of the version of the last passing verdict, "" where it has none; None where
            there is no such version.
    """
    passed = last_passed(verdicts)
    if passed is None:
        belongs, why = None, "no signed verdict has let it through"
    elif digest is None:
        belongs, why = None, f"version {passed.version}, which was let through on {passed.at}, is gone"
    elif passed.served_digest and digest != passed.served_digest:
        belongs, why = None, f"version {passed.version} is not the model that was let through on {passed.at}"
    else:
        belongs, why = passed.version, f"it was let through on {passed.at}"
    return None if belongs == found else Correction(*alias, found, belongs, why)


@dataclass
class Logs:
    """The verdicts of every alias that has a log below a storage root; each entry is read once.

    Attributes:
        said: called once for each entry that is not believed.
    """

    root: str
    storage: Storage
    trust: Trust
    said: Notice
    _entries: dict[Entry, Verdict | None] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Address of the folder of all logs."""
        return join(self.root, layout.REGISTRY)

    def read(self) -> dict[Alias, list[Verdict]]:
        """Return alias -> its verdicts, oldest first; none where nobody who is trusted has signed any."""
        folder = self.folder
        found: dict[Alias, list[Verdict]] = {}
        for entry in self.storage.list(folder, patience_s=0):
            model, alias, *rest = entry.uri[len(folder) + 1 :].split("/")[:4]
            if len(rest) != 1 or not rest[0].endswith(".json"):
                continue
            verdicts = found.setdefault((model, alias), [])
            with suppress(NotFoundError):
                if entry not in self._entries:
                    self._entries[entry] = self._believed(entry.uri)
                verdict = self._entries[entry]
                verdicts += [] if verdict is None else [verdict]
        return found

    def _believed(self, uri: str) -> Verdict | None:
        try:
            return read_entry(uri, self.storage, self.trust)
        except SignatureError as error:
            self.said(f"{uri} is not believed: {error}")
            return None


@contextmanager
def _going_on(refused: list[TrackingError]) -> Iterator[None]:
    """Go on where MLflow refuses something, as it may for one model of many, and note that; raise what an outage does.

    Args:
        refused: to which a refusal is added.
    """
    try:
        yield
    except UnreachableError:
        raise
    except TrackingError as error:
        refused.append(error)


@dataclass
class Guard:
    """Compares the aliases of a registry with the log of the gate's verdicts, and corrects them.

    Attributes:
        uri: address of the MLflow server.
        logs: the verdicts.
        always: the alias that is guarded though it has no log yet.
        say: called with each correction in words.
    """

    uri: str
    logs: Logs
    always: Alias
    say: Notice
    corrections: list[Correction] = field(default_factory=list)
    guarded: set[Alias] = field(default_factory=set)
    _idle: bool = False

    def __post_init__(self) -> None:
        self.guarded.add(self.always)

    def settle(self) -> None:
        """Look, and correct what is wrong, until a look finds nothing more to do.

        Raises:
            PipelineError: MLflow or storage does not answer; or MLflow refuses something, which keeps no other alias
                from being corrected.
        """
        for _ in range(ROUNDS):
            known, refused = set(self.guarded), list[TrackingError]()
            wrong = self._look(refused)
            for each in wrong:
                with _going_on(refused):
                    self._correct(each)
            if refused:
                raise refused[0]
            if not wrong and self.guarded == known:
                return

    def _look(self, refused: list[TrackingError]) -> list[Correction]:
        """Return what is wrong with the aliases that were known before; learn of further ones."""
        known = sorted(self.guarded)
        aliases: dict[str, dict[str, str]] = {}
        for model in dict.fromkeys(model for model, _ in known):
            with _going_on(refused):
                aliases[model] = tracking.aliases(self.uri, model)
        verdicts = self.logs.read()  # after MLflow was asked, see above
        self.guarded |= verdicts.keys()
        found: list[Correction] = []
        if not self._anything(verdicts):
            return found
        for model, alias in known:
            if model in aliases:
                believed = verdicts.get((model, alias), [])
                with _going_on(refused):
                    digest = self._digest(model, last_passed(believed))
                    wrong = correction((model, alias), aliases[model].get(alias), believed, digest)
                    found += [] if wrong is None else [wrong]
        return found

    def _digest(self, model: str, passed: Verdict | None) -> str | None:
        """Return the tag `served_digest` of the version of a verdict, as `correction` takes it."""
        version = None if passed is None else tracking.version(self.uri, model, number=passed.version)
        return None if version is None else version.tags.get("served_digest", "")

    def _anything(self, verdicts: Mapping[Alias, Sequence[Verdict]]) -> bool:
        """Return whether any verdict at all is believed; where none is, say so.

        Else a guard with another storage root, or without the key that signs, would take every alias away.
        """
        anything = any(verdicts.values())
        if not anything and not self._idle:
            why = "there is no verdict yet, or storage.root is another one"
            if verdicts:
                why = "registry.trusted_keys and registry.trusted_certificates name nobody who has signed there"
            self.say(f"nothing at {self.logs.folder} to guard by, and no alias is touched until there is: {why}")
        self._idle = not anything
        return anything

    def _correct(self, wrong: Correction) -> None:
        """Move an alias to where it belongs, and write that down in the tags of both versions."""
        if wrong.belongs is None:
            tracking.delete_alias(self.uri, wrong.model, wrong.alias)
        else:
            tracking.set_alias(self.uri, wrong.model, wrong.alias, wrong.belongs)
        done = replace(wrong, at=now())
        self.corrections.append(done)
        self.say(str(done))
        for version in filter(None, (wrong.found, wrong.belongs)):
            try:
                tracking.set_version_tags(self.uri, wrong.model, version, {f"guard.{wrong.alias}": f"{done.at} {done}"})
            except TrackingError as error:
                self.say(f"version {version} of {wrong.model} could not be tagged with it: {error}")


def watch(guard: Guard, every_s: float = EVERY_S) -> None:
    """Guard until Ctrl-C.

    Args:
        every_s: seconds between two looks.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    waiting: type[PipelineError] | None = None
    while True:
        try:
            guard.settle()
            if waiting is not None:
                guard.say("MLflow and storage answer again")
            waiting = None
        except PipelineError as error:
            if waiting is not type(error):  # its words may differ each time
                guard.say(f"waiting, and trying again every {every_s:g} s: {error}")
            waiting = type(error)
        time.sleep(every_s)
