"""Tests whether one of two is better, by the paired difference of scores on the same noise, and their corrections."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ddpm.quality import Measured

LEVEL = 0.025
"""Chance, one-sided, that anything is called better where nothing is."""


def paired_test(gain: Measured, margin: float = 0.0) -> tuple[float, float]:
    """Return (z, one-sided p-value) of a gain that is -`margin` or less where nothing is gained.

    What cannot be tested, such as a difference without any variance, is no gain: z is 0.
    """
    error = gain.standard_error
    z = (gain.value + margin) / error if error > 0 else 0.0
    z = z if math.isfinite(z) else 0.0
    return z, math.erfc(z / math.sqrt(2)) / 2  # the distribution function of -z would round to 0


def level(attempt: int) -> float:
    """Return the level at which attempt k against one champion is tested, `LEVEL` / k^2.

    Over any number of attempts the chance that a wrong one passes is at most pi^2 / 6 times `LEVEL`, 4.1 %, whatever
    the attempts have to do with each other.
    """
    return LEVEL / attempt**2


def holm(p_values: Mapping[str, float], at: float = LEVEL) -> set[str]:
    """Return the names whose hypotheses are rejected by the step-down method (Holm 1979).

    The smallest of k p-values is compared with at / k, the next one with at / (k - 1), and so on until one is
    larger. Whatever the dependence of the tests, a true hypothesis is rejected with a chance of at most `at`.
    """
    rejected: set[str] = set()
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if not p_values[name] <= at / (len(p_values) - place):
            break
        rejected.add(name)
    return rejected
