"""Scores as blocks of a page: the same table in a report and in a model card."""

from __future__ import annotations

from pipelines.evaluation.scores import LABELS, Estimate, Scores
from pipelines.presentation.blocks import Table, number, with_interval


def score_table(scores: Scores, other: tuple[str, Scores] | None = None) -> Table:
    """Return all scores with their intervals, beside what real test images and noise have.

    Args:
        other: (name, scores) of a model to compare with, in a column of its own.
    """
    head = ["score", "value (95\u00a0% interval)", "real test images", "noise"]
    if other is not None:
        head.insert(2, other[0])
    order = [*(name for name in LABELS if name in scores), *(name for name in scores.estimates if name not in LABELS)]
    rows = []
    for name in order:
        estimate = scores[name]
        real = scores.real_accuracy if name == "class_accuracy" and estimate.floor is None else estimate.floor
        row = [LABELS.get(name, name), _figure(estimate), number(real), number(estimate.ceiling)]
        if other is not None:
            row.insert(2, _figure(other[1][name]) if name in other[1] else "")
        rows.append(row)
    return Table(head, rows, frozenset(range(1, len(head))))


def what_was_scored(scores: Scores) -> str:
    """Return in a sentence which samples were scored, by which evaluator and against what."""
    drawn = f"{scores.n:,} samples" if len(scores.seeds) == 1 else f"{len(scores.seeds)} x {scores.n:,} samples"
    against = " and ".join(f"{count:,} {split}" for split, count in scores.real.items())
    against = f" against {against} images" if against else ""
    seeds = f"noise seed{'s' * (len(scores.seeds) != 1)} {', '.join(map(str, scores.seeds))}"
    return f"Of {drawn} ({seeds}), judged by the {scores.evaluator}{against}."


def _figure(estimate: Estimate) -> str:
    return with_interval(estimate.value, estimate.low, estimate.high)
