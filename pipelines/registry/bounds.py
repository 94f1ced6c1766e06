"""What every version has to be, whatever it is compared with: finite, not noise, not collapsed, no copies.

The bounds are far below what a trained model does. They keep out what went wrong, and leave it to the comparison with
the present version which of two working models is the better one.
"""

from __future__ import annotations

import math

from pipelines.evaluation.compare import NEAREST
from pipelines.evaluation.copies import LEAST
from pipelines.evaluation.scores import Estimate, Scores
from pipelines.registry.verdict import VerdictRow

NOISE_SHARE = 0.5
"""Share of the distance of images of noise below which the distance has to be."""
GUESS_SHARE = 0.1
"""Share of the way from guessing to what real test images have that the accuracy has to be above guessing."""
VARIETY_SHARE = 0.2
"""Share of the recall and diversity of real test images that those of samples have to reach."""


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
    return VerdictRow(name, "not known", "known: score and register the version anew", passed=False)
