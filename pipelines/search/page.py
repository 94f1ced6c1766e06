"""The figures of a study, and one self-contained HTML page with them, which needs no network."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from pipelines.evaluation.plots import label_grid
from pipelines.search.importance import Importances, importances
from pipelines.search.observer import describe_params
from pipelines.search.study import TrialRecord, best, done, loss, pareto_front
from pipelines.search.study_config import DIRECTIONS, Objective, StudyConfig

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

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
        objectives = self.study.objectives
        found = {"history": history(self.records, objectives[0])}
        for other in objectives[:-1]:
            found[f"pareto_{other}"] = pareto(self.records, objectives, other)
        if self.importances.shares:
            found["importances"] = importance_figure(self.importances, objectives[0])
        if len(done(self.records)) >= MIN_JUDGED:
            found["parallel"] = parallel(self.records, objectives[0])
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
            states=_count(record.state for record in self.records),
        )


def history(records: Sequence[TrialRecord], objective: Objective) -> Figure:
    """Plot each trial's score in the order of the trials, and the best so far."""
    import plotly.graph_objects as go

    figure = go.Figure()
    numbered = [(i, r) for i, r in enumerate(records, 1) if math.isfinite(loss(r, objective))]
    for state, symbol in (("finished", "circle"), ("stopped", "x-thin-open"), ("failed", "triangle-down-open")):
        some = [(i, r) for i, r in numbered if r.state == state]
        figure.add_scatter(
            x=[i for i, _ in some],
            y=[r.scores[objective] for _, r in some],
            mode="markers",
            name=state,
            marker={"symbol": symbol, "size": 9},
            text=[describe_params(r.params) for _, r in some],
            hovertemplate="trial %{x}: %{y:.3f}<br>%{text}",
        )
    finished = [(i, r.scores[objective]) for i, r in numbered if r.state == "finished"]
    better = min if DIRECTIONS[objective] == "min" else max
    so_far = [better(score for _, score in finished[: k + 1]) for k in range(len(finished))]
    figure.add_scatter(x=[i for i, _ in finished], y=so_far, mode="lines", line={"shape": "hv"}, name="best so far")
    return _titled(figure, "Optimisation history", "trial", LABELS[objective], log_y=objective == "frechet_distance")


def pareto(records: Sequence[TrialRecord], objectives: Sequence[Objective], shown: Objective) -> Figure:
    """Plot one objective against the last one, with the Pareto front; of two objectives, its trials are joined."""
    import plotly.graph_objects as go

    across = objectives[-1]
    front = pareto_front(records, objectives)
    rest = [r for r in records if r.state == "finished" and r not in front]
    joined = "lines+markers" if len(objectives) == 2 else "markers"
    figure = go.Figure()
    for some, name, mode in ((rest, "beaten", "markers"), (front, "Pareto front", joined)):
        error = [1.96 * r.scores.get("standard_error", 0) for r in some]
        with_error = name == "Pareto front" and shown == "frechet_distance"
        figure.add_scatter(
            x=[r.scores[across] for r in some],
            y=[r.scores[shown] for r in some],
            error_y={"type": "data", "array": error, "thickness": 1} if with_error else None,
            mode=mode,
            name=name,
            line={"shape": "hv"},
            text=[describe_params(r.params) for r in some],
            hovertemplate="%{y:.3f} at %{x:.1f}<br>%{text}",
        )
    title = f"{LABELS[shown]} against {LABELS[across]}"
    title = title[:1].upper() + title[1:]
    return _titled(figure, title, LABELS[across], LABELS[shown], log_y=shown == "frechet_distance")


def importance_figure(found: Importances, objective: Objective) -> Figure:
    """Plot how much of an objective's variance each parameter explains, with the spread over resampled trials."""
    import plotly.graph_objects as go

    paths, shares = list(found.shares)[::-1], list(found.shares.values())[::-1]
    spread = {
        "type": "data",
        "symmetric": False,
        "array": [max(share.high - share.value, 0.0) for share in shares],
        "arrayminus": [max(share.value - share.low, 0.0) for share in shares],
        "thickness": 1,
    }
    figure = go.Figure(go.Bar(x=[share.value for share in shares], y=paths, orientation="h", error_x=spread))
    return _titled(figure, "Parameter importances", f"share of the variance of {LABELS[objective]}", "")


def parallel(records: Sequence[TrialRecord], objective: Objective) -> Figure:
    """Plot a line for each trial through its parameters, coloured by an objective."""
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
    scores = [record.scores[objective] for record in judged]
    dimensions.append({"label": LABELS[objective], "values": scores})
    colors = [math.log(max(s, 1e-9)) for s in scores] if objective == "frechet_distance" else scores
    line = {"color": colors, "colorscale": "Viridis", "reversescale": DIRECTIONS[objective] == "min"}
    figure = go.Figure(go.Parcoords(dimensions=dimensions, line=line, labelangle=-12))
    return _titled(figure, "Parallel coordinates", "", "", top=110)


def png(figure: Figure) -> bytes | None:
    """Render a figure as PNG; None where plotly finds no browser to render with."""
    try:
        return bytes(figure.to_image("png", width=1000, height=480))
    except (ValueError, RuntimeError, ImportError, OSError):
        return None


def _titled(figure: Figure, title: str, x: str, y: str, *, log_y: bool = False, top: int = 60) -> Figure:
    """Return the figure with title, axis titles and margins set."""
    figure.update_layout(
        title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", margin={"t": top, "l": 70, "r": 30, "b": 60}
    )
    if log_y:
        figure.update_yaxes(type="log")
    return figure


def _inline(pixels: Any) -> str:
    """Return a grid of images as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(label_grid(pixels, min(len(pixels), 10))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _count(states: Iterable[str]) -> str:
    """Return the number of trials in each state, in words."""
    listed = list(states)
    return html.escape(", ".join(f"{listed.count(s)} {s}" for s in dict.fromkeys(listed)))
