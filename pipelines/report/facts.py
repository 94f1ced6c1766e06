"""The contents of a report as values: read by `gather`, computed by `ask_model`, or made up in a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.evaluation.scores import Scores
from pipelines.presentation.charts import Point
from pipelines.presentation.images import Picture
from pipelines.registry import Verdict
from pipelines.shards.audit.contents import SourceContents
from pipelines.training.goodput import Goodput


@dataclass(frozen=True)
class Tried:
    """The distance of a model's samples with some sampling settings.

    Attributes:
        source: the study or evaluation that measured it, with the number of samples: only those of one compare.
        distance: Frechet distance, with its interval where one is known; x is of no meaning.
        evaluations: network evaluations for each image; None where they were not counted.
        scale: guidance scale; None where it was not recorded.
    """

    source: str
    distance: Point
    evaluations: float | None
    scale: float | None


@dataclass(frozen=True)
class Levels:
    """The error of a model's predictions at each noise level, on a few test images.

    Attributes:
        images: number of test images.
        loss: x is t, y the mean squared error of the predicted noise.
    """

    images: int
    loss: tuple[Point, ...]


@dataclass(frozen=True)
class FilmStrip:
    """The intermediate states from noise to pictures.

    Attributes:
        picture: x_t above the predicted x_0, by time from left to right.
        text: description of the sampling settings.
    """

    picture: Picture
    text: str


@dataclass(frozen=True)
class Facts:
    """Everything that a report can show; parts that are None or empty are unknown and have no section.

    Attributes:
        name: name of the run.
        reference: requested RUN or MODEL.
        made_at: date and time of the report.
        images_seen: images seen by the model; None if the run has published none.
        classifier: whether it is a classifier of noisy images, which draws nothing.
        version: models:/NAME/VERSION of the model; None if it is not registered.
        link: address of the run's page in MLflow; "" if it has none for a browser.
        training: rows (setting, value) about the training.
        data: rows (property, value) about the dataset.
        contents: what the data hold that the model was trained on, for each source.
        goodput: where the time went.
        wall_s: seconds from the first start to the last end; None if unknown.
        curves: metric -> points by images seen.
        scores: scores of the model.
        champion: (address, scores) of the version at the alias, if it is another one that can be compared.
        champion_note: reason why no champion is shown with the scores.
        verdicts: verdicts of the gate about the version, one per alias.
        samples: the samples that were scored.
        growth: (images seen, grid of samples), in order.
        film: of some pictures.
        levels: error by noise level.
        bound: terms of the variational bound by timestep, bits per dimension.
        tried: distances at other settings.
        inpainting: known pixels, result and original, side by side.
        nearest: samples above the training images that are nearest to them.
        copies: result of the search for copies.
        notes: parts that could not be read or computed, with reasons.
    """

    name: str
    reference: str
    made_at: str = ""
    images_seen: int | None = None
    classifier: bool = False
    version: str | None = None
    link: str = ""
    training: Sequence[tuple[str, str]] = ()
    data: Sequence[tuple[str, str]] = ()
    contents: Sequence[SourceContents] = ()
    goodput: Goodput | None = None
    wall_s: float | None = None
    curves: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    scores: Scores | None = None
    champion: tuple[str, Scores] | None = None
    champion_note: str = ""
    verdicts: Sequence[Verdict] = ()
    samples: Picture | None = None
    growth: Sequence[tuple[int, Picture]] = ()
    film: FilmStrip | None = None
    levels: Levels | None = None
    bound: Sequence[Point] = ()
    tried: Sequence[Tried] = ()
    inpainting: Picture | None = None
    nearest: Picture | None = None
    copies: str = ""
    notes: Sequence[str] = ()
