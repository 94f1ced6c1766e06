"""The decision which settings of a study are better than the default, from scores on noise that no trial has used.

The best of many noisy scores is partly so by luck, so the settings that a study selects are judged again. Each is
compared with the default by a z-test of the paired difference, and the tests are corrected for their number by Holm's
step-down method: where no setting is better, the chance that any is called better is at most `LEVEL`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ddpm.generate import Sampling
from ddpm.quality import Interval, Measured
from pipelines.evaluation.paired import holm, paired_test
from pipelines.search.space import Params, Value

DEFAULT = "default"
"""Name of the present setting among those that are confirmed."""
Measure = Literal["frechet_distance", "kid", "bits_per_dim"]


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

    @property
    def gained(self) -> str:
        """By how much it is better than the default, in words."""
        gain = self.gain
        assert gain is not None
        return f"{gain.value:.4g} in {self.measure} (95 %: {gain.low:.4g} to {gain.high:.4g}; p = {self.p:.2g})"


def decide(
    params: Mapping[str, Params],
    settings: Mapping[str, Sampling],
    measured: Mapping[str, Measured],
    scores: Mapping[str, dict[str, float]],
    measure: Measure,
) -> list[Confirmed]:
    """Return what the scores say of each setting, or trained model, against the default, best first.

    Args:
        params: trial -> the searched parameters, `DEFAULT` among the trials.
        settings: trial -> the complete sampling settings.
        measured: trial -> the score that decides, all over the same noise and labels.
        scores: trial -> the other scores.
        measure: name of the score that decides.
    """
    gains = {trial: measured[DEFAULT] - measured[trial] for trial in params if trial != DEFAULT}
    tests = {trial: paired_test(gain) for trial, gain in gains.items()}
    accepted = holm({trial: p for trial, (_, p) in tests.items()})
    found = [
        Confirmed(
            trial,
            dict(given),
            settings[trial],
            measure,
            measured[trial].interval(),
            scores[trial],
            gains[trial].interval() if trial in gains else None,
            z=tests[trial][0] if trial in tests else None,
            p=tests[trial][1] if trial in tests else None,
            better=trial in accepted,
        )
        for trial, given in params.items()
    ]
    return sorted(found, key=lambda c: c.distance.value)


def winner_of(confirmed: Iterable[Confirmed]) -> Confirmed | None:
    """Return the best setting that is better than the default, or None."""
    return next((c for c in confirmed if c.better), None)
