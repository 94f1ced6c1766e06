"""The gate's decision whether a version is better than the present one by more than chance; nothing is read here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from ddpm.quality import Measured
from pipelines.evaluation.measure import Measures
from pipelines.evaluation.paired import level, paired_test
from pipelines.evaluation.scores import Scores
from pipelines.registry.verdict import VerdictRow

POWER = 0.9
"""Chance with which the difference that a number of samples is said to tell is told."""
ACCURACY_LEVEL = 0.025
"""Chance that a version of the same accuracy is refused for its accuracy."""
ACCURACY_Z = NormalDist().inv_cdf(1 - ACCURACY_LEVEL)
SAMPLES = "same samples of a seed"
"""Line of the gate's table that two versions were scored by as many samples; the comparison draws its own."""
NAMES = {"frechet_distance": "Frechet distance", "kid": "kernel distance"}


@dataclass(frozen=True)
class Decision:
    """What a comparison comes to.

    Attributes:
        passed: whether the version may take the alias.
        reason: in words.
        rows: lines of the gate's table.
    """

    passed: bool
    reason: str
    rows: tuple[VerdictRow, ...]


def decide(
    candidate: Measures, present: Measures, attempt: int, champion: str, margin: float | None = None
) -> Decision:
    """Decide by the paired difference of two versions' distances, in its standard errors, one-sided.

    Args:
        candidate, present: of the version, and of the one at the alias, on the same noise.
        attempt: which one it is against this champion, from 1.
        champion: name of the version at the alias.
        margin: distance by which the version may be worse; None where it has to be better.
    """
    ours, theirs, accuracies = candidate.distance, present.distance, (candidate.accuracy, present.accuracy)
    difference = theirs - ours
    error, needed = difference.standard_error, NormalDist().inv_cdf(1 - level(attempt))
    name = NAMES[candidate.measure]
    distances = f"{name} {ours.value:.4g} against {theirs.value:.4g}"
    asked = f"better than {champion}" if margin is None else f"not worse than {champion} by {margin:g}"
    if not math.isfinite(difference.value) or not error > 0:
        why = "a distance that is not a number" if not math.isfinite(difference.value) else "the same samples"
        row = VerdictRow(asked, distances, "a difference that can be measured", passed=False)
        return Decision(False, f"the two versions give {why}: {distances}", (row,))
    z, _ = paired_test(difference, margin or 0.0)
    bound = f"z >= {needed:.2f} (attempt {attempt}, level {level(attempt):.3g})"
    rows = [VerdictRow(asked, f"{distances}: z = {z:.2f}", bound, z >= needed), *_accuracy(*accuracies, champion)]
    failed = [row for row in rows[1:] if not row.passed]
    if z < needed:
        return Decision(False, _not_passed(ours.n, difference.value, error, needed, distances, rows[1:]), tuple(rows))
    if failed:
        return Decision(False, f"{failed[0].name}: {failed[0].figure}, asked for {failed[0].bound}", tuple(rows))
    by = f"by {z:.1f} standard errors of the paired difference, where {needed:.2f} are asked for"
    word = "better" if margin is None else f"not worse by {margin:g}"
    return Decision(True, f"{word}: {distances}, {by}", tuple(rows))


def _not_passed(n: int, gain: float, error: float, needed: float, distances: str, more: Sequence[VerdictRow]) -> str:
    """Return why a version does not pass: it is worse, or the difference is too small for this many samples.

    Args:
        more: lines that a version has to pass too, each of which refuses an equal one with `ACCURACY_LEVEL`.
    """
    if gain <= -needed * error:
        return f"worse: {distances}, by {-gain / error:.1f} standard errors of the paired difference"
    told = (needed + NormalDist().inv_cdf(POWER / (1 - ACCURACY_LEVEL) ** len(more))) * error
    return (
        f"not distinguishable: {distances}, {gain / error:.1f} standard errors of the paired difference, where "
        f"{needed:.2f} are asked for. {n:,} samples of each tell a difference of {told:.2g} in {POWER:.0%} of cases; "
        f"{3 * n:,} more would tell one of {told / 2:.2g} (registry.n={4 * n})"
    )


def _accuracy(ours: Measured | None, theirs: Measured | None, champion: str) -> list[VerdictRow]:
    """Return the line of the table that a better distance is not bought with accuracy; none without classes."""
    if ours is None and theirs is None:
        return []
    name = f"accuracy not below that of {champion}"
    if ours is None or theirs is None:
        return [VerdictRow(name, "known of one of them only", "known of both", passed=False)]
    least = theirs.value - ACCURACY_Z * (theirs - ours).standard_error
    bound = f"at least {least:.4f}: {theirs.value:.4f} less {ACCURACY_Z:.2f} standard errors of the paired difference"
    return [VerdictRow(name, f"{ours.value:.4f}", bound, ours.value >= least)]


def comparable(ours: Scores, theirs: Scores, champion: str) -> list[VerdictRow]:
    """Return the lines of the table that say whether the same evaluator scored two versions on the same data."""
    names = {"evaluator_digest": "same evaluator", "stream_digest": "same data with quarantine", "n": SAMPLES}
    rows = []
    for field, words in names.items():
        mine, its = getattr(ours, field), getattr(theirs, field)
        short = [str(value)[:12] or "not known" for value in (mine, its)]
        rows.append(VerdictRow(words, short[0], f"{short[1]}, as {champion}", bool(mine) and mine == its))
    if ours.prompts is not None or theirs.prompts is not None:
        mine, its = ((scores.prompts or {}).get("captions_digest", "none") for scores in (ours, theirs))
        rows.append(VerdictRow("same prompts", mine[:12], f"{its[:12]}, as {champion}", mine == its))
    return rows
