"""The sections of a report, each with a sentence on how to read it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pipelines.evaluation.score_blocks import score_table, what_was_scored
from pipelines.presentation.blocks import Bar, Block, Charts, Section, Slides, Table, Text, number
from pipelines.presentation.charts import Chart, Point, Series
from pipelines.registry.verdict import verdict_blocks
from pipelines.report.facts import Facts
from pipelines.report.gather import ACCURACY, DISTANCE, SOURCE_LOSS
from pipelines.shards.audit.contents import contents_rows

LEAST_S = 0.05
"""Shortest part of a run's time that is shown, in seconds."""
MOST_SERIES = 4
"""Series of one chart, at most."""
_FRECHET = "Frechet distance"


def sections(facts: Facts) -> tuple[Section, ...]:
    """Return the sections of a report for which there are facts."""
    makers = (
        _training,
        _contents,
        _time,
        _curves,
        _scores,
        _gate,
        _samples,
        _growth,
        _film,
        _levels,
        _settings,
        _inpainting,
    )
    found = [section for make in (*makers, _nearest, _notes) if (section := make(facts)) is not None]
    return tuple(found)


def _training(facts: Facts) -> Section | None:
    blocks = [
        Table(("", title), rows) for title, rows in (("the training", facts.training), ("its data", facts.data)) if rows
    ]
    how = "These settings, on these data and with this code, are what the model comes from; the digest names the data."
    return Section("training", "What was trained", blocks, how) if blocks else None


def _contents(facts: Facts) -> Section | None:
    tables = [Table(("", source.name or "the dataset"), contents_rows(source)) for source in facts.contents]
    how = (
        "Counted in the shards without what is in quarantine; licences and addresses are what the metadata of the "
        "samples say, and copies are images whose file is the same as that of another one."
    )
    return Section("data", "What the training data hold", tables, how) if tables else None


def _time(facts: Facts) -> Section | None:
    goodput = facts.goodput
    if goodput is None:
        if facts.wall_s is None:
            return None
        how = "From the start of the run to its end, by the clock."
        return Section("time", "How long it took", [Text(duration(facts.wall_s))], how)
    wall = max(goodput.wall_s, 1e-9)
    parts = [(name, seconds / wall) for name, seconds in goodput.parts().items() if seconds >= LEAST_S]
    how = (
        f"Goodput, here {goodput.fraction:.1%}, is the share of the drivers' time that went into steps whose result "
        "was kept; what a failure costs is under restart, recomputed and idle."
    )
    alt = "Where the time went: " + ", ".join(f"{name} {share:.1%}" for name, share in parts)
    nothing = [name for name, seconds in goodput.parts().items() if seconds < LEAST_S]
    rows = [row for row in goodput.table() if row[0] not in nothing]
    table = Table(("", "time", "what that is"), rows, frozenset([1]))
    return Section("time", f"How long it took: {duration(goodput.wall_s)}", [Bar(parts, alt), table], how)


def _curves(facts: Facts) -> Section | None:
    wanted = (
        ("train/loss", "Loss", "training loss", True),
        (DISTANCE, "Distance of samples", _FRECHET, True),
        ("updates/grad_norm", "Gradient norm", "norm before clipping", True),
        ("train/images_per_s", "Speed", "images/s", False),
    )
    charts = [
        Chart(title, "images seen", y, [Series("", points, "marked" if key == DISTANCE else "line")], log)
        for key, title, y, log in wanted
        if len(points := _positive(facts.curves.get(key, ()), only=log)) > 1  # a single one is no curve
    ]
    by_source = [key for key in facts.curves if key.startswith(SOURCE_LOSS)]
    if by_source:
        some = "" if len(by_source) <= MOST_SERIES else f", the first {MOST_SERIES} of {len(by_source)}"
        first = by_source[:MOST_SERIES]
        chosen = [Series(key.removeprefix(SOURCE_LOSS), _positive(facts.curves[key])) for key in first]
        charts.append(Chart(f"Loss by source{some}", "images seen", "training loss", chosen, True))
    accuracies = sorted((int(key.removeprefix(ACCURACY)), key) for key in facts.curves if key.startswith(ACCURACY))
    if accuracies:
        every = [Series(f"t = {t}", facts.curves[key]) for t, key in accuracies]
        chosen = every if len(every) <= MOST_SERIES else [every[i * (len(every) - 1) // 3] for i in range(4)]
        charts.append(Chart("Accuracy on noisy test images", "images seen", "accuracy", chosen))
    how = (
        "All curves are by images seen, so that runs on any number of machines compare; a falling loss with a distance "
        "that rises is overfitting, and a shaded band is the 95 % interval."
    )
    return Section("curves", "Curves", [Charts(charts)], how) if charts else None


def _scores(facts: Facts) -> Section | None:
    scores = facts.scores
    if scores is None:
        return None
    how = (
        "Distances, bits and shares of copies are better when they are lower, the other scores when they are higher; "
        "two models differ where their intervals do not overlap, and the gate's paired test finds smaller differences."
    )
    settings = ", ".join(f"{name} {value}" for name, value in scores.sampling.items() if value is not None)
    about = f"{what_was_scored(scores)} They were drawn with {settings}."
    blocks: list[Block] = [score_table(scores, facts.champion), Text(about)]
    blocks += [Text(note) for note in (facts.champion_note, *scores.notes()) if note]
    return Section("scores", "Scores", blocks, how)


def _gate(facts: Facts) -> Section | None:
    blocks = [block for verdict in facts.verdicts for block in verdict_blocks(verdict)]
    how = "An alias moves to a version only where every line passes; the reason is the decision in a sentence."
    return Section("gate", "The gate", blocks, how) if blocks else None


def _samples(facts: Facts) -> Section | None:
    if facts.samples is None:
        return None
    how = (
        "These are the first of the samples that were scored, not the best of them; those of a class or prompt stand "
        "below its name."
    )
    alt = f"Grid of samples of {facts.name}{_at(facts.images_seen)}, from its evaluation"
    return Section("samples", "Samples", [facts.samples.shown(alt)], how)


def _growth(facts: Facts) -> Section | None:
    if not facts.growth:
        return None
    how = (
        "Move the slider through the training: every grid is drawn from the same noise, so that a picture's way can be "
        "followed from one to the next."
    )
    slides = [
        (f"{seen:,} images seen", picture.shown(f"Grid of samples of {facts.name} after {seen:,} images of training"))
        for seen, picture in facts.growth
    ]
    return Section("growth", "Samples while it trained", [Slides(slides)], how)


def _film(facts: Facts) -> Section | None:
    if facts.film is None:
        return None
    how = (
        "From left to right noise becomes a picture: of each pair of rows the upper is the noisy x_t, the lower the "
        "clean x_0 that the model predicts from it."
    )
    alt = f"Film strip of {facts.name}: noisy pictures above the clean ones that the model predicts, by time"
    shown = facts.film.picture.shown(alt, f"Drawn by {facts.film.text}.")
    return Section("film", "From noise to pictures", [shown], how)


def _levels(facts: Facts) -> Section | None:
    charts, texts = [], []
    if facts.levels is not None and _positive(facts.levels.loss):
        title = f"Squared error of the predicted noise, {facts.levels.images} test images"
        charts.append(Chart(title, "timestep t", "mean squared error", [Series("", facts.levels.loss)], log_y=True))
    *terms, prior = facts.bound or [Point(0.0, 0.0)]
    if _positive(terms):
        series = [Series("", terms, "marked" if len(terms) < 20 else "line")]
        charts.append(Chart("Terms of the variational bound", "timestep t", "bits per dimension", series, log_y=True))
        whole = math.fsum(point.y for point in facts.bound)
        texts.append(
            Text(f"The terms add up to {number(whole)} bits per dimension, {prior.y:.2g} of them in the prior.")
        )
    how = (
        "Little noise (small t) is hard to tell from detail, and much noise (large t) is easy to tell from an image; "
        "the terms of the bound add up to its bits per dimension, most of which lie at small t."
    )
    return Section("levels", "Loss and bound by timestep", [Charts(charts), *texts], how) if charts else None


def _settings(facts: Facts) -> Section | None:
    charts = []
    for field, title, x in (
        ("evaluations", "Distance by network evaluations", "network evaluations per image"),
        ("scale", "Distance by guidance", "guidance scale"),
    ):
        by_source: dict[str, list[Point]] = {}
        for tried in facts.tried:
            at = getattr(tried, field)
            if at is not None and math.isfinite(at):
                point = tried.distance
                by_source.setdefault(tried.source, []).append(Point(at, point.y, point.low, point.high))
        # A single point is no curve.
        several = {source: points for source, points in by_source.items() if len({p.x for p in points}) > 1}
        series = [Series(source, sorted(points, key=lambda p: p.x), "marks") for source, points in several.items()]
        if series and _positive([p for s in series for p in s.points]):
            charts.append(Chart(title, x, _FRECHET, series[:MOST_SERIES], log_y=True))
    how = (
        "Each point is the same model with other sampling settings; lower is better, points of one colour compare, and "
        "those of different colours do not where their numbers of samples differ."
    )
    return Section("settings", "Quality by sampling settings", [Charts(charts)], how) if charts else None


def _inpainting(facts: Facts) -> Section | None:
    if facts.inpainting is None:
        return None
    how = (
        "Top row: test images with a grey part hidden; middle row: what the model put there; bottom row: the images as "
        "they are, of which the model saw the known pixels alone."
    )
    alt = "Inpainting: test images with a hidden part above, filled by the model in the middle, as they are below"
    return Section("inpainting", "Filling what a mask hides", [facts.inpainting.shown(alt)], how)


def _nearest(facts: Facts) -> Section | None:
    blocks: list[Block] = []
    if facts.nearest is not None:
        alt = "Samples above, and below each the training image that is nearest to it"
        blocks.append(facts.nearest.shown(alt))
    if facts.copies:
        blocks.append(Text(f"Copies of training images: {facts.copies}."))
    how = (
        "Above are the samples that are nearest to a training image, below each that image: alike is fine where real "
        "test images are as near, the same picture again and again is memorisation."
    )
    return Section("nearest", "Nearest training images", blocks, how) if blocks else None


def _notes(facts: Facts) -> Section | None:
    how = "These parts could not be read or computed when the report was made, and are not in it."
    return Section("notes", "What is missing", [Text(note) for note in facts.notes], how) if facts.notes else None


def duration(seconds: float) -> str:
    """Return a time in words, such as "1 h 5 min" or "42 s"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _positive(points: Iterable[Point], *, only: bool = True) -> list[Point]:
    """Return the points that a chart can show: finite ones, and positive ones where it is logarithmic."""
    return [p for p in points if math.isfinite(p.x) and math.isfinite(p.y) and (p.y > 0 or not only)]


def _at(images_seen: int | None) -> str:
    return "" if images_seen is None else f" after {images_seen:,} images of training"
