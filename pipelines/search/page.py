"""The figures of a study, and one self-contained HTML page with them, which needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from optuna import visualization as show
from plotly.graph_objects import Bar, Figure

from pipelines.evaluation.plots import label_grid
from pipelines.presentation import html
from pipelines.presentation.blocks import (
    Block,
    Code,
    Gallery,
    Interactive,
    Listing,
    Section,
    Strong,
    Table,
    Text,
    Words,
    number,
    with_interval,
)
from pipelines.presentation.images import Picture
from pipelines.search.confirmation import Confirmed
from pipelines.search.importance import Importances, importances
from pipelines.search.observer import AXIS, describe_params
from pipelines.search.study import TrialRecord, best, count_states, done, loss, pareto_front
from pipelines.search.study_config import Objective, StudyConfig
from pipelines.search.tune_trials import past_of

MIN_JUDGED = 4
"""Judged trials below which parallel coordinates show nothing."""
LABELS: dict[str, str] = {
    "frechet_distance": "Frechet distance",
    "kid": "kernel distance",
    "bits_per_dim": "bits/dim",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
    "evaluations": "network evaluations per image",
}

MEASURED = ("frechet_distance", "bits_per_dim", "evaluations")
"""Scores that are told of the best trial."""
SCORED = ("frechet_distance", "evaluations", "class_accuracy", "precision", "recall")
"""Scores that the table of the confirmation has beside the one that decides."""
NONE = "\u2014"
"""Shown in place of a figure that does not exist."""
HOLM = (
    "All settings are compared with the default on the same noise; z is the paired difference in its standard errors, "
    "p one-sided. Holm's method keeps the chance that any of them is called better at 2.5 % where none is. The "
    "intervals are of each setting alone and not corrected for their number; they are around the expectation at this "
    "number of samples."
)
TRAINED = (
    " What is compared are these trained models: another training with the same settings and another seed gives "
    "another model, which may differ by more."
)


@dataclass(frozen=True)
class StudyPage:
    """The page of a study.

    Attributes:
        name: name of the study.
        study: its settings.
        subject: the model or dataset that it is about.
        records: all trials.
        confirmed: settings, or trained models, that were judged again.
        pictures: trial -> its images, uint8 [N, H, W, C].
        seeds: the noise seeds of the study, by what they were for.
        command: the command that runs the study.
        notes: lines about cost and time.
    """

    name: str
    study: StudyConfig
    subject: str
    records: Sequence[TrialRecord]
    confirmed: Sequence[Confirmed] = ()
    pictures: Mapping[str, Any] | None = None
    seeds: Mapping[str, int] = field(default_factory=dict)
    command: str = ""
    notes: Sequence[str] = ()

    @cached_property
    def importances(self) -> Importances:
        """How much each parameter matters, and how far that can be trusted."""
        return importances(self.study, self.records)

    def figures(self) -> dict[str, Figure]:
        """Return the interactive figures by name; figures that need more trials are missing."""
        study, objectives, judged = self.study, self.study.objectives, done(self.records)
        label, past = LABELS[objectives[0]], past_of(study, self.records, objectives[:1])
        found: dict[str, Figure] = {}
        if pareto_front(self.records, objectives):
            # A stopped trial was judged with less: it is in no history and on no front, but keeps its number.
            finished = [r if r.state == "finished" else replace(r, state="failed") for r in self.records]
            history = show.plot_optimization_history(past_of(study, finished, objectives[:1]), target_name=label)
            history.update_traces(text=[describe_params(r.params) for r in finished], selector={"mode": "markers"})
            history.update_traces(line={"shape": "hv"}, selector={"mode": "lines"})
            found["history"] = _titled(history, "Optimisation history", "trial", label)
            found |= {f"pareto_{other}": pareto(study, finished, other) for other in objectives[:-1]}
        if judged:
            reports = show.plot_intermediate_values(past)
            found["reports"] = _titled(reports, "Scores on the way", AXIS[study.kind].replace("_", " "), label)
        if self.importances.shares:
            found["importances"] = importance_figure(self.importances, objectives[0])
        if len(judged) >= MIN_JUDGED:
            # A line needs all parameters: those that only some trials have are in the slices.
            lines = sorted(set.intersection(*(set(record.params) for record in judged)))
            parallel = show.plot_parallel_coordinate(past, params=lines, target_name=label)
            found["parallel"] = _titled(parallel, "Parallel coordinates", "", "", top=110)
            found["slices"] = show.plot_slice(past, target_name=label).update_layout(template="plotly_white")
        return found

    def html(self) -> str:
        """Return the page as HTML."""
        states = ", ".join(f"{count} {state}" for state, count in count_states(self.records).items() if count)
        subtitle = f"{self.study.kind} study of {self.subject} · {len(self.records)} trials: {states}"
        makers = (self._cost, self._best, self._confirmed, self._figures, self._images, self._trials)
        sections = [section for make in makers if (section := make()) is not None]
        return html.page(f"Study {self.name}", subtitle, sections, "This file holds all that it shows.")

    def _cost(self) -> Section | None:
        blocks: list[Block] = [Text(note) for note in self.notes]
        if self.command:
            blocks.append(Listing(self.command))
        return Section("cost", "How it was run", blocks) if blocks else None

    def _best(self) -> Section | None:
        found = best(self.records, self.study.objectives[0])
        if found is None:
            return None
        scores = [f"{LABELS[name]} {number(found.scores[name])}" for name in MEASURED if name in found.scores]
        params = "\n".join(f"{path}={value}" for path, value in found.params.items())
        blocks: list[Block] = [Text(["Trial ", Code(found.trial), f": {', '.join(scores)}."]), Listing(params)]
        return Section("best", "Best of the trials, by their own scores", blocks)

    def _confirmed(self) -> Section | None:
        if not self.confirmed:
            return None
        measure = self.confirmed[0].measure
        others = [name for name in SCORED if name != measure]
        head = ["setting", f"{LABELS[measure]} (95 %)", "better than the default by (95 %, alone)", "z", "p"]
        head += ["better (Holm)", *(LABELS[name] for name in others), "parameters"]
        rows: list[list[Words]] = []
        for c in self.confirmed:
            row: list[Words] = [Code(c.trial), with_interval(c.distance.value, c.distance.low, c.distance.high)]
            if c.gain is None or c.z is None or c.p is None:
                row += [NONE] * 4
            else:
                gain = with_interval(c.gain.value, c.gain.low, c.gain.high)
                row += [gain, f"{c.z:.2f}", f"{c.p:.2g}", "yes" if c.better else "no"]
            row += [number(c.scores.get(name)) or NONE for name in others]
            rows.append([*row, describe_params(c.params) if c.params else "the model's own"])
        marked = frozenset(i for i, c in enumerate(self.confirmed) if c.better)
        blocks: list[Block] = [Table(head, rows, frozenset(range(1, len(head) - 1)) - {5}, marked=marked)]
        blocks.append(Text(HOLM + (TRAINED if self.study.kind == "training" else ""), faint=True))
        if self.seeds:
            seeds = ", ".join(f"{what} {seed}" for what, seed in self.seeds.items())
            blocks.append(Text(f"Noise seeds: {seeds}.", faint=True))
        return Section("confirmed", "Confirmed on noise that no trial has used", blocks)

    def _figures(self) -> Section:
        remark = Text(self.importances.remark, faint=True)
        return Section("figures", "Figures", [*map(Interactive, self.figures().values()), remark])

    def _images(self) -> Section | None:
        front, grids = pareto_front(self.records, self.study.objectives), self.pictures or {}
        shown = [
            Picture.of_pixels(label_grid(grids[r.trial], min(len(grids[r.trial]), 10))).shown(
                f"images of trial {r.trial}",
                [
                    Strong(number(r.scores["evaluations"])),
                    " evaluations, distance ",
                    Strong(number(r.scores["frechet_distance"])),
                    f": {describe_params(r.params)}",
                ],
            )
            for r in front
            if r.trial in grids and len(self.study.objectives) > 1
        ]
        return Section("images", "Images along the front", [Gallery(shown)]) if shown else None

    def _trials(self) -> Section:
        objectives, guidance = self.study.objectives, self.study.kind == "guidance"
        several, top = len(objectives) > 1, best(self.records, objectives[0])
        front = {record.trial for record in pareto_front(self.records, objectives)} if several else set()
        second, axis = ("evaluations", "samples") if guidance else ("bits_per_dim", "images_seen")
        head = ["trial", "state", LABELS["frechet_distance"], LABELS[second], axis.replace("_", " "), "seconds"]
        ranked = sorted(self.records, key=lambda r: loss(r, objectives[0]))
        rows: list[list[Words]] = [
            [
                [Code(r.trial), " ◆" if r.trial in front else ""],
                r.state,
                *(number(r.scores.get(name)) or NONE for name in ("frechet_distance", second, axis)),
                f"{r.seconds:.1f}",
                describe_params(r.params) + (f": {r.error}" if r.error else ""),
            ]
            for r in ranked
        ]
        marked = frozenset(i for i, r in enumerate(ranked) if top is not None and r.trial == top.trial)
        blocks: list[Block] = [Table([*head, "parameters"], rows, frozenset(range(2, 6)), marked=marked)]
        if front:
            labels = ", ".join(LABELS[name] for name in objectives)
            remark = f"◆ on the Pareto front: no other trial is better in one of {labels} and as good in the rest."
            blocks.append(Text(remark, faint=True))
        return Section("trials", "Trials", blocks)


def pareto(study: StudyConfig, records: Sequence[TrialRecord], shown: Objective) -> Figure:
    """Plot one objective of the finished trials against the last one, with the Pareto front.

    What Optuna's figure lacks is added to the front: the 95 % intervals of the Frechet distance, and the line that
    joins its trials where there are two objectives.
    """
    objectives = study.objectives
    place, across, front = objectives.index(shown), objectives[-1], pareto_front(records, objectives)
    figure = show.plot_pareto_front(
        past_of(study, records),
        targets=lambda trial: (trial.values[-1], trial.values[place]),
        target_names=[LABELS[across], LABELS[shown]],
    )
    error = [1.96 * r.scores.get("standard_error", 0) for r in front]
    figure.add_scatter(
        x=[r.scores[across] for r in front],
        y=[r.scores[shown] for r in front],
        error_y={"type": "data", "array": error, "thickness": 1} if shown == "frechet_distance" else None,
        mode="lines" if len(objectives) == 2 else "markers",
        line={"shape": "hv", "color": "firebrick"},
        name="Pareto front",
        showlegend=False,
    )
    title = f"{LABELS[shown]} against {LABELS[across]}"
    return _titled(figure, title[:1].upper() + title[1:], LABELS[across], LABELS[shown])


def importance_figure(found: Importances, objective: Objective) -> Figure:
    """Plot how much of an objective's variance each parameter explains, with the spread over resampled trials."""
    paths, shares = list(found.shares)[::-1], list(found.shares.values())[::-1]
    spread = {
        "type": "data",
        "symmetric": False,
        "array": [max(share.high - share.value, 0.0) for share in shares],
        "arrayminus": [max(share.value - share.low, 0.0) for share in shares],
        "thickness": 1,
    }
    figure = Figure(Bar(x=[share.value for share in shares], y=paths, orientation="h", error_x=spread))
    return _titled(figure, "Parameter importances", f"share of the variance of {LABELS[objective]}", "")


def png(figure: Figure) -> bytes | None:
    """Render a figure as PNG; None where plotly finds no browser to render with."""
    try:
        return bytes(figure.to_image("png", width=figure.layout.width or 1000, height=480))
    except (ValueError, RuntimeError, ImportError, OSError):
        return None


def _titled(figure: Figure, title: str, x: str, y: str, top: int = 60) -> Figure:
    """Return the figure with title, axis titles and margins set; distances are on a logarithmic axis."""
    margins = {"t": top, "l": 70, "r": 30, "b": 60}
    figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", margin=margins)
    return figure.update_yaxes(type="log") if y == LABELS["frechet_distance"] else figure
