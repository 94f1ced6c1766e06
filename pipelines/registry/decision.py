"""Decide what the gate decides: whether a version is good enough at all, and whether it beats the present one.

The bounds of every version are far below what a trained model does. They keep out what went wrong, and leave it to the
comparison with the present version which of two working models is the better one. Nothing is read here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from ddpm.quality import Measured
from pipelines.evaluation.compare import NEAREST
from pipelines.evaluation.copies import LEAST
from pipelines.evaluation.measure import Measures
from pipelines.evaluation.paired import level, paired_test
from pipelines.evaluation.scores import Estimate, Scores
from pipelines.registry.verdict import Verdict, VerdictRow

POWER = 0.9
"""Probability of detecting the difference that is called detectable with a number of samples."""
ACCURACY_LEVEL = 0.025
"""Chance that a version of the same accuracy is refused for its accuracy."""
ACCURACY_Z = NormalDist().inv_cdf(1 - ACCURACY_LEVEL)
SAMPLES = "same samples of a seed"
"""Line of the gate's table that two versions were scored by as many samples; the comparison draws its own."""
NOISE_SHARE = 0.5
"""Share of the distance of images of noise below which the distance has to be."""
GUESS_SHARE = 0.1
"""Share of the way from guessing to what real test images have that the accuracy has to be above guessing."""
VARIETY_SHARE = 0.2
"""Share of the recall and diversity of real test images that those of samples have to reach."""
NAMES = {"frechet_distance": "Frechet distance", "kid": "kernel distance"}


def decide(candidate: Measures, present: Measures, attempt: int, champion: str, margin: float | None = None) -> Verdict:
    """Decide by the paired difference of two versions' distances, in its standard errors, one-sided.

    Args:
        candidate, present: of the version, and of the one at the alias, on the same noise.
        attempt: which one it is against this champion, from 1.
        champion: name of the version at the alias.
        margin: distance by which the version may be worse; None where it has to be better.

    Returns:
        Whether the version may take the alias, why, and lines of the gate's table; all else is for the gate to say.
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
        return Verdict(False, f"the two versions give {why}: {distances}", rows=(row,))
    z, _ = paired_test(difference, margin or 0.0)
    bound = f"z >= {needed:.2f} (attempt {attempt}, level {level(attempt):.3g})"
    rows = [VerdictRow(asked, f"{distances}: z = {z:.2f}", bound, z >= needed), *_accuracy(*accuracies, champion)]
    failed = [row for row in rows[1:] if not row.passed]
    if z < needed:
        return Verdict(
            False, _not_passed(ours.n, difference.value, error, needed, distances, rows[1:]), rows=tuple(rows)
        )
    if failed:
        return Verdict(False, f"{failed[0].name}: {failed[0].figure}, asked for {failed[0].bound}", rows=tuple(rows))
    by = f"by {z:.1f} standard errors of the paired difference, where {needed:.2f} are asked for"
    word = "better" if margin is None else f"not worse by {margin:g}"
    return Verdict(True, f"{word}: {distances}, {by}", rows=tuple(rows))


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


def absolute_bounds(scores: Scores) -> list[VerdictRow]:
    """Return the gate's table of bounds that concern a version alone; what is missing or no number does not pass."""
    rows = [_finite(scores), _not_noise(scores)]
    if "class_accuracy" in scores:
        rows.append(_above_guessing(scores["class_accuracy"]))
    rows += [_varied(scores, name, words) for name, words in (("recall", "recall"), ("diversity", "diversity"))]
    rows.append(_no_copies(scores))
    return rows


def _finite(scores: Scores) -> VerdictRow:
    if "finite" not in scores:
        return _missing("finite samples")
    share = scores["finite"].value
    return VerdictRow("finite samples", f"{share:.4%}" if share < 1 else "all", "all", share == 1)


def _not_noise(scores: Scores) -> VerdictRow:
    name = "not noise: distance"
    found = scores.estimates.get("frechet_distance")
    if found is None or found.ceiling is None:
        return _missing(name)
    bound = NOISE_SHARE * found.ceiling
    asked = f"at most {bound:.4g}, {NOISE_SHARE:g} of what noise has"
    return VerdictRow(name, f"{found.value:.4g}", asked, math.isfinite(found.value) and found.value <= bound)


def _above_guessing(found: Estimate) -> VerdictRow:
    name = "not noise: accuracy"
    if found.ceiling is None or found.low is None:
        return _missing(name)
    real = 1.0 if found.floor is None else found.floor
    figure = f"{found.value:.4f}, whose interval begins at {found.low:.4f}"
    others = f"guessing has {found.ceiling:.4f}, real test images have {real:.4f}"
    if real <= found.ceiling:  # such an evaluator cannot tell noise by its class
        return VerdictRow(name, figure, f"nothing; {others}", passed=True)
    bound = found.ceiling + GUESS_SHARE * (real - found.ceiling)
    return VerdictRow(name, figure, f"an interval above {bound:.4f}; {others}", found.low >= bound)


def _varied(scores: Scores, score: str, words: str) -> VerdictRow:
    name = f"not collapsed: {words}"
    found = scores.estimates.get(score)
    if found is None or found.floor is None:
        return _too_few(name, NEAREST)
    bound = VARIETY_SHARE * found.floor
    asked = f"at least {bound:.4g}, {VARIETY_SHARE:g} of what real test images have"
    return VerdictRow(name, f"{found.value:.4g}", asked, found.value >= bound)


def _no_copies(scores: Scores) -> VerdictRow:
    if scores.memorisation is None:
        return _too_few("not copies", LEAST)
    copies = scores.memorisation["copies"]
    return VerdictRow("not copies", scores.memorisation["verdict"], "no copies of training images", not copies)


def _too_few(name: str, least: int) -> VerdictRow:
    asked = (
        f"known, from at least {least} samples, train images and test images: add images, or raise data.test_fraction"
    )
    return VerdictRow(name, "not known", asked, passed=False)


def _missing(name: str) -> VerdictRow:
    return VerdictRow(name, "not known", "known: score and register the version again", passed=False)
