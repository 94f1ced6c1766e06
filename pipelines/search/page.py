"""The figures of a study, and one self-contained HTML page with them, which needs no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from optuna import visualization as show
from PIL import Image
from plotly.graph_objects import Bar, Figure

from pipelines.evaluation.plots import label_grid
from pipelines.search.importance import Importances, importances
from pipelines.search.observer import AXIS, describe_params
from pipelines.search.study import TrialRecord, best, count_states, done, loss, pareto_front
from pipelines.search.study_config import Objective, StudyConfig
from pipelines.search.tune_trials import past_of

if TYPE_CHECKING:
    from pipelines.search.confirmation import Confirmed

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


@dataclass(frozen=True)
class Page:
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
        figures = self.figures()
        drawn = {
            # Plotly's library is embedded once, so that the page opens offline.
            name: figure.to_html(full_html=False, include_plotlyjs=i == 0, default_height="440px")
            for i, (name, figure) in enumerate(figures.items())
        }
        objectives = self.study.objectives
        front = pareto_front(self.records, objectives) if len(objectives) > 1 else []
        environment = Environment(
            loader=PackageLoader("pipelines.search"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        return environment.get_template("study.html.j2").render(
            page=self,
            figures=drawn,
            best=best(self.records, objectives[0]),
            front={record.trial for record in front},
            labels=[LABELS[objective] for objective in objectives],
            measures=LABELS,
            rows=sorted(self.records, key=lambda r: loss(r, objectives[0])),
            describe=describe_params,
            grids={trial: _inline(pixels) for trial, pixels in (self.pictures or {}).items()},
            points=front,
            states=", ".join(f"{count} {state}" for state, count in count_states(self.records).items() if count),
        )


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


def _inline(pixels: Any) -> str:
    """Return a grid of images as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(label_grid(pixels, min(len(pixels), 10))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
