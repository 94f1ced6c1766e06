"""The decision which settings of a study are better than the default, from scores on noise that no trial has used.

The best of many noisy scores is partly so by luck, so the settings that a study selects are judged again. Each is
compared with the default by a z-test of the paired difference, and the tests are corrected for their number by Holm's
step-down method: where no setting is better, the chance that any is called better is at most `LEVEL`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from ddpm.generate import Sampling
from ddpm.quality import FeatureMoments, Interval, Measured, measured_kid
from pipelines.evaluation.compare import FRECHET_FEATURES, NEIGHBOURS
from pipelines.evaluation.real import Real
from pipelines.scratch import scratch_folder
from pipelines.search.judge import measured_frechet
from pipelines.search.parameters import Params, Value

LEVEL = 0.025
"""Chance that any setting is called better than the default where none is, one-sided."""
DEFAULT = "default"
"""Name of the present setting among those that are confirmed."""
Measure = Literal["frechet_distance", "kid", "bits_per_dim"]


@dataclass(frozen=True)
class Candidate:
    """A setting, or a trained model, that is judged again.

    Attributes:
        trial: name of the trial; `DEFAULT` for the present setting.
        params: the searched parameters.
        settings: the complete sampling settings.
    """

    trial: str
    params: Params
    settings: Sampling


@dataclass(frozen=True)
class Confirmed:
    """The scores of a setting that was judged again, and what they say against the default.

    Attributes:
        trial: name of the trial; `DEFAULT` for the present setting.
        params: the searched parameters.
        settings: the complete sampling settings.
        measure: the score that decides; lower is better.
        distance: that score with its 95 % interval.
        scores: the scores that trials report, by name.
        gain: by how much `distance` is below that of the default, with the 95 % interval of this setting alone, which
            is not corrected for the number of settings; None for the default.
        z: `gain` in standard errors of the paired difference; None for the default.
        p: one-sided p-value of z, not corrected; None for the default.
        better: whether Holm's method accepts that the setting is better than the default.
    """

    trial: str
    params: dict[str, Value]
    settings: Sampling
    measure: Measure
    distance: Interval
    scores: dict[str, float]
    gain: Interval | None = None
    z: float | None = None
    p: float | None = None
    better: bool = False


@dataclass(frozen=True, eq=False)
class Distance:
    """The distance of samples to real images by which settings are confirmed.

    Attributes:
        moments: of the features of the real images.
        real: features of real images [N, D] for the kernel distance; None where the Frechet distance decides.
    """

    moments: FeatureMoments
    real: Tensor | None

    @classmethod
    def of(cls, real: Real) -> Distance:
        """Return the distance to the reference images: the kernel distance above `FRECHET_FEATURES` features."""
        if real.width <= FRECHET_FEATURES:
            return cls(real.train.moments, None)
        with tempfile.TemporaryDirectory(prefix="real-", dir=scratch_folder()) as scratch:
            return cls(real.train.moments, real.reference(Path(scratch), NEIGHBOURS))

    @property
    def measure(self) -> Measure:
        """Name of the score."""
        return "frechet_distance" if self.real is None else "kid"

    def __call__(self, features: Tensor) -> Measured:
        """Return the distance of samples with features [N, D]."""
        return measured_frechet(self.moments, features) if self.real is None else measured_kid(self.real, features)


def decide(
    candidates: Mapping[str, Candidate],
    measured: Mapping[str, Measured],
    scores: Mapping[str, dict[str, float]],
    measure: Measure,
) -> list[Confirmed]:
    """Return what the scores say of each candidate against the default, best first.

    Args:
        candidates: by trial, `DEFAULT` among them.
        measured: trial -> the score that decides, all over the same noise and labels.
        scores: trial -> the other scores.
        measure: name of the score that decides.
    """
    gains = {trial: measured[DEFAULT] - measured[trial] for trial in candidates if trial != DEFAULT}
    tests = {trial: z_test(gain) for trial, gain in gains.items()}
    accepted = holm({trial: p for trial, (_, p) in tests.items()})
    found = []
    for trial, candidate in candidates.items():
        z, p = tests.get(trial, (None, None))
        found.append(
            Confirmed(
                trial,
                dict(candidate.params),
                candidate.settings,
                measure,
                measured[trial].interval(),
                scores[trial],
                gains[trial].interval() if trial in gains else None,
                z,
                p,
                trial in accepted,
            )
        )
    return sorted(found, key=lambda c: c.distance.value)


def winner_of(confirmed: list[Confirmed]) -> Confirmed | None:
    """Return the best setting that is better than the default, or None."""
    return next((c for c in confirmed if c.better), None)


def z_test(gain: Measured) -> tuple[float, float]:
    """Return (z, one-sided p-value) of a difference that is 0 or less where nothing is gained.

    What cannot be tested, such as a difference without any variance, is no gain: z is 0.
    """
    error = gain.standard_error
    z = gain.value / error if error > 0 else 0.0
    z = z if math.isfinite(z) else 0.0
    return z, math.erfc(z / math.sqrt(2)) / 2  # the distribution function of -z would round to 0


def holm(p_values: Mapping[str, float], level: float = LEVEL) -> set[str]:
    """Return the names whose hypotheses are rejected by the step-down method (Holm 1979).

    The smallest of k p-values is compared with level / k, the next one with level / (k - 1), and so on until one is
    larger. Whatever the dependence of the tests, a true hypothesis is rejected with a chance of at most `level`.
    """
    rejected: set[str] = set()
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if not p_values[name] <= level / (len(p_values) - place):
            break
        rejected.add(name)
    return rejected
