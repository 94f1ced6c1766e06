"""Scores that nobody has computed, for tests of what is done with scores."""

from __future__ import annotations

from typing import Any

from pipelines.evaluation.scores import Estimate, Scores


def scores(**fields: Any) -> Scores:
    """Return scores of 359 samples by a classifier, but for some fields."""
    plain: dict[str, Any] = {
        "estimates": {"frechet_distance": Estimate(1.0)},
        "n": 359,
        "seeds": (1,),
        "evaluator": "classifier",
        "evaluator_digest": "e",
        "features": 64,
        "real_accuracy": 1.0,
        "dataset_digest": "d",
        "stream_digest": "s",
        "real": {"train": 719, "test": 359},
        "sampling": {},
    }
    return Scores(**{**plain, **fields})
