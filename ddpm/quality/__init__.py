"""Scores of sets of images, computed from features in float64, and their confidence intervals.

Frechet distance, KID, precision and recall, density and coverage compare features [N, D] of an evaluator network. The
inception score uses its class probabilities. Functions named `measured_...`, `density_coverage` and `FrechetInfluence`
give `Measured` values with their standard errors from the same pass; `bootstrap` gives a confidence interval for any
statistic.
"""

from ddpm.quality.frechet import FeatureMoments, FrechetInfluence, frechet_distance, frechet_influence
from ddpm.quality.intervals import Interval, Measured, bootstrap, halves
from ddpm.quality.manifold import (
    PrecisionRecall,
    density_coverage,
    measured_precision_recall,
    precision_recall,
)
from ddpm.quality.scores import inception_score, kid, measured_diversity, measured_inception_score, measured_kid

__all__ = [
    "FeatureMoments",
    "FrechetInfluence",
    "Interval",
    "Measured",
    "PrecisionRecall",
    "bootstrap",
    "density_coverage",
    "frechet_distance",
    "frechet_influence",
    "halves",
    "inception_score",
    "kid",
    "measured_diversity",
    "measured_inception_score",
    "measured_kid",
    "measured_precision_recall",
    "precision_recall",
]
