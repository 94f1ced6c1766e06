"""Checks of a version by its files alone: who signed it, and whether they are as the evidence says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ddpm.generate import Sampling
from ddpm.model import read_spec
from pipelines.registry.envelope import differing_envelope, model_folder, signature_file
from pipelines.registry.evidence import Evidence, EvidenceError
from pipelines.registry.verdict import VerdictRow
from pipelines.signing import SignatureError, Trust
from pipelines.storage import layout

SHOWN = 5
"""Differences that a row names; of the others it gives the number."""


def check_version(
    folder: Path, tags: Mapping[str, str] | None, trust: Trust
) -> tuple[Evidence | None, list[VerdictRow]]:
    """Look at the files of a version, and at its tags; nothing of it is run.

    Args:
        folder: of the downloaded pyfunc.
        tags: of the version; None where it is no version of a registry.
        trust: whose signatures are believed.

    Returns:
        Its evidence, None unless somebody who is trusted has signed it; and a row for each of signature, evidence,
        tags, weights, settings and code.
    """
    inside = model_folder(folder)
    signature = _signature(folder, trust)
    try:
        evidence = Evidence.read(inside)
    except EvidenceError as error:
        return None, [signature, VerdictRow("evidence", str(error), "there", False)]
    digest = evidence.model_digest[:12]
    rows = [signature, VerdictRow("evidence", f"of model {digest}, scored on {evidence.dataset_uri}", "there", True)]
    if tags is not None:
        differing = [_tag(name, evidence.tags()[name], tags) for name in evidence.differing_tags(tags)]
        rows.append(_row("tags", differing, f"{len(evidence.tags())} tags are equal", "as in the evidence"))
    weights = evidence.files.get(layout.WEIGHTS, "")[:12]
    equal = f"{len(evidence.files)} files, {layout.WEIGHTS} is {weights}"
    rows += [
        _row("weights", evidence.differing_files(inside), equal, "the files of the evidence"),
        _row("settings", _differing_settings(inside, evidence), "of model.json are those of the scores", "as scored"),
        _row("code", differing_envelope(folder, evidence), f"code_digest {evidence.code_digest[:12]}", "as registered"),
    ]
    return evidence if signature.passed else None, rows


def _signature(folder: Path, trust: Trust) -> VerdictRow:
    bound = "by somebody who is trusted"
    try:
        return VerdictRow("signature", trust.check_folder(model_folder(folder), signature_file(folder)), bound, True)
    except SignatureError as error:
        return VerdictRow("signature", str(error), bound, False)


def _differing_settings(inside: Path, evidence: Evidence) -> list[str]:
    """Return what a model serves or says of its origin that is not what was scored, in words."""
    try:
        spec = read_spec(inside)
    except ValueError as error:
        return [str(error)]
    served, scored = spec.sampling.to_json(), Sampling.from_json(evidence.scores.sampling).to_json()
    names = sorted(served.keys() | scored.keys())
    return [
        *(f"{n} is {served.get(n)}, scored was {scored.get(n)}" for n in names if served.get(n) != scored.get(n)),
        *(["lineage is another"] if spec.lineage != evidence.lineage else []),
    ]


def _row(name: str, differing: Sequence[str], equal: str, bound: str) -> VerdictRow:
    """Return the row of what has to be equal."""
    if not differing:
        return VerdictRow(name, equal, bound, True)
    more = f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return VerdictRow(name, ", ".join(differing[:SHOWN]) + more, bound, False)


def _tag(name: str, wanted: str, tags: Mapping[str, str]) -> str:
    """Return how a tag differs, in words."""
    if name not in tags:
        return f"{name} is missing"
    found = tags[name]
    return f"{name} is {found}, not {wanted}" if len(found) + len(wanted) < 200 else f"{name} is another"
