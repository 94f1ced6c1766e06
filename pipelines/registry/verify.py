"""Whether a version is what was scored, by whom that is said, and whether it still draws what it drew then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines import tracking
from pipelines.checkpoints.lookup import find_registered
from pipelines.environment.scratch import temporary_folder
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Notice, no_notice
from pipelines.registry.contents import check_version, model_folder
from pipelines.registry.evidence import Evidence
from pipelines.registry.package import RegistryError
from pipelines.registry.probe import ProbeError, redraw
from pipelines.registry.verdict import VerdictRow
from pipelines.shards.erased import datasets_before, erasures
from pipelines.shards.index import Dataset, read_dataset
from pipelines.shards.quarantine import Quarantine, quarantine_of, read_quarantine, stream_digest
from pipelines.signing import Trust
from pipelines.storage import Storage, StorageError, join, layout

PATIENCE_S = 10.0
"""Seconds to wait for a storage that is away."""


@dataclass(frozen=True)
class Verification:
    """The findings about a version.

    Attributes:
        model: the reference that it was asked for by.
        rows: one for each check.
    """

    model: str
    rows: tuple[VerdictRow, ...]

    @property
    def passed(self) -> bool:
        """Return whether every check passed."""
        return all(row.passed for row in self.rows)

    @property
    def failed(self) -> tuple[str, ...]:
        """Return the names of the checks that failed."""
        return tuple(row.name for row in self.rows if not row.passed)

    def to_plain(self) -> dict[str, Any]:
        """Return the findings as JSON types."""
        return {**asdict(self), "passed": self.passed, "failed": list(self.failed)}


def verify(
    reference: str, *, tracking_uri: str | None, storage: Storage, trust: Trust, notice: Notice = no_notice
) -> Verification:
    """Check a version of a registry, or a downloaded one.

    Its code is run only where somebody who is trusted has signed which code that is.

    Args:
        reference: models:/NAME@alias, models:/NAME/VERSION, or the folder of a downloaded pyfunc.
        tracking_uri: address of the MLflow server; None where there is none.
        storage: of the data that it was scored on.
        trust: whose signatures are believed.
        notice: gets a line before what takes time.

    Raises:
        ModelError, RegistryError: there is no such version.
    """
    with _fetched(reference, tracking_uri, notice) as (folder, tags):
        evidence, rows = check_version(folder, tags, trust)
        if evidence is None:
            told = "not looked at: nobody who is trusted says what it has to be"
            rows += [VerdictRow(name, told, "as in the evidence", False) for name in ("data", "pictures")]
        else:
            rows += check_data(evidence, storage, trust)
            sound = all(row.passed for row in rows if row.name in ("weights", "code"))
            told = "not drawn: weights or code are not those of the evidence"
            undrawn = VerdictRow("pictures", told, "as recorded", False)
            rows.append(check_pictures(folder, evidence, notice) if sound else undrawn)
    return Verification(reference, tuple(rows))


def check_data(evidence: Evidence, storage: Storage, trust: Trust) -> list[VerdictRow]:
    """Return whether the data that a version was scored on is where it was, and the same, with its quarantine.

    That compares the digests of the index; `ddpm check` reads every byte. Data from which samples were erased since
    (`ddpm forget --erase`) are the same where somebody who is trusted has signed which.
    """
    uri, scores = evidence.dataset_uri, evidence.scores
    wanted = f"digest {scores.dataset_digest[:12]}"
    try:
        storage.exists(join(uri, layout.DATASET), patience_s=PATIENCE_S)
    except StorageError as error:
        return [VerdictRow("data", f"cannot be reached: {error}", wanted, False)]
    try:
        dataset = read_dataset(uri, storage)
        quarantine = read_quarantine(uri, storage)
        before = next((d for d in datasets_before(dataset, storage, trust) if d.digest == scores.dataset_digest), None)
        changed = before is not None and before.digest != dataset.digest
        gone = f", which is {scores.dataset_digest[:12]} without what was erased" if changed else ""
        rows = [VerdictRow("data", f"digest {dataset.digest[:12]} at {uri}{gone}", wanted, before is not None)]
        same = before is not None and _is_stream(scores.stream_digest, before, dataset, quarantine, storage, trust)
    except PipelineError as error:
        return [VerdictRow("data", str(error), wanted, False)]
    stream = stream_digest(dataset, quarantine)
    left_out = "no quarantine" if quarantine is None else f"{len(quarantine.excluded)} quarantined"
    figure = f"digest {stream[:12]}, {left_out}"
    return [*rows, VerdictRow("stream", figure, f"digest {scores.stream_digest[:12]}", same)]


def _is_stream(
    digest: str, before: Dataset, now: Dataset, quarantine: Quarantine | None, storage: Storage, trust: Trust
) -> bool:
    """Return whether a dataset's stream is the one with a digest, apart from samples that were erased since."""
    if before.digest == now.digest:
        return stream_digest(now, quarantine) == digest
    found = quarantine_of(before, digest, storage)
    if found is None or quarantine is None:
        return False
    erased = {(each.shard, each.index) for one in erasures(now.uri, storage, trust) for each in one.samples}
    then = {(each.shard, each.index) for each in (found[0].excluded if found[0] else ())}
    return {(each.shard, each.index) for each in quarantine.excluded} - erased == then - erased


def check_pictures(folder: Path, evidence: Evidence, notice: Notice = no_notice) -> VerdictRow:
    """Return whether a version draws the pictures that it drew when it was made; this runs the code in its folder.

    Args:
        folder: of the pyfunc.
    """
    notice(f"drawing {evidence.probe['count']} pictures with the code of the version")
    try:
        found = redraw(folder, model_folder(folder), evidence.probe)
    except ProbeError as error:
        return VerdictRow("pictures", str(error), "as recorded", False)
    return VerdictRow("pictures", found.figure, found.bound, found.passed)


@contextmanager
def _fetched(
    reference: str, tracking_uri: str | None, notice: Notice
) -> Iterator[tuple[Path, Mapping[str, str] | None]]:
    """Yield the folder of a pyfunc, downloaded if necessary, and the tags of its version."""
    if not reference.startswith("models:/"):
        folder = Path(reference.removeprefix("file://"))
        if not (folder / "MLmodel").is_file():
            raise RegistryError(
                f"{reference} is no downloaded version (MLmodel is missing): name models:/NAME@alias, "
                "models:/NAME/VERSION, or a folder from `mlflow artifacts download -u models:/NAME/VERSION -d FOLDER`"
            )
        yield folder, None
        return
    version = find_registered(reference, tracking_uri)
    assert tracking_uri is not None
    with temporary_folder("verify") as scratch:
        notice(f"downloading {version.uri}")
        yield tracking.download_version(tracking_uri, version, scratch), version.tags
