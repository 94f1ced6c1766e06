"""The pictures of a study, and one self-contained HTML page of it that opens without a network."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from pipelines.evaluation.plots import label_grid
from pipelines.search.observer import describe_params
from pipelines.search.space import StudyConfig
from pipelines.search.study import OBJECTIVES, TrialRecord, best, done, pareto_front, past_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from pipelines.search.guidance_search import Confirmed

LEAST = 4
"""Judged trials below which importances say nothing."""


@dataclass(frozen=True)
class Page:
    """A study as a person looks at it.

    Attributes:
        name: of the study.
        study: what it tried.
        subject: what it is about.
        records: every trial.
        confirmed: settings that were judged again; guidance only.
        pictures: trial -> images, uint8 [N, H, W, C].
        command: that runs it.
        notes: lines about cost and time.
    """

    name: str
    study: StudyConfig
    subject: str
    records: Sequence[TrialRecord]
    confirmed: Sequence[Confirmed] = ()
    pictures: Mapping[str, Any] | None = None
    command: str = ""
    notes: Sequence[str] = ()

    def figures(self) -> dict[str, Figure]:
        """Name -> interactive picture; those that the records are too few for are missing."""
        found = {"history": history(self.records)}
        if self.study.kind == "guidance":
            found["pareto"] = pareto(self.records)
        if len(done(self.records)) >= LEAST:
            found["importances"] = importances(self.study, self.records)
            found["parallel"] = parallel(self.records)
        return found

    def html(self) -> str:
        """The page."""
        figures = self.figures()
        drawn = {
            # The library once, in the page itself: it opens offline.
            name: figure.to_html(full_html=False, include_plotlyjs=i == 0, default_height="440px")
            for i, (name, figure) in enumerate(figures.items())
        }
        metrics = list(OBJECTIVES[self.study.kind])
        front = {record.trial for record in pareto_front(self.records, metrics)}
        environment = Environment(
            loader=PackageLoader("pipelines.search"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        return environment.get_template("study.html.j2").render(
            page=self,
            figures=drawn,
            best=best(self.records),
            front=front if len(metrics) > 1 else set(),
            rows=sorted(self.records, key=lambda r: r.scores.get("frechet_distance", math.inf)),
            describe=describe_params,
            grids={trial: _inline(pixels) for trial, pixels in (self.pictures or {}).items()},
            points=pareto_front(self.records, metrics) if len(metrics) > 1 else [],
            states=_count(record.state for record in self.records),
        )


def history(records: Sequence[TrialRecord], metric: str = "frechet_distance") -> Figure:
    """Each trial's score in the order of the trials, and the best so far."""
    import plotly.graph_objects as go

    figure = go.Figure()
    numbered = [(i, r) for i, r in enumerate(records, 1) if math.isfinite(r.scores.get(metric, math.nan))]
    for state, symbol in (("finished", "circle"), ("stopped", "x-thin-open"), ("failed", "triangle-down-open")):
        some = [(i, r) for i, r in numbered if r.state == state]
        figure.add_scatter(
            x=[i for i, _ in some],
            y=[r.scores[metric] for _, r in some],
            mode="markers",
            name=state,
            marker={"symbol": symbol, "size": 9},
            text=[describe_params(r.params) for _, r in some],
            hovertemplate="trial %{x}: %{y:.3f}<br>%{text}",
        )
    finished = [(i, r.scores[metric]) for i, r in numbered if r.state == "finished"]
    so_far = [min(score for _, score in finished[: k + 1]) for k in range(len(finished))]
    figure.add_scatter(x=[i for i, _ in finished], y=so_far, mode="lines", line={"shape": "hv"}, name="best so far")
    return _titled(figure, "Optimisation history", "trial", "Frechet distance", log_y=True)


def pareto(records: Sequence[TrialRecord]) -> Figure:
    """Distance against network evaluations; the trials that nothing beats in both are joined."""
    import plotly.graph_objects as go

    metrics = ("frechet_distance", "evaluations")
    front = pareto_front(records, metrics)
    rest = [r for r in records if r.state == "finished" and r not in front]
    figure = go.Figure()
    for some, name, mode in ((rest, "beaten in both", "markers"), (front, "Pareto front", "lines+markers")):
        error = [1.96 * r.scores.get("standard_error", 0) for r in some]
        figure.add_scatter(
            x=[r.scores["evaluations"] for r in some],
            y=[r.scores["frechet_distance"] for r in some],
            error_y={"type": "data", "array": error, "thickness": 1} if name == "Pareto front" else None,
            mode=mode,
            name=name,
            line={"shape": "hv"},
            text=[describe_params(r.params) for r in some],
            hovertemplate="%{x:.1f} evaluations: %{y:.3f}<br>%{text}",
        )
    return _titled(figure, "Quality against cost", "network evaluations per image", "Frechet distance", log_y=True)


def importances(study: StudyConfig, records: Sequence[TrialRecord]) -> Figure:
    """How much of the distance's variance each parameter explains (fANOVA, Hutter et al. 2014)."""
    import optuna
    import plotly.graph_objects as go

    past = past_of(study, done(records))
    target = (lambda trial: trial.values[0]) if len(past.directions) > 1 else None
    # Parameters that only some trials have cannot be compared; those that all have can.
    shared = set.intersection(*(set(r.params) for r in done(records)))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        found = optuna.importance.get_param_importances(past, evaluator=evaluator, params=sorted(shared), target=target)
    except (RuntimeError, ValueError):  # all scores alike: nothing explains nothing
        found = {}
    figure = go.Figure(go.Bar(x=list(found.values())[::-1], y=list(found)[::-1], orientation="h"))
    return _titled(figure, "Parameter importances", "share of the distance's variance", "")


def parallel(records: Sequence[TrialRecord]) -> Figure:
    """A line for each trial through its parameters, coloured by its distance."""
    import plotly.graph_objects as go

    judged = done(records)
    paths = list(dict.fromkeys(path for record in judged for path in record.params))
    dimensions: list[dict[str, Any]] = []
    for path in paths:
        values = [record.params.get(path) for record in judged]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            dimensions.append({"label": path, "values": values})
        else:  # words, and parameters that not every trial has
            numeric = [v for v in values if isinstance(v, float)]
            words = [f"{v:.2g}" if isinstance(v, float) else "—" if v is None else str(v) for v in values]
            order = sorted(set(words), key=lambda w: (w == "—", float(w) if numeric and w != "—" else 0, w))
            ticks = {"tickvals": list(range(len(order))), "ticktext": order} if len(order) <= 12 else {}
            dimensions.append({"label": path, "values": [order.index(w) for w in words], **ticks})
    scores = [record.scores["frechet_distance"] for record in judged]
    dimensions.append({"label": "Frechet distance", "values": scores})
    line = {"color": [math.log(max(s, 1e-9)) for s in scores], "colorscale": "Viridis", "reversescale": True}
    figure = go.Figure(go.Parcoords(dimensions=dimensions, line=line, labelangle=-12))
    return _titled(figure, "Parallel coordinates", "", "", top=110)


def png(figure: Figure) -> bytes | None:
    """A still picture of an interactive one; None where plotly has no browser to draw with."""
    try:
        return bytes(figure.to_image("png", width=1000, height=480))
    except (ValueError, RuntimeError, ImportError, OSError):
        return None


def _titled(figure: Figure, title: str, x: str, y: str, *, log_y: bool = False, top: int = 60) -> Figure:
    figure.update_layout(
        title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", margin={"t": top, "l": 70, "r": 30, "b": 60}
    )
    if log_y:
        figure.update_yaxes(type="log")
    return figure


def _inline(pixels: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(label_grid(pixels, min(len(pixels), 10))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _count(states: Iterable[str]) -> str:
    listed = list(states)
    return html.escape(", ".join(f"{listed.count(s)} {s}" for s in dict.fromkeys(listed)))
