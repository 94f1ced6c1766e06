"""The gate: move an alias to a version, or back to the version before, or refuse; the decision is recorded first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ddpm.model import ModelSpec, read_spec
from pipelines import tracking
from pipelines.config import PREVIOUS, Config
from pipelines.environment.scratch import temporary_folder
from pipelines.evaluation.scores import Scores
from pipelines.presentation.progress import Display
from pipelines.registry.card import describe
from pipelines.registry.comparison import compare, gate_seed, open_data, request_of, subject_of
from pipelines.registry.contents import check_version, model_folder
from pipelines.registry.decision import SAMPLES, absolute_bounds, comparable, decide
from pipelines.registry.evidence import Evidence
from pipelines.registry.forgotten import ForgetRecord, forgotten_row, read_records, record_of
from pipelines.registry.package import RegistryError
from pipelines.registry.verdict import Verdict, VerdictLog, VerdictRow, now, standing
from pipelines.registry.verify import check_data
from pipelines.signing import Signer, Trust, check_signing
from pipelines.storage import Storage
from pipelines.tracking import ModelVersion


@dataclass(frozen=True)
class OpenedVersion:
    """A version whose folder is on this machine.

    Attributes:
        evidence: None where it has none that is believed.
        rows: lines of the gate's table about its signature, evidence, tags and files.
        folder: with its model, as long as the version is open.
        spec: the description of the model; None where that cannot be read.
    """

    version: ModelVersion
    evidence: Evidence | None
    rows: tuple[VerdictRow, ...]
    folder: Path
    spec: ModelSpec | None

    @property
    def wrong(self) -> VerdictRow | None:
        """The first line of the table that does not pass; None where all do, and then there is evidence."""
        return next((row for row in self.rows if not row.passed), None)


@dataclass(frozen=True)
class Gate:
    """The gate before one alias of a registered model.

    Attributes:
        config: names the services, the evaluator, who signs and who is believed.
        display: shows what is done.
        connect: connects this process to the Ray cluster; called only where samples have to be drawn.
        model: name of the registered model.
        alias: the alias.
    """

    config: Config
    display: Display
    connect: Callable[[], None]
    model: str
    alias: str

    @property
    def storage(self) -> Storage:
        """Reads and writes what is stored."""
        return Storage.of(self.config)

    @property
    def log(self) -> VerdictLog:
        """The decisions so far."""
        trust = Trust.of(self.config.registry)
        return VerdictLog.of(self.config.storage.root, self.model, self.alias, self.storage, trust)

    @property
    def uri(self) -> str:
        """Address of the MLflow server."""
        return self.config.tracking.server

    def promote(self, version: ModelVersion, *, margin: float | None = None, dry_run: bool = False) -> Verdict:
        """Decide whether a version may take the alias, record the decision, and move the alias if it may.

        Args:
            margin: distance by which the version may be worse; None where it has to be better.
            dry_run: whether nothing is recorded or moved. What is compared then is drawn from other noise, so that
                nobody can choose among versions by the noise that decides.

        Raises:
            ConfigError: the decision could not be signed, or would not be believed here.
            RegistryError: the version is none of this model, or was scored by another evaluator.
        """
        if version.name != self.model:
            raise RegistryError(f"{version.uri} is no version of {self.model}")
        if not dry_run:
            check_signing(self.config.registry)
        number, verdicts = self.log.next_number(), self.log.read()
        if _is(version, self._let_through(verdicts)):
            wrong = self._wrong(version)
            if wrong is not None:
                return Verdict(False, "", self.model, self.alias, version.version).refused([wrong])
            if dry_run:
                reason = f"the alias {self.alias} belongs there by the log of decisions"
                return Verdict(True, reason, self.model, self.alias, version.version)
            self._settle(version, None)
            return self._there(version)
        champion, first = self._champion(verdicts), "the alias has no version yet"
        if _is(version, champion):  # somebody has moved the alias without the gate, which judges it as the first one
            champion, first = None, "no version with the alias has passed yet"
        opened, verdict = self._judge(version, champion, verdicts, margin, first, dry_run)
        if dry_run or verdict in verdicts:
            return verdict
        if not self.log.add(verdict, Signer.of(self.config.registry), number):
            # Somebody decided in between: samples are stored, so that only the decision is made again.
            return self.promote(version, margin=margin)
        self._record(verdict, opened)
        if verdict.passed:
            self._settle(version, champion)
        return verdict

    def holds(self, version: ModelVersion) -> Verdict | None:
        """Return that the alias is at a version, by the log and in MLflow, and that the version is what was signed.

        None where one of them does not hold. Nothing is written.
        """
        present = tracking.version(self.uri, self.model, alias=self.alias)
        there = _is(version, present) and _is(version, self._let_through(self.log.read()))
        return self._there(version) if there and self._wrong(version) is None else None

    def taken(self, version: ModelVersion) -> Verdict | None:
        """Return the rollback that took the alias from a version, unless it got it again. Nothing is written."""
        rollback = None
        for verdict in reversed(self.log.read()):
            if verdict.rollback and verdict.champion == version.version:
                rollback = rollback or verdict
            elif verdict.passed and verdict.version == version.version:  # or another model's, which had its number then
                same = verdict.served_digest == version.tags.get("served_digest", "")
                return rollback if same else None
        return None

    def _there(self, version: ModelVersion) -> Verdict:
        return Verdict(True, f"the alias {self.alias} is there already", self.model, self.alias, version.version)

    def incomparable(self, version: ModelVersion) -> ModelVersion | None:
        """Return the version at the alias where its scores are not of the data and evaluator of another one's.

        That is what the tags of both say, which decides nothing: `promote` goes by signed evidence. Nothing is written.

        Returns:
            None where they can be compared, or where there is nothing to compare.
        """
        champion = self._champion(self.log.read())
        if champion is None or champion.version == version.version:
            return None
        try:
            ours, theirs = (Scores.from_plain(json.loads(v.tags["scores"])) for v in (version, champion))
        except (KeyError, ValueError, TypeError):
            return None
        return None if all(row.passed for row in comparable(ours, theirs, champion.uri)) else champion

    def rollback(self, *, dry_run: bool = False) -> Verdict:
        """Give the alias back to the version that had it before the present one.

        Raises:
            ConfigError: the decision could not be signed, or would not be believed here.
            RegistryError: there is none, or it is no longer what was signed.
        """
        if not dry_run:
            check_signing(self.config.registry)
        number, verdicts = self.log.next_number(), self.log.read()
        held = [version for verdict in standing(verdicts) if (version := self._version(verdict)) is not None]
        records = self._forget_records()
        clean = [at for at, version in enumerate(held[:-1]) if record_of(version, version.tags, records) is None]
        if not clean:
            given = " that had not been given a picture which is to be forgotten" if len(held) > 1 else ""
            raise RegistryError(
                f"{self.alias} of {self.model} has had no other version that is still there{given}: nothing to go "
                "back to"
            )
        version = held[clean[-1]]
        with self._opened(version) as opened:
            if (wrong := opened.wrong) is not None:
                raise RegistryError(
                    f"{version.uri}, which had {self.alias} before, is not what was signed ({wrong.name}: "
                    f"{wrong.figure}): promote another version, or restore its files"
                )
            assert opened.evidence is not None
            verdict = Verdict(
                passed=True,
                reason=f"rolled back from version {held[-1].version}",
                model=self.model,
                alias=self.alias,
                version=version.version,
                champion=held[-1].version,
                served_digest=opened.evidence.served_digest,
                content_digest=opened.evidence.content_digest,
                rollback=True,
                at=now(),
            )
            if dry_run:
                return verdict
            if not self.log.add(verdict, Signer.of(self.config.registry), number):
                return self.rollback()
            self._record(verdict, opened)
        self._settle(version, held[clean[-2]] if len(clean) > 1 else None)
        return verdict

    def _wrong(self, version: ModelVersion) -> VerdictRow | None:
        """Return the first line about the files and tags of a version that does not pass; None where all do."""
        with self._opened(version) as opened:
            forgotten = self._forgotten(opened)
            return opened.wrong or next((row for row in forgotten if not row.passed), None)

    def _forgotten(self, opened: OpenedVersion) -> list[VerdictRow]:
        """Return the line about a picture that is to be forgotten and that a version had been given; none otherwise."""
        lineage = opened.version.tags if opened.evidence is None else opened.evidence.lineage
        record = record_of(opened.version, lineage, self._forget_records())
        return [] if record is None else [forgotten_row(record, refuse=self.config.registry.forgotten == "refuse")]

    def _forget_records(self) -> list[ForgetRecord]:
        return read_records(self.config.storage.root, self.storage, Trust.of(self.config.registry))

    def _champion(self, verdicts: Sequence[Verdict]) -> ModelVersion | None:
        """Return the version that the alias belongs to by the log, or by the alias where there is no log yet."""
        found = self._let_through(verdicts)
        return tracking.version(self.uri, self.model, alias=self.alias) if found is None else found

    def _let_through(self, verdicts: Sequence[Verdict]) -> ModelVersion | None:
        """Return the version that the alias belongs to by the log; None where that lets none through that is there."""
        for verdict in reversed(standing(verdicts)):
            found = self._version(verdict)
            if found is not None:
                return found
        return None

    def _version(self, verdict: Verdict) -> ModelVersion | None:
        """Return the version of a decision; None where it is gone, or another model has its number now."""
        found = tracking.version(self.uri, self.model, number=verdict.version)
        same = found is not None and found.tags.get("served_digest", "") == verdict.served_digest
        return found if same else None

    def _record(self, verdict: Verdict, opened: OpenedVersion) -> None:
        """Write a decision onto its version, for whoever reads its page, and its model card again."""
        tags = {f"gate.{self.alias}": str(verdict), f"gate.{self.alias}.table": tracking.to_json(verdict.to_plain())}
        tracking.set_version_tags(self.uri, self.model, verdict.version, tags)
        if opened.evidence is not None and opened.spec is not None:
            describe(self.uri, opened.version, opened.evidence, opened.spec, verdict, self.storage)

    def _settle(self, version: ModelVersion, before: ModelVersion | None) -> None:
        """Let the alias point to a version, and `previous` to that before it, if any."""
        if before is not None:
            tracking.set_alias(self.uri, self.model, PREVIOUS, before.version)
        tracking.set_alias(self.uri, self.model, self.alias, version.version)

    def _judge(
        self,
        version: ModelVersion,
        champion: ModelVersion | None,
        verdicts: Sequence[Verdict],
        margin: float | None,
        first: str,
        dry_run: bool,
    ) -> tuple[OpenedVersion, Verdict]:
        """Return a version and the decision about it; one made before with as many samples is found again.

        Args:
            first: why it passes where there is no champion.
        """
        with self._opened(version) as candidate:
            evidence = candidate.evidence
            verdict = Verdict(
                passed=False,
                reason="",
                model=self.model,
                alias=self.alias,
                version=version.version,
                served_digest="" if evidence is None else evidence.served_digest,
                content_digest="" if evidence is None else evidence.content_digest,
                champion=None if champion is None else champion.version,
                at=now(),
            )
            rows = [*candidate.rows, *self._forgotten(candidate)]
            if evidence is not None:
                rows += [
                    *check_data(evidence, self.storage, Trust.of(self.config.registry)),
                    *absolute_bounds(evidence.scores),
                ]
            if not all(row.passed for row in rows):
                return candidate, verdict.refused(rows)
            verdict = replace(verdict, rows=tuple(rows))
            if champion is None:
                return candidate, replace(verdict, passed=True, reason=first)
            with self._opened(champion) as present:
                return candidate, self._against(candidate, present, verdict, verdicts, margin, dry_run)

    def _against(
        self,
        candidate: OpenedVersion,
        champion: OpenedVersion,
        verdict: Verdict,
        verdicts: Sequence[Verdict],
        margin: float | None,
        dry_run: bool,
    ) -> Verdict:
        """Return the decision about a version that is what it should be, against the present one."""
        assert candidate.evidence is not None
        name = champion.version.uri
        wrong = champion.wrong
        if wrong is not None:
            unlike = [VerdictRow(f"{name}: {wrong.name}", wrong.figure, wrong.bound, passed=False)]
        else:
            assert champion.evidence is not None
            unlike = comparable(candidate.evidence.scores, champion.evidence.scores, name)
        if not all(row.passed for row in unlike):
            present = _content_digest(champion, verdicts)
            if verdict.content_digest == present:
                reason = f"it is the model of {name}, with evidence that can be compared from now on"
                return replace(verdict, passed=True, reason=reason)
            refused = verdict.refused([*verdict.rows, *unlike])
            command = " ".join(["ddpm register", name, *_other_settings(candidate, champion)])
            remedy = f"first `{command}`, which scores it again, and promote the version that this makes"
            if present is None:
                back = f"`ddpm promote models:/{self.model} --alias {self.alias} --rollback`"
                remedy = (
                    f"nobody who is trusted has signed what {name} serves: trust its signer, or give it back by {back}"
                )
            return replace(refused, reason=f"{refused.reason}; {remedy}")
        assert champion.evidence is not None
        data = open_data(candidate.evidence, self.config, self.display, self.connect)
        against = champion.evidence.served_digest
        request = request_of(
            self.config, data.evaluator.encoder.width, gate_seed(self.model, self.alias, against, dry_run)
        )
        assert request.n is not None
        rows = (*verdict.rows, *unlike)
        verdict = replace(verdict, champion_digest=against, n=request.n, margin=margin, rows=rows)
        judged = _judged_before(verdicts, verdict, unlike)
        if judged is not None:  # one that passed has lost the alias since, and takes it again by what was found then
            return replace(judged, version=verdict.version, at=now() if judged.passed else judged.at)
        self.display.stage("gate", f"{request.n:,} samples of {candidate.version.uri} and of {name}, on the same noise")
        ours = subject_of(candidate.folder, candidate.evidence, data)
        theirs = subject_of(champion.folder, champion.evidence, data)
        measured = compare(ours, theirs, request, data, self.display)
        attempts = [v.attempt for v in verdicts if v.champion_digest == verdict.champion_digest]
        attempt = 1 + max(attempts, default=0)
        found = decide(*measured, attempt, name, margin)
        return replace(verdict, passed=found.passed, reason=found.reason, attempt=attempt, rows=(*rows, *found.rows))

    @contextmanager
    def _opened(self, version: ModelVersion) -> Iterator[OpenedVersion]:
        """Give a version whose folder is on this machine, with what can be said of it without drawing."""
        with temporary_folder("version") as scratch:
            folder = tracking.download_version(self.uri, version, scratch)
            evidence, rows = check_version(folder, version.tags, Trust.of(self.config.registry))
            inside, spec = model_folder(folder), None
            with suppress(ValueError):
                spec = read_spec(inside)
            yield OpenedVersion(version, evidence, tuple(rows), inside, spec)


def _is(version: ModelVersion, other: ModelVersion | None) -> bool:
    """Return whether another version of the model is this one."""
    return other is not None and other.version == version.version


def _other_settings(candidate: OpenedVersion, champion: OpenedVersion) -> list[str]:
    """Return the overrides with which the champion is scored as a candidate was; none of what is alike already."""
    assert candidate.evidence is not None
    ours, theirs = candidate.evidence.scores, None if champion.evidence is None else champion.evidence.scores
    data = candidate.evidence.dataset_uri
    trained = None if champion.spec is None else champion.spec.lineage.get("dataset_uri")
    settings = [] if trained == data else [f"data.uri={data}"]
    if theirs is None or theirs.n != ours.n:
        settings.append(f"evaluation.n={ours.n}")
    if theirs is None or theirs.evaluator != ours.evaluator:
        settings.append(f"evaluation.evaluator={ours.evaluator}")
    return settings


def _judged_before(verdicts: Sequence[Verdict], verdict: Verdict, alike: Sequence[VerdictRow]) -> Verdict | None:
    """Return the decision that was made about the same model against the same champion with as many samples.

    Args:
        alike: the lines that say by which evaluator, on which data and prompts both were scored: of others, a decision
            says nothing.
    """
    fields = ("served_digest", "champion_digest", "n", "margin")
    judging = {(row.name, row.figure) for row in alike if row.name != SAMPLES}
    for earlier in reversed(verdicts):
        if not earlier.attempt or any(getattr(earlier, name) != getattr(verdict, name) for name in fields):
            continue
        if judging <= {(row.name, row.figure) for row in earlier.rows}:
            return earlier
    return None


def _content_digest(champion: OpenedVersion, verdicts: Sequence[Verdict]) -> str | None:
    """Return what somebody who is trusted has signed of the files of the present version; None without any.

    Its own folder says nothing where it is not believed: it may have been made to look like another one's.
    """
    if champion.wrong is None and champion.evidence is not None:
        return champion.evidence.content_digest
    signed = [verdict for verdict in standing(verdicts) if verdict.version == champion.version.version]
    return (signed[-1].content_digest or None) if signed else None
