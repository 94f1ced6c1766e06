"""The gate's decision whether a version may take an alias from the present one."""

from __future__ import annotations

import math

from pipelines.evaluation.scores import Scores
from pipelines.registry.verdict import Verdict

ACCURACY_TOLERANCE = 0.01
"""Loss of class accuracy that the gate accepts, as a fraction of samples."""

BETTER_Z = 1.959964
"""Standard errors of the difference by which a version has to be nearer: equal ones pass in 2.5 % of cases."""


def gate(candidate: Scores, champion: Scores | None) -> Verdict:
    """Decide whether a version may take an alias from its present version, the champion.

    It may not if its samples are copies of training images, or give no finite distance. Else it may if their Frechet
    distance to real images is smaller by `BETTER_Z` standard errors of the difference or more, and its class accuracy
    is at most `ACCURACY_TOLERANCE` lower. Scores of another evaluator, stream of data, number of samples or other seeds
    are not comparable, nor are those of an earlier release, which have no intervals: the alias stays.

    Args:
        champion: scores of the present version; None where the alias has none.
    """
    if not math.isfinite(candidate["frechet_distance"].value):
        return Verdict(False, "its Frechet distance is not a number: its samples or their features overflowed")
    if candidate.memorisation is not None and candidate.memorisation["copies"]:
        return Verdict(False, candidate.memorisation["verdict"])
    if champion is None:
        return Verdict(True, "the alias has no version yet")
    for name in ("evaluator_digest", "dataset_digest", "stream_digest", "n", "seeds"):
        mine, theirs = getattr(candidate, name), getattr(champion, name)
        if mine != theirs:
            return Verdict(False, f"scores do not compare: {name} is {mine} here and {theirs} at the alias")
    here, there = candidate["frechet_distance"], champion["frechet_distance"]
    if here.standard_error is None or there.standard_error is None:
        return Verdict(
            False, "scores without intervals do not compare: evaluate the version and that at the alias anew"
        )
    distances = f"Frechet distance {here.value:.3f} against {there.value:.3f}"
    gain, error = there.value - here.value, math.hypot(here.standard_error, there.standard_error)
    if not gain > 0:
        return Verdict(False, f"not better: {distances}")
    if gain < BETTER_Z * error:
        needed = math.ceil(candidate.n * (BETTER_Z * error / gain) ** 2)
        return Verdict(
            False,
            f"not distinguishable: {distances}, a difference of {gain / error:.1f} standard errors where "
            f"{BETTER_Z:.2f} are asked for; about {needed:,} samples of each seed would tell (evaluation.n)",
        )
    if (candidate.class_accuracy or 0) < (champion.class_accuracy or 0) - ACCURACY_TOLERANCE:
        return Verdict(
            False, f"class accuracy falls from {champion.class_accuracy:.4f} to {candidate.class_accuracy:.4f}"
        )
    return Verdict(True, f"better: {distances}, by {gain / error:.1f} standard errors")
